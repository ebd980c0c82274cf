"""Gradients under autocast are the same to the bit whether backward is called inside the region or behind it.

Inside, autocast casts the products of the backward pass too: what ran with autocast off must not get such gradients.
"""

from functools import partial

import pytest
import torch
from conftest import small_model

from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import OPERATIONS, why_not
from layers.dispatch.backward_autocast import backward_without_autocast
from layers.experts.int8 import Int8Experts
from layers.moe import SparseMoE
from layers.segments import Segments
from layers.variants.simple_gla import simple_gla

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]
LAYERS = ("linear_attention", "full_attention")
TOKENS = torch.arange(140).view(2, 70) * 7 % 97
PACKED = Segments.from_lengths([[50, 20], [20, 45]])
# The convolution follows the delta rule; `linear_rule` is no operation of this model.
OPERATION = [op for op in OPERATIONS if op not in ("decode", "causal_conv", "simple_gla")]
BACKENDS = [(op, i.name) for op in OPERATION for i in OPERATIONS[op]]


def gradients(model, dtype, segments, *, inside):
    """The loss and every gradient."""
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model.loss(TOKENS, segments=segments).total
        if inside:
            loss.backward()
            assert torch.is_autocast_enabled("cpu")
    if not inside:
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same_inside(model, dtype):
    for segments in (PACKED, None):  # packed rows take other ways through convolution and attention
        expected = gradients(model, dtype, segments, inside=False)
        assert all(x.isfinite().all() for x in expected)
        got = gradients(model, dtype, segments, inside=True)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation, backend", BACKENDS)
def test_backward_inside_equals_backward_outside(operation, backend, dtype):
    """Of a whole mixture with an MTP layer, for every backend that can run here with gradients."""
    if (reason := why_not(operation, backend, CPU, torch.float32)) is not None:
        pytest.skip(reason)
    model = small_model(num_hidden_layers=2, layer_types=LAYERS)
    model.set_backend(operation, backend)
    # Products under autocast are torch's, whatever was named for fp32; others are refused by name.
    if operation != "linear" and why_not(operation, backend, CPU, dtype) is not None:
        with torch.autocast("cpu", dtype), pytest.raises(RuntimeError, match=f"'{backend}' backend of .* cannot run"):
            model.loss(TOKENS, segments=PACKED)
        return
    same_inside(model, dtype)


def int8(model):
    for layer in [m for m in model.modules() if isinstance(m, SparseMoE)]:
        routed, (count, width, inner) = layer.experts, layer.experts.down_proj.shape
        layer.experts = Int8Experts(width, inner, count)
        for e in range(count):
            for name, weight in zip(("gate_proj", "up_proj"), routed.gate_up_proj[e].chunk(2), strict=True):
                layer.experts.fill(name, e, weight)
            layer.experts.fill("down_proj", e, routed.down_proj[e])


MADE = {
    "without the delta": {"linear_delta": False},
    "dense": {"num_experts": 0},
    "int8 experts": {},
    "recomputed": {},
    "exposed": {},
    "watched": {},  # hooks inside the token loop
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", MADE)
def test_other_models(made, dtype):
    """Recomputed, the backward pass runs parts of the forward pass again."""
    model = small_model(num_hidden_layers=2, layer_types=LAYERS, **MADE[made])
    if made == "int8 experts":
        int8(model)
    if made == "recomputed":
        model.recompute("linear_attention", "full_attention", "mlp")
    if made == "exposed":
        with (
            model.materialize(pattern=[0]),
            model.hooks([("blocks.0.linear_attn.hook_pattern", lambda x, hook: x * 0.5)]),
        ):
            same_inside(model, dtype)
        return
    if made == "watched":
        model.set_backend("delta_rule", "recurrent")
        with model.hooks([("blocks.0.linear_attn.hook_written", lambda x, hook: x * 0.5)]):
            same_inside(model, dtype)
        return
    same_inside(model, dtype)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


RULES = {
    **{name: partial(gated_delta_rule, backend=name) for name in ("recurrent", "chunked", "chunked_recompute", "cpp")},
    **{f"linear, {name}": partial(simple_gla, backend=name) for name in ("recurrent", "chunked")},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_rules_have_fp32_gradients_in_any_region(rule, dtype):
    """Output, state and all six gradients are those of a call without autocast, to the bit."""
    if rule == "cpp" and (reason := why_not("delta_rule", "cpp", CPU, torch.float32)) is not None:
        pytest.skip(reason)
    b, t, kh, h, k, v = 2, 70, 2, 4, 16, 24
    keys = [torch.nn.functional.normalize(normal(b, t, kh, k, seed=i), dim=-1) for i in (0, 1)]
    inputs = [*keys, normal(b, t, h, v, seed=2), -normal(b, t, h, seed=3).abs(), normal(b, t, h, seed=4).sigmoid()]
    inputs = [x.requires_grad_() for x in (*inputs, normal(b, h, k, v, seed=5))]
    weights = normal(b, t, h, v, seed=6), normal(b, h, k, v, seed=7)

    def run(autocast):
        with torch.autocast("cpu", dtype, enabled=autocast):
            o, state = RULES[rule](*inputs[:5], state=inputs[5], segments=PACKED)
            total = (o * weights[0]).sum() + (state * weights[1]).sum()
            return [o, state, *torch.autograd.grad(total, inputs)]

    assert all(torch.equal(*pair) for pair in zip(run(True), run(False), strict=True))


def test_only_what_is_named_is_computed_without_autocast():
    """In the nodes below and after the backward pass autocast is on again."""
    seen = []
    x, weight = normal(4, 8, seed=0).requires_grad_(), normal(8, 8, seed=1).requires_grad_()

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            below = x * 2.0
            below.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
            with torch.autocast("cpu", enabled=False):
                y = below @ weight @ weight
            backward_without_autocast((y,), (below,))
            found = torch.autograd.grad(y.sum(), (x, weight))
            assert torch.is_autocast_enabled("cpu") == autocast
            return found

    assert all(torch.equal(*pair) for pair in zip(run(True), run(False), strict=True))
    assert seen == [True, False]
