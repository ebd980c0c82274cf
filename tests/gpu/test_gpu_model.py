"""On a CUDA device: a whole model against the same model in fp64 on the CPU, and training."""

import copy

import pytest
import torch
from conftest import small_model

import qwen3next as q
from layers.segments import Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.oracle,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
# Head sizes for which there are kernels. In bf16 every expert is chosen: else rounding changes the experts of tokens.
SIZES = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64}
# Relative errors in the norm. On a CPU in bf16 they are 3% (logits) and 8% (gradients); products in tf32, which fp32
# may have, are four times as exact.
BOUND = {torch.float32: 3e-2, torch.bfloat16: 0.2}
CHANGES = {torch.float32: {}, torch.bfloat16: {"num_experts_per_tok": 8}}


def pair(dtype):
    """The same weights on the device, and in fp64 on the CPU."""
    model = small_model(dtype=dtype, **SIZES, **CHANGES[dtype])
    return copy.deepcopy(model).to(CUDA), model.double()


def ids(t=150, b=2):
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(0))


def apart(found, expected):
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", BOUND)
def test_logits(dtype):
    """Plain, padded on the left, packed, and behind a cache that was filled in two calls."""
    here, there = pair(dtype)
    tokens = ids()
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[0, :20] = 0
    packed = (torch.arange(150) > 60).long().expand(2, 150)
    with torch.no_grad():
        for make in (
            lambda d: None,
            lambda d: Segments.from_mask(mask.to(d)),
            lambda d: Segments.from_document_ids(packed.to(d)),
        ):
            a = here(tokens.to(CUDA), segments=make(CUDA)).logits
            b = there(tokens, segments=make("cpu")).logits
            real = mask.bool() if make("cpu") is not None and make("cpu").padded else torch.ones_like(mask).bool()
            assert apart(a[real.to(CUDA)], b[real]) <= BOUND[dtype]
        cache, expected = here.new_cache(2, max_len=160), there(tokens).logits
        here(tokens[:, :70].to(CUDA), cache=cache)
        a = here(tokens[:, 70:].to(CUDA), cache=cache).logits
    assert apart(a, expected[:, 70:]) <= BOUND[dtype]


@pytest.mark.parametrize("recomputed", [(), ("linear_attention", "full_attention", "mlp")])
@pytest.mark.parametrize("dtype", BOUND)
def test_loss_and_gradients(dtype, recomputed):
    """With the MTP layer; of all parameters together, so that small gradients do not decide."""
    here, there = pair(dtype)
    here.recompute(*recomputed)
    losses = [model.loss(ids().to(model.device)).total for model in (here, there)]
    assert abs(losses[0].item() - losses[1].item()) <= BOUND[dtype] * losses[1].item()
    for loss in losses:
        loss.backward()
    found, expected = (torch.cat([p.grad.flatten().double().cpu() for p in m.parameters()]) for m in (here, there))
    assert apart(found, expected) <= BOUND[dtype]


def test_greedy_tokens():
    """In fp32, ten tokens; logits of this model are apart by far more than products in tf32 are off."""
    here, there = pair(torch.float32)
    found = q.generate(here, ids(40).to(CUDA), max_new_tokens=10).cpu()
    expected = q.generate(there, ids(40), max_new_tokens=10)
    assert (found == expected).float().mean() >= 0.8  # a near tie may fall the other way, and what follows differs


def test_what_runs_is_made_for_the_device():
    rows = {row.operation: row.runs for row in q.explain(pair(torch.float32)[0])}
    assert rows["decode"] == "graph"
    assert not {"cpp", "onednn", "sdpa"} & set(rows.values())
