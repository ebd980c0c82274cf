"""Attach, filter, keep and detach hooks."""

import copy

import pytest
import torch
from conftest import small_model

import qwen3next as q
from layers.hook_point import HookPoint
from layers.segments import Segments

TOKENS = torch.arange(12).view(2, 6)
BETA = "blocks.0.linear_attn.hook_beta"


@pytest.fixture
def model():
    return small_model()


def armed(model):
    return [name for name, point in model.hook_dict.items() if point.armed]


def halve(x, _hook):
    return x * 0.5


def test_no_op_hooks_leave_the_output_bit_identical(model):
    """At every hook point of the default routes."""
    plain = model(TOKENS).logits
    assert torch.equal(plain, model.run_with_hooks(TOKENS, fwd_hooks=[("*", lambda x, _hook: x)]).logits)
    assert not armed(model)


def test_run_with_cache(model):
    logits, acts = model.run_with_cache(TOKENS, names_filter="blocks.*.linear_attn.hook_beta")
    assert torch.equal(logits, model(TOKENS).logits)
    assert list(acts) == [f"blocks.{i}.linear_attn.hook_beta" for i in range(3)]
    assert acts[BETA].shape == (2, 6, 4)
    _, everything = model.run_with_cache(TOKENS)
    missing = {n for n in model.hook_dict if n not in everything}
    ends = ("hook_recalled", "hook_written", "hook_state", "hook_pattern", "hook_scores")
    assert all(n.startswith("mtp.") or n.endswith(ends) for n in missing)
    assert "blocks.0.linear_attn.hook_o" in everything
    assert model.run_with_cache(TOKENS, names_filter=None)[1].keys() == everything.keys()


@pytest.mark.parametrize("pos", [2, -1, [0, 3], (1, 4), slice(1, 4), torch.tensor([5])])
def test_pos_slice_keeps_those_tokens(model, pos):
    model.set_backend("attention", "eager")
    model.set_backend("delta_rule", "recurrent")
    names = ["*.hook_resid_post", "*self_attn.hook_pattern", "*hook_written", "hook_logits"]
    _, whole = model.run_with_cache(TOKENS, names_filter=names)
    _, part = model.run_with_cache(TOKENS, names_filter=names, pos_slice=pos, device="cpu")
    index = [pos] if isinstance(pos, int) else list(pos) if isinstance(pos, tuple) else pos
    for name in whole:
        wanted = whole[name][:, :, index] if "pattern" in name else whole[name][:, index]
        assert torch.equal(part[name], wanted), name


@pytest.mark.parametrize("stop", [0, 2, 4, -1])
def test_stop_at_layer_gives_the_residual_stream(model, stop):
    _, acts = model.run_with_cache(TOKENS, names_filter="blocks.*.hook_resid_*")
    wanted = acts["blocks.3.hook_resid_post"] if stop == 4 else acts[f"blocks.{stop % 4}.hook_resid_pre"]
    residual, stopped = model.run_with_cache(TOKENS, stop_at_layer=stop)
    assert torch.equal(residual, wanted)
    assert not any(name.startswith(f"blocks.{stop % 4 if stop != 4 else 4}.") for name in stopped)
    assert torch.equal(model.run_with_hooks(TOKENS, stop_at_layer=stop), wanted)


def test_stop_at_layer_refuses_what_it_cannot_do(model):
    with pytest.raises(ValueError, match="choose -4 to 4"):
        model.run_with_cache(TOKENS, stop_at_layer=5)
    with pytest.raises(ValueError, match="run without a cache"):
        model.run_with_cache(TOKENS, stop_at_layer=1, cache=model.new_cache(batch=2))
    with pytest.raises(RuntimeError, match=r"blocks\.3\.hook_resid_pre did not fire: nothing that was called runs it"):
        model.run_with_cache(TOKENS, names_filter="blocks.3.hook_resid_pre", stop_at_layer=1)


def test_gradients_with_the_activations(model):
    """Gradients of the loss and of any scalar of the logits; parameters get none."""
    names = ["blocks.0.hook_resid_post", BETA]
    _, acts = model.run_with_cache(TOKENS, names_filter=names, incl_bwd=True)
    inner = {}

    def retain(x, hook):
        x.retain_grad()
        inner[hook.name] = x

    with model.hooks([(names, retain)]):
        model.loss(TOKENS).lm.backward()
    for name in names:
        torch.testing.assert_close(acts[f"{name}_grad"], inner[name].grad)
    model.zero_grad()
    with torch.no_grad():
        frozen = model.requires_grad_(False)
        _, acts = frozen.run_with_cache(
            TOKENS, names_filter="*", incl_bwd=lambda logits: logits[0, -1, 3], pos_slice=-1
        )
    assert acts["hook_logits_grad"][0, 0].nonzero().flatten().tolist() == [3]
    assert acts["blocks.3.hook_resid_post_grad"].shape == (2, 1, 64)
    assert "blocks.0.mlp.hook_router_indices_grad" not in acts
    assert all(p.grad is None for p in model.parameters())


def test_backward_hooks_read_and_replace_gradients(model):
    seen = {}

    def stop(grad, hook):
        seen[hook.name] = grad
        return torch.zeros_like(grad)

    point = "blocks.1.hook_resid_post"
    with model.hooks(bwd_hooks=[(point, stop)]):
        model(TOKENS).logits.sum().backward()
    _, acts = model.run_with_cache(TOKENS, names_filter=point, incl_bwd=torch.sum)
    torch.testing.assert_close(seen[point], acts[f"{point}_grad"])
    assert not model.blocks[1].linear_attn.out_proj.weight.grad.any()
    assert model.blocks[2].linear_attn.out_proj.weight.grad.any()
    model.zero_grad()
    model.run_with_hooks(TOKENS, bwd_hooks=[(point, stop)]).logits.sum().backward()
    assert not model.embed_tokens.weight.grad.any()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"without torch\.no_grad"):
        model.run_with_hooks(TOKENS, bwd_hooks=[(point, stop)])
    with pytest.raises(ValueError, match="direction"):
        model.add_hook(point, stop, dir="up")


def test_hooks_are_added_and_reset(model):
    plain = model(TOKENS).logits
    model.add_hook("blocks.*.linear_attn.hook_beta", halve)
    model.add_hook("hook_embed", halve, is_permanent=True)
    handle = model.hook_dict["hook_logits"].register_forward_hook(lambda *_: None)
    both = model(TOKENS).logits
    model.reset_hooks()
    assert armed(model) == ["hook_embed", "hook_logits"]
    one = model(TOKENS).logits
    assert not torch.equal(both, one)
    assert not torch.equal(one, plain)
    model.reset_hooks(including_permanent=True)
    assert armed(model) == ["hook_logits"]  # a hook attached through torch stays until its own handle removes it
    handle.remove()
    assert torch.equal(model(TOKENS).logits, plain)


def test_hooks_may_outlive_a_call_and_a_copy_has_its_own(model):
    plain = model(TOKENS).logits
    model.run_with_hooks(TOKENS, fwd_hooks=[(BETA, halve)], reset_hooks_end=False)
    twin = copy.deepcopy(model)
    twin.reset_hooks()
    assert armed(model) == [BETA]
    assert torch.equal(twin(TOKENS).logits, plain)


def test_a_hook_that_cannot_fire_raises(model):
    with pytest.raises(ValueError, match=r"matches blocks\.9"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.9.hook_resid_pre", print)])
    with pytest.raises(
        RuntimeError, match=r'3\.self_attn\.hook_pattern does not exist .* needs model\.set_backend\("att'
    ):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.self_attn.hook_pattern", lambda x, _hook: x)])
    with pytest.raises(ValueError, match="predicate"):
        model.run_with_cache(TOKENS, names_filter=lambda _name: False)
    model.add_hook("*hook_scores", halve)
    with pytest.raises(RuntimeError, match="hook_scores"):  # also for a hook attached with add_hook
        model(TOKENS)
    model.reset_hooks()
    with (
        pytest.raises(RuntimeError, match=r"hook_beta did not fire: nothing.*; blocks\.1.*; blocks\.2"),
        model.hooks([("blocks.*.linear_attn.hook_beta", halve)]),
    ):
        pass


def test_a_wildcard_at_the_end_takes_what_there_is(model):
    _, acts = model.run_with_cache(TOKENS, names_filter="blocks.3.self_attn.*")
    assert "blocks.3.self_attn.hook_o" in acts
    assert "blocks.3.self_attn.hook_pattern" not in acts
    with pytest.raises(RuntimeError, match="did not fire"), model.hooks([("blocks.3.self_attn.*", halve)]):
        pass


def test_hooks_leave_when_the_forward_fails(model):
    def fail(_x, _hook):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", fail)])
    assert not armed(model)


def test_the_context_says_where_a_hook_stands(model):
    seen = []

    def note(x, hook):
        seen.append((hook.ctx["layer"], hook.ctx["position"], x.shape[1]))
        hook.ctx["mine"] = len(seen)

    q.generate(model, TOKENS, max_new_tokens=3, fwd_hooks=[("blocks.2.hook_resid_post", note)])
    assert seen == [(2, 0, 6), (2, 6, 1), (2, 7, 1)]
    assert model.hook_dict["blocks.2.hook_resid_post"].ctx["mine"] == 3
    model.reset_hooks()
    assert model.hook_dict["blocks.2.hook_resid_post"].ctx == {"layer": 2}
    assert model.hook_dict["hook_embed"].ctx["layer"] is None
    seen.clear()
    padded = Segments.from_mask(torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    q.generate(model, TOKENS, segments=padded, max_new_tokens=2, fwd_hooks=[("blocks.2.hook_resid_post", note)])
    assert [position for _, position, _ in seen] == [0, (5, 6)]


def test_hooks_steer_generation(model):
    ban = 5

    def never(logits, _hook):
        return logits.index_fill(-1, torch.tensor([ban]), -torch.inf)

    plain = q.generate(model, TOKENS, max_new_tokens=12, stop_tokens=[])
    ban = int(plain[0, 6])
    steered = q.generate(model, TOKENS, max_new_tokens=12, stop_tokens=[], fwd_hooks=[("hook_logits", never)])
    assert not (steered[:, 6:] == ban).any()
    assert not armed(model)
    with pytest.raises(RuntimeError, match="does not exist"):
        q.generate(model, TOKENS, max_new_tokens=2, fwd_hooks=[("*hook_scores", halve)])


def test_transformer_lens_names_are_understood(model):
    assert model.match_hooks("blocks.*.attn.hook_q") == [
        *(f"blocks.{i}.linear_attn.hook_q" for i in range(3)),
        "blocks.3.self_attn.hook_q_pre",
    ]
    assert model.match_hooks(lambda name: name.endswith("hook_z"))[3] == "blocks.3.self_attn.hook_gated"
    assert model.match_hooks(["ln_final.hook_normalized", "unembed.hook_out"]) == [
        "hook_final_normalized",
        "hook_logits",
    ]
    assert model.match_hooks("*hook_ssm_state")[0] == "blocks.0.linear_attn.hook_state"
    _, acts = model.run_with_cache(TOKENS, names_filter="blocks.3.attn.hook_z", incl_bwd=True)
    assert acts["blocks.3.attn.hook_z"] is acts["blocks.3.self_attn.hook_gated"]
    assert acts["blocks.3.attn.hook_z_grad"].any()
    with pytest.raises(KeyError):
        acts["blocks.3.attn.hook_v"]


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
    _, acts = model.run_with_cache(TOKENS, names_filter="*.self_attn.hook_pattern")
    pattern = acts["blocks.3.self_attn.hook_pattern"]
    assert pattern.shape == (2, 4, 6, 6)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 6))
    assert pattern.triu(1).abs().sum() == 0
