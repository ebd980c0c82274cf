"""Hook points: named, free when idle, never silent."""

import pytest
import torch
from conftest import small_model

from layers.hook_point import HookPoint

TOKENS = torch.arange(12).view(2, 6)
ONLY_EAGER = ("hook_scores", "hook_pattern")


@pytest.fixture
def model():
    return small_model()


def test_every_point_fires_and_a_patch_changes_the_logits(model):
    """In a forward and in cached decoding; points of the MTP head in the loss."""
    model.set_backend("attention", "eager")
    with torch.no_grad():
        plain = model(TOKENS).logits
        for name in model.hook_dict:
            if name.startswith("mtp."):
                continue

            def patch(x, hook, name=name):
                assert hook.name == name
                if name.endswith("indices"):
                    return (x + 1) % 8
                return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))

            patched = model.run_with_hooks(TOKENS, fwd_hooks=[(name, patch)]).logits
            assert not torch.equal(patched, plain), name
            cache = model.new_cache(batch=2, max_len=6)
            model(TOKENS[:, :5], cache=cache)
            decoded = model.run_with_hooks(TOKENS[:, 5:], cache=cache, fwd_hooks=[(name, patch)]).logits
            assert not torch.equal(decoded[:, -1], plain[:, -1]), name


def test_mtp_points_fire_in_the_loss(model):
    fired = []
    points = [n for n in model.hook_dict if n.startswith("mtp.") and not n.endswith(ONLY_EAGER)]
    assert points
    with model.hooks([(points, lambda _x, hook: fired.append(hook.name))]):
        model.loss(TOKENS)
    assert set(fired) == set(points)


def test_no_op_hooks_leave_the_output_bit_identical(model):
    plain = model(TOKENS).logits
    same = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.*.hook_resid_*", lambda x, _hook: x)]).logits
    assert torch.equal(plain, same)
    assert not any(point.armed for point in model.hook_dict.values())


def test_run_with_cache(model):
    logits, acts = model.run_with_cache(TOKENS, names_filter="blocks.*.linear_attn.hook_beta")
    assert torch.equal(logits, model(TOKENS).logits)
    assert list(acts) == [f"blocks.{i}.linear_attn.hook_beta" for i in range(3)]
    assert acts["blocks.0.linear_attn.hook_beta"].shape == (2, 6, 4)
    _, everything = model.run_with_cache(TOKENS)
    silent = {n for n in model.hook_dict if n.startswith("mtp.") or n.endswith(ONLY_EAGER)}
    assert everything.keys() == model.hook_dict.keys() - silent


def test_a_hook_that_cannot_fire_raises(model):
    with pytest.raises(ValueError, match=r"matches blocks\.9"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.9.hook_resid_pre", print)])
    with pytest.raises(RuntimeError, match=r"hook_pattern did not fire.*eager"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.self_attn.hook_pattern", lambda x, _hook: x)])
    with pytest.raises(ValueError, match="predicate"):
        model.run_with_cache(TOKENS, names_filter=lambda _name: False)


def test_hooks_leave_when_the_forward_fails(model):
    def fail(_x, _hook):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", fail)])
    assert not any(point.armed for point in model.hook_dict.values())


def test_plain_torch_hooks_and_replaced_forwards_work():
    point = HookPoint()
    x = torch.ones(2, requires_grad=True)
    assert point(x) is x
    handle = point.register_forward_hook(lambda _m, _args, y: y * 2)
    assert point(x).tolist() == [2, 2]
    handle.remove()
    seen = []
    with_grad = point.register_full_backward_hook(lambda _m, _gi, go: seen.append(go[0]))
    point(x).sum().backward()
    assert len(seen) == 1
    with_grad.remove()
    point.__dict__["forward"] = lambda y: y * 3  # how tracing libraries attach
    assert point(x).tolist() == [3, 3]


def test_pattern_rows_sum_to_one(model):
    model.set_backend("attention", "eager")
    _, acts = model.run_with_cache(TOKENS, names_filter="*.hook_pattern")
    pattern = acts["blocks.3.self_attn.hook_pattern"]
    assert pattern.shape == (2, 4, 6, 6)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 6))
    assert pattern.triu(1).abs().sum() == 0


def test_hooks_come_and_go_on_a_compiled_model():
    """Unless something that the forward reads changes, a compiled frame never looks at hooks again."""

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.point = HookPoint()

        def forward(self, x):
            return self.point(x * 2) + 1

    model = Tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.ones(2)
    for factor in (0, 5):
        assert compiled(x).tolist() == [3, 3]
        with model.point.register_forward_hook(lambda _m, _args, y, factor=factor: y * factor):
            assert compiled(x).tolist() == [2 * factor + 1] * 2
    assert compiled(x).tolist() == [3, 3]
