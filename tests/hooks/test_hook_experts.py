"""Each expert's rows can be read and replaced, for every kind of experts."""

import pytest
import torch
from conftest import small_model

from layers.experts.cache import ExpertCache
from layers.experts.disk import OffloadedExperts
from layers.experts.int8 import Int8Experts

OUT, INDICES, WEIGHTS = (f"blocks.2.mlp.hook_{n}" for n in ("expert_out", "router_indices", "router_weights"))


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def offloaded(experts):
    count, width, inner = experts.down_proj.shape

    def read(e, gate_up, down):
        gate_up.copy_(experts.gate_up_proj[e].detach())
        down.copy_(experts.down_proj[e].detach())
        return 0

    cache = ExpertCache(10**6)
    return OffloadedExperts(width, inner, count, read=read, cache=cache, dtype=torch.float32)


def int8(experts):
    count, width, inner = experts.down_proj.shape
    made = Int8Experts(width, inner, count)
    for e in range(count):
        made.fill("gate_proj", e, experts.gate_up_proj[e, :inner])
        made.fill("up_proj", e, experts.gate_up_proj[e, inner:])
        made.fill("down_proj", e, experts.down_proj[e])
    return made


@pytest.fixture(params=["grouped", "loop", "auto", "offloaded", "int8"])
def model(request):
    made = small_model()
    if request.param in ("offloaded", "int8"):
        mlp = made.blocks[2].mlp
        mlp.experts = (offloaded if request.param == "offloaded" else int8)(mlp.experts)
    else:
        made.set_backend("experts", request.param)
    return made


@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 1)])
@pytest.mark.parametrize("grad", [False, True])
def test_looking_at_the_rows_leaves_every_bit(model, shape, grad):
    with torch.set_grad_enabled(grad):
        plain = model(ids(*shape)).logits
        logits, acts = model.run_with_cache(ids(*shape), names_filter=[OUT, INDICES])
    assert torch.equal(logits, plain)
    assert acts[OUT].shape == (*shape, 3, 64)


@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_rows_without_an_expert_are_that_experts_weight_zero(model, shape):
    """The oracle changes the weights of an expert's choices instead."""
    tokens = ids(*shape)
    with torch.no_grad():
        plain, acts = model.run_with_cache(tokens, names_filter=INDICES)
        gone = int(acts[INDICES][0, 0, 1])
        chosen = acts[INDICES] == gone

        def silence(x, _hook):
            return x.masked_fill(chosen[..., None] if x.ndim == 4 else chosen, 0.0)

        by_rows = model.run_with_hooks(tokens, fwd_hooks=[(OUT, silence)]).logits
        by_weight = model.run_with_hooks(tokens, fwd_hooks=[(WEIGHTS, silence)]).logits
    torch.testing.assert_close(by_rows, by_weight, rtol=0, atol=1e-6)
    assert not torch.allclose(by_rows, plain)


def test_rows_times_weights_are_what_the_layer_adds():
    model = small_model(dtype=torch.float64)
    names = [f"blocks.2.mlp.hook_{n}" for n in ("expert_out", "router_weights", "shared_out", "shared_gate")]
    _, acts = model.run_with_cache(ids(2, 9), names_filter=[*names, "blocks.2.hook_mlp_out"], incl_bwd=True)
    rows, weights, shared, gate = (acts[name] for name in names)
    whole = (rows * weights[..., None]).sum(2) + gate * shared
    torch.testing.assert_close(whole, acts["blocks.2.hook_mlp_out"], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        acts[f"{OUT}_grad"], acts["blocks.2.hook_mlp_out_grad"][:, :, None] * weights[..., None], rtol=0, atol=1e-12
    )


def test_other_router_logits_choose_other_experts():
    model, wanted = small_model(), torch.tensor([5, 6, 7])

    def reroute(logits, _hook):
        return logits.index_add(-1, wanted, torch.full((2, 9, 3), 1e3))

    with model.hooks([("blocks.2.mlp.hook_router_logits", reroute)]):
        _, acts = model.run_with_cache(ids(2, 9), names_filter=INDICES)
    assert set(acts[INDICES].flatten().tolist()) == {5, 6, 7}
