"""Recomputation gives bit-equal gradients; torch's wrappers around blocks do not change names, hooks and folders."""

import pytest
import torch
from conftest import small_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import qwen3next as q
from layers.dispatch.backends import why_not
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.moe import Experts, SparseMoE
from layers.segments import Segments
from qwen3next.block import Block

TOKENS = torch.arange(160).view(2, 80) * 7 % 97
SEGMENTS = {
    "plain": None,
    "packed": Segments.from_lengths([[50, 30], [20, 60]]),
    "padded": Segments.from_mask(torch.arange(80) < torch.tensor([[80], [61]])),
}
PARTS = ("linear_attention", "full_attention", "mlp")


def run(model, segments, *, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.loss(TOKENS, segments=segments)
    losses.total.backward()
    parts = losses.total, losses.lm, losses.mtp, losses.balance, losses.z, losses.load
    return [*(x.detach() for x in parts if x is not None), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("parts", [("linear_attention",), ("full_attention",), ("mlp",), PARTS])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_losses_statistics_and_gradients_are_the_same_to_the_bit(parts, segments):
    """For a mixture with both kinds of layers and an MTP layer, and for a dense model under autocast."""
    for changes, autocast in (({}, False), ({"num_experts": 0}, True)):
        model = small_model(**changes)
        expected = run(model, SEGMENTS[segments], autocast=autocast)
        model.recompute(*parts)
        got = run(model, SEGMENTS[segments], autocast=autocast)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        model.recompute()
        assert not any(getattr(m, "recomputed", False) for m in model.modules())


@pytest.mark.parametrize("rule", ["recurrent", "chunked", "chunked_recompute", "cpp"])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_every_form_of_the_delta_rule_can_be_made_again(rule, segments):
    if (reason := why_not("delta_rule", rule, torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    model = small_model(num_experts=0, num_hidden_layers=1, layer_types=["linear_attention"])
    model.set_backend("delta_rule", rule)
    expected = run(model, SEGMENTS[segments])
    model.recompute("linear_attention")
    assert all(torch.equal(a, b) for a, b in zip(run(model, SEGMENTS[segments]), expected, strict=True))


def test_what_is_named_runs_twice_and_the_router_once():
    model, calls = small_model(), []
    kinds = {GatedDeltaNet: "linear_attention", GatedAttention: "full_attention", Experts: "experts"}
    for module in model.modules():
        if type(module) in kinds:
            # Counted before the run, because a recomputation stops as soon as the missing tensors exist.
            module.register_forward_pre_hook(lambda m, *_: calls.append(kinds[type(m)]))
        if isinstance(module, SparseMoE):
            module.router.register_forward_pre_hook(lambda *_: calls.append("router"))
    counts = {"linear_attention": 3, "full_attention": 2, "experts": 5, "router": 5}
    for part in (None, *PARTS):
        calls.clear()
        model.recompute(*([] if part is None else [part]))
        model.loss(TOKENS).total.backward()
        twice = "experts" if part == "mlp" else part
        assert {k: calls.count(k) for k in counts} == {k: n * (1 + (k == twice)) for k, n in counts.items()}


def test_less_is_kept():
    """Number of elements that autograd saves between forward and backward."""

    def kept(*parts):
        model, sizes = small_model(), {}
        model.recompute(*parts)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x, lambda x: x
        ):
            total = model.loss(TOKENS).total
        del total
        return sum(sizes.values())

    everything = kept()
    assert all(kept(part) < everything for part in PARTS)
    assert kept(*PARTS) < 0.7 * everything


def test_hooks_fire_once_and_act_in_gradients_though_they_are_gone_by_then():
    model, seen = small_model(), []
    model.recompute(*PARTS)

    def halve(x, hook):
        seen.append(hook.name)
        return x * 0.5

    names = ["blocks.0.linear_attn.hook_beta", "blocks.3.self_attn.hook_gate", "blocks.1.mlp.hook_shared_out"]

    def gradients():
        model.zero_grad()
        with model.hooks([(names, halve)]):
            loss = model.loss(TOKENS).total
        loss.backward()
        return [p.grad for p in model.parameters()]

    got = gradients()
    assert sorted(seen) == sorted(names)
    model.recompute()
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(), strict=True))


def test_a_cache_is_extended_once():
    """Also with gradients: a backward pass must not extend the cache again."""
    model = small_model()
    expected = model(TOKENS).logits[:, 40:]
    model.recompute(*PARTS)
    cache = model.new_cache(batch=2)
    model(TOKENS[:, :40], cache=cache)
    out = model(TOKENS[:, 40:], cache=cache).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert cache.lengths == [80, 80] or tuple(cache.lengths) == (80, 80)


def test_a_part_that_is_not_there():
    with pytest.raises(ValueError, match="This model has no 'attention' to compute again: choose of linear_attention"):
        small_model().recompute("attention")
    softmax = small_model(layer_types=["full_attention"] * 4)
    with pytest.raises(ValueError, match="no 'linear_attention' to compute again: choose of full_attention, mlp"):
        softmax.recompute("linear_attention")


def inside_and_out(model):
    """Wrap blocks, or the mixers and feed-forwards in them."""
    kinds = (Block, GatedDeltaNet, GatedAttention, SparseMoE)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kinds))


@pytest.fixture
def untraced():
    """Without compilation, because torch cannot trace the shape checks; the wrapper is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")


def once(model):
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))


def one_of_them(model):
    model.blocks[2] = checkpoint_wrapper(model.blocks[2])


@pytest.mark.parametrize("wrap", [once, inside_and_out, one_of_them, compiled])
def test_wrapped_blocks(wrap, tmp_path, request):
    """Gradients, steps, drafts, hooks by their names, exposing, the residual stream, saving and loading."""
    plain, model = small_model(), small_model()
    wrap(model)
    if wrap is compiled:
        request.getfixturevalue("untraced")
    else:
        assert all(torch.equal(a, b) for a, b in zip(run(plain, None), run(model, None), strict=True))
    assert list(model.hook_dict) == list(plain.hook_dict)
    with torch.no_grad():
        (logits, acts), (expected, kept) = (m.run_with_cache(TOKENS) for m in (model, plain))
    assert torch.equal(logits, expected)
    assert list(acts) == list(kept)
    results = [a.stack_head_results(pos_slice=3) for a in (acts, kept)]
    assert torch.equal(*results)
    layers, patterns = [0, 3], ["*0.linear_attn.hook_pattern", "*blocks.3.self_attn.hook_pattern"]
    with model.materialize(pattern=layers), plain.materialize(pattern=layers), torch.no_grad():
        got, expected = (m.run_with_cache(TOKENS, names_filter=patterns)[1] for m in (model, plain))
    assert got.keys() == expected.keys()
    steps = []
    for m in (model, plain):
        cache = m.new_cache(batch=2, mtp=True)
        for _ in m.prefill(TOKENS[:, :40], cache):
            pass
        steps.append((m.step(TOKENS[:, 40:41], cache), m.draft(cache, TOKENS[:, 41])))
    torch.testing.assert_close(*steps)
    for m, folder in ((model, "wrapped"), (plain, "plain")):
        m.save_pretrained(tmp_path / folder)
    names = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("wrapped", "plain")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert torch.equal(q.load(tmp_path / "wrapped")(TOKENS).logits, plain(TOKENS).logits)
