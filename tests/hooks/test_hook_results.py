"""The result of a hook replaces the tensor: broadcast and cast as in torch, or refused with the hook's name."""

import pytest
import torch
from conftest import small_model
from parity import tokens

from layers.cpp.build import missing
from layers.hook_point import HookPoint

PATCHES = {
    "mean over rows": lambda x: x.mean(0, keepdim=True),
    "mean over tokens": lambda x: x.mean(1, keepdim=True),
    "mean over the last axis": lambda x: x.mean(-1, keepdim=True),
    "one zero": lambda x: x.new_zeros((1,) * x.ndim),
    "a number": lambda x: x.new_tensor(0.25),
    "other strides": lambda x: (2 * x).mT.contiguous().mT,
    "every second": lambda x: torch.stack((2 * x, x), dim=-1)[..., 0],
    "negated view": lambda x: torch._neg_view(x),
    "fp64": lambda x: (2 * x).double(),
    "whole numbers": lambda x: (4 * x).round().int(),
    "truths": lambda x: x > 0,
}


def whole(patch):
    """The result, already broadcast and cast to the tensor's shape and dtype."""

    def hook(x, hook):
        return patch(x).expand(x.shape).to(x.dtype).resolve_neg().contiguous().clone()

    return hook


def points(model):
    return [name for name, p in model.hook_dict.items() if p.dtype != "int64" and not p.route and "mtp" not in name]


QUICK = ("mean over rows", "a number", "other strides", "negated view")
CASES = [pytest.param(patch, torch.float32, marks=() if patch in QUICK else pytest.mark.slow) for patch in PATCHES] + [
    ("one zero", torch.bfloat16),
    ("fp64", torch.bfloat16),
]


@pytest.mark.parametrize(("patch", "dtype"), CASES)
@torch.no_grad()
def test_on_every_route(patch, dtype):
    """Bit-equal for a prompt of two chunks and a step after it, at every point of a layer of each kind."""
    model = small_model(dtype=dtype, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
    ids, change = tokens(66), PATCHES[patch]
    for name in points(model):
        found = []
        for hook in (lambda x, hook: change(x), whole(change)):
            cache = model.new_cache(2, max_len=80)
            with model.hooks([(name, hook)]):
                prompt = model(ids, cache=cache, logits_to_keep=2).logits
                found.append((prompt, model.step(ids[:, :1], cache)))
        for got, expected in zip(*found, strict=True):
            assert got.shape == expected.shape
            assert torch.equal(got.nan_to_num(), expected.nan_to_num()), name


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x[:, :-1], "does not broadcast to"),
        (lambda x: torch.cat((x, x), dim=0), "does not broadcast to"),
        (lambda x: x[None, None], "does not broadcast to"),
        (lambda x: x.to("meta"), "return one on cpu"),
        (lambda x: torch.complex(x, x), "which is no torch.float32"),
        (lambda x: 0.0, "returned float: return a tensor"),
        (lambda x: (x,), "returned tuple: return a tensor"),
    ],
)
def test_what_cannot_take_its_place_is_refused_by_name(answer, words):
    model = small_model()
    for name in ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post", "blocks.3.self_attn.hook_v", "hook_logits"):
        handle = model.hook_dict[name].register_forward_hook(lambda module, args, x: answer(x))
        with pytest.raises((ValueError, TypeError), match=words) as raised:
            model(tokens(5))
        assert name in str(raised.value)
        handle.remove()


@pytest.mark.parametrize("backend", ["cpp", "grouped", "loop"])
@pytest.mark.parametrize("step", [False, True])
def test_experts_that_are_not_there_are_refused(backend, step):
    if backend == "cpp" and missing():
        pytest.skip(missing())
    model = small_model()
    model.set_backend("experts", backend)
    for shift in (-1, 8, 5_000_000, -(2**40)):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="Tokens are routed to the experts"),
            model.hooks([("blocks.0.mlp.hook_router_indices", lambda x, hook, shift=shift: x + shift)]),
        ):
            model.step(tokens(1), model.new_cache(2)) if step else model(tokens(9))
    with pytest.raises(ValueError, match=r"which is no torch\.int64"):
        model.run_with_hooks(tokens(5), fwd_hooks=[("blocks.0.mlp.hook_router_indices", lambda x, hook: x.float())])


def test_gradients_pass_through_what_was_cast_and_broadcast():
    point = HookPoint()
    point.register_forward_hook(lambda module, args, x: x.double().mean(0, keepdim=True))
    x = torch.randn(3, 4, requires_grad=True)
    point(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(3, 4))
