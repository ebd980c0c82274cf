"""Hooks, replaced forwards, adapters and offloaded weights of a module act on every route."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model
from torch import nn
from torch.nn.utils import parametrize

import qwen3next as q
from layers.linear import Linear
from layers.segments import Segments

TOKENS = (torch.arange(60).view(2, 30) * 7) % 97
MASK = torch.ones(2, 30, dtype=torch.bool)
MASK[1, 20:] = False


def triple(_module, _args, output):
    return 3 * output


def pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda _module, args: (3 * args[0],))


def forward_hook(model):
    model.lm_head.register_forward_hook(triple)


def own_forward(model):
    before = model.lm_head.forward
    model.lm_head.forward = lambda x: 3 * before(x)


def added_hook(model):
    for name in ("hook_logits", "mtp.hook_logits"):
        model.add_hook(name, lambda x, hook: 3 * x)


def torch_hook(model):
    for name in ("hook_logits", "mtp.hook_logits"):
        model.hook_dict[name].register_forward_hook(triple)


def own_forward_of_the_point(model):
    for name in ("hook_logits", "mtp.hook_logits"):
        model.hook_dict[name].forward = lambda x: 3 * x


class Triple(nn.Module):
    def forward(self, x):
        return 3 * x


def replaced(model):
    model.lm_head = nn.Sequential(model.lm_head, Triple())


def parametrised(model):
    parametrize.register_parametrization(model.lm_head, "weight", Triple())


class Tripling(Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def subclass(model):
    model.lm_head.__class__ = Tripling


def of_all_modules(model):
    def hook(module, _args, output):
        return 3 * output if module is model.lm_head else None

    return nn.modules.module.register_module_forward_hook(hook)


CHANGES = [
    pre_hook,
    forward_hook,
    own_forward,
    added_hook,
    torch_hook,
    own_forward_of_the_point,
    replaced,
    parametrised,
    subclass,
    of_all_modules,
]


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("change", CHANGES)
def test_losses_are_those_of_the_logits_that_a_forward_gives(change, mask):
    """Both losses and the gradient of the embedding; the oracle is a model with three times the head's weight."""
    model, other = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    segments = None if mask is None else Segments.from_mask(mask)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    handle = change(model)
    try:
        got = model.loss(TOKENS, segments=segments)
        logits = model(TOKENS, segments=segments).logits
    finally:
        if handle is not None:
            handle.remove()
    expected = other.loss(TOKENS, segments=segments)
    torch.testing.assert_close((got.lm, got.mtp), (expected.lm, expected.mtp))
    if mask is None:
        torch.testing.assert_close(got.lm, F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()))
    for x in (got, expected):
        x.total.backward()
    torch.testing.assert_close(model.embed_tokens.weight.grad, other.embed_tokens.weight.grad)


def test_backward_hooks_of_the_head_fire_in_the_loss():
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        model, fired = small_model(), []
        getattr(model.lm_head, register)(lambda *_, fired=fired: fired.append(1))
        model.loss(TOKENS).total.backward()
        assert len(fired) == 2  # the MTP layer uses the same head


def test_logits_are_seen_whole_and_padding_reaches_no_gradient():
    model, seen = small_model(), []
    model.add_hook("hook_final_norm", lambda x, hook: x.masked_fill(~MASK[..., None], torch.nan))
    model.add_hook("hook_logits", lambda x, hook: seen.append(x.shape))
    model.config = model.config.replace(mtp_loss_coef=0.0)
    model.loss(TOKENS, segments=Segments.from_mask(MASK)).total.backward()
    assert seen == [(2, 30, 97)]
    assert bool(model.lm_head.weight.grad.isfinite().all())


class Adapter(nn.Module):
    """A wrapper like LoRA's around a linear map, without a `weight`."""

    def __init__(self, base, dtype=None):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features).to(base.weight.dtype if dtype is None else dtype) * 0.2)
        self.b = nn.Parameter(torch.randn(base.out_features, 4).to(self.a.dtype) * 0.2)

    def forward(self, x):
        return self.base(x) + (x.to(self.a.dtype) @ self.a.T @ self.b.T).to(x.dtype)

    def merged(self):
        base = self.base
        base.weight.data += (self.b @ self.a).to(base.weight.dtype)
        return base


def test_an_adapter_on_the_router_does_what_it_does_once_merged():
    """In a forward, in a loss with gradients, with a cache and in steps; under autocast the router stays fp32."""
    model = small_model(dtype=torch.float64)
    plain = model(TOKENS).logits
    for block in (*model.blocks, *model.mtp.blocks):
        block.mlp.router = Adapter(block.mlp.router)
    model.loss(TOKENS).total.backward()
    assert all(bool(block.mlp.router.a.grad.any()) for block in model.blocks)

    def runs():
        cache = model.new_cache(batch=2)
        for _ in model.prefill(TOKENS[:, :20], cache):
            pass
        steps = [model.step(TOKENS[:, i : i + 1], cache) for i in range(20, 24)]
        return [model(TOKENS).logits, model.loss(TOKENS).total, *steps]

    with torch.no_grad():
        wrapped = runs()
        for block in (*model.blocks, *model.mtp.blocks):
            block.mlp.router = block.mlp.router.merged()
        torch.testing.assert_close(wrapped, runs())
    assert not torch.allclose(plain, wrapped[0])

    layer, x = small_model().blocks[0].mlp, torch.randn(2, 5, 64).bfloat16()
    seen = []
    layer.router = Adapter(layer.router)
    layer.router.register_forward_hook(lambda _m, args, y: seen.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert seen == [(torch.float32, torch.float32)]


@pytest.mark.parametrize("attach", ["pre_hook", "hook", "own_forward", "replaced"])
def test_what_is_attached_to_a_router_acts(attach):
    model = small_model()
    plain, router = model(TOKENS).logits, model.blocks[1].mlp.router
    if attach == "pre_hook":
        router.register_forward_pre_hook(lambda _module, args: (-args[0],))
    elif attach == "hook":
        router.register_forward_hook(lambda _module, _args, output: -output)
    elif attach == "own_forward":
        router.forward = lambda x: -F.linear(x, router.weight)
    else:
        model.blocks[1].mlp.router = nn.Linear(64, 8, bias=False)
        model.blocks[1].mlp.router.weight.data = -router.weight.data
    got = model(TOKENS).logits
    other = small_model()
    other.blocks[1].mlp.router.weight.data.neg_()
    torch.testing.assert_close(got, other(TOKENS).logits)
    assert not torch.allclose(got, plain)


def offload(model, *, whole_blocks):
    """As in accelerate: weights are on the meta device except during the forward of their module or their block."""
    blocks = (*model.blocks, *([] if model.mtp is None else model.mtp.blocks))
    inside = {id(m) for block in blocks for m in block.modules()} if whole_blocks else set()
    owners = [m for m in model.modules() if m._parameters and id(m) not in inside]
    owners += blocks if whole_blocks else []
    for owner in owners:
        places = [owner] if id(owner) not in inside else list(owner.modules())
        places = [m for m in places if m._parameters]
        _around(owner, places)


def _around(owner, places):
    store = [(m, name, p.detach().clone()) for m in places for name, p in m._parameters.items() if p is not None]

    def put(device):
        for module, name, value in store:
            here = torch.empty_like(value, device="meta") if device == "meta" else value.clone()
            module._parameters[name] = nn.Parameter(here, requires_grad=False)

    run = owner.forward

    def forward(*args, **kwargs):
        put("cpu")
        try:
            return run(*args, **kwargs)
        finally:
            put("meta")

    owner.forward = forward
    put("meta")


@pytest.mark.parametrize("whole_blocks", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}])
@torch.no_grad()
def test_weights_may_be_there_for_the_time_of_their_modules_forward(changes, whole_blocks):
    """Logits, prefill and steps are bit-equal; the loss, with sums in another order, is equal to an ulp; drafts, which
    compiled code makes where weights stay, are equal to rounding."""

    def runs(model):
        model.set_backend("decode", "auto")
        cache = model.new_cache(batch=2, mtp=True)
        for _ in model.prefill(TOKENS[:, :20], cache):
            pass
        steps = [model(TOKENS[:, i : i + 1], cache=cache).logits for i in range(20, 24)]
        padded = model.new_cache(batch=2, mtp=True)
        for _ in model.prefill(TOKENS, padded, 64, segments=Segments.from_mask(MASK)):
            pass
        drafts = [model.draft(x, TOKENS[:, 0]) for x in (cache, padded)]
        return model.loss(TOKENS).total, [model(TOKENS).logits, *steps], drafts

    loss, expected, drafts = runs(small_model(**changes))
    model = small_model(**changes)
    offload(model, whole_blocks=whole_blocks)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    got_loss, got, got_drafts = runs(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(got_drafts, drafts, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_loss, loss, rtol=2e-7, atol=0)
    cache = model.new_cache(batch=2)
    model.step(TOKENS[:, :3], cache)
    assert bool(model.step(TOKENS[:, 3:4], cache).isfinite().all())
    assert "decode" in str(q.explain(model))


def test_parts_of_logits_are_not_read_from_a_head_that_an_adapter_surrounds():
    model = small_model()
    _, acts = model.run_with_cache(TOKENS)
    components = acts.decompose_resid()
    model.lm_head = Adapter(model.lm_head)
    with pytest.raises(ValueError, match=r"Adapter has no weight .* merge its adapters"):
        acts.logit_attrs(components, 3)


def test_long_prompts_are_not_split_under_a_forward_of_its_own(monkeypatch):
    """A replaced forward and a global module hook receive every token of a call."""
    monkeypatch.setattr("qwen3next.generation.block_parts.TOKENS", 8)
    model, seen = small_model(), []
    norm = model.blocks[0].post_attention_layernorm
    before = norm.forward
    norm.forward = lambda x: (seen.append(x.shape[1]), before(x))[1]
    with torch.no_grad():
        for _ in model.prefill(TOKENS, model.new_cache(batch=2)):
            pass
    assert seen == [30]
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, _y: seen.append(args[0].shape[1]) if m is model.blocks[1].post_attention_layernorm else None
    )
    del norm.forward
    try:
        with torch.no_grad():
            for _ in model.prefill(TOKENS, model.new_cache(batch=2)):
                pass
    finally:
        handle.remove()
    assert seen == [30, 30]


def test_where_a_model_computes():
    """The cache is on the meta device for a model without weights, and on the device of use for offloaded ones."""
    with torch.device("meta"):
        model = small_model()
    assert model.device.type == model.new_cache().layers[0].conv.device.type == "meta"
    model.embed_tokens.register_forward_pre_hook(lambda *_: None)
    assert model.device.type == "cpu"
    model.embed_tokens._hf_hook = type("AlignDevicesHook", (), {"execution_device": "cuda:0"})()
    assert model.device == torch.device("cuda:0")
    assert small_model().device.type == "cpu"
