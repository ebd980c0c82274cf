"""Every listed hook point, in prefill and cached decoding, on every route: it fires and a patch changes the output, or
the error says what to call, after which it fires."""

import re

import pytest
import torch
from conftest import small_config, small_model

from layers.hook_point import HookPoint
from qwen3next.inspect import hook_lines, hook_sizes

TOKENS = torch.arange(14).view(2, 7)
PROMPT = 5  # tokens of the prompt in cached decoding
# Every pair of choices occurs.
ROUTES = [
    {"delta_rule": d, "attention": a, "experts": e}
    for d, a, e in (
        ("chunked", "sdpa", "grouped"),
        ("chunked", "eager", "loop"),
        ("recurrent", "sdpa", "loop"),
        ("recurrent", "eager", "grouped"),
    )
]


def on(route):
    """One layer of each kind."""
    model = small_model(num_hidden_layers=2, full_attention_interval=2)
    for operation, backend in route.items():
        model.set_backend(operation, backend)
    return model


def patch(x, hook):
    if hook.dtype == "int64":
        return (x + 1) % 8
    return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


def prefill(model, hooks):
    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks).logits


def decode(model, hooks):
    """Two steps after a prompt, both with hooks: a patched recurrent state is first read by the next token."""
    cache = model.new_cache(batch=2, max_len=7)
    with torch.no_grad():
        model(TOKENS[:, :PROMPT], cache=cache)
        with model.hooks(hooks):
            return torch.cat([model(TOKENS[:, t : t + 1], cache=cache).logits for t in range(PROMPT, 7)], dim=1)


def loss(model, hooks):
    with torch.no_grad(), model.hooks(hooks):
        return model.loss(TOKENS).mtp


def follow(remedy, model):
    """Apply the remedy in the error message; of alternatives the first."""
    for part in re.split(" after ", remedy.split(" or ")[0])[::-1]:
        if "loss" not in part:
            eval(part, {"model": model, "position": PROMPT})


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: "-".join(route.values()))
@pytest.mark.parametrize("run", [prefill, decode])
def test_every_point_fires_and_acts_or_is_refused_with_a_remedy(run, route):
    plain, refused = run(on(route), []), set()
    model = on(route)
    for name, point in model.hook_dict.items():
        hooks = [(name, patch)]
        if name.startswith("mtp."):
            with pytest.raises(RuntimeError, match=re.escape(f"{name} did not fire: it needs {point.route}")):
                run(model, hooks)
            continue
        try:
            patched = run(model, hooks)
        except RuntimeError as error:
            assert f"{name} does not exist as the model runs now: it needs {point.route}." in str(error)  # noqa: PT017
            refused.add(name)
            other = on(route)
            follow(point.route, other)
            plain_there, patched = run(other, []), run(other, hooks)
            assert not torch.equal(patched, plain_there), name
        else:
            assert not torch.equal(patched, plain), name
    assert refused == expected_refusals(model, route, run)


def expected_refusals(model, route, run):
    opt_in = {n for n in model.hook_dict if re.search(r"linear_attn\.hook_(state|pattern)", n)}
    if route["attention"] == "sdpa":
        opt_in |= {n for n in model.hook_dict if re.search(r"^blocks.*self_attn\.hook_(scores|pattern)", n)}
    if route["delta_rule"] == "chunked" and run is prefill:  # a single token uses the loop
        opt_in |= {n for n in model.hook_dict if re.search(r"hook_(recalled|written)", n)}
    return opt_in


@pytest.mark.parametrize("route", ROUTES[::3], ids=lambda route: "-".join(route.values()))
def test_every_point_of_the_mtp_head_acts_in_the_loss(route):
    plain = loss(on(route), [])
    for name, point in on(route).hook_dict.items():
        if name.startswith("mtp."):
            model = on(route)
            if "after" in point.route and route["attention"] == "sdpa":
                with pytest.raises(RuntimeError, match="does not exist as the model runs now"):
                    loss(model, [(name, patch)])
                follow(point.route, model)
            assert not torch.equal(loss(model, [(name, patch)]), plain), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_are_as_listed(dtype):
    model = small_model(dtype=dtype)
    model.set_backend("delta_rule", "recurrent")
    model.materialize(state={i: [3] for i in range(3)}, pattern=range(4))
    seen: dict[str, HookPoint] = {}

    def check(x, hook):
        sizes = hook_sizes(model.config, hook.name) | {"b": 2, "t": 7, "s": 7, "n": 10, "1": 1}
        assert list(x.shape) == [sizes[letter] for letter in hook.shape.split()], hook.name
        wanted = {"model": dtype, "fp32": torch.float32, "int64": torch.int64}[hook.dtype]
        assert x.dtype == wanted, hook.name
        seen[hook.name] = hook

    model.set_backend("attention", "eager")
    with torch.no_grad(), model.hooks([("*", check)]):
        model.loss(TOKENS)
        model(TOKENS)
    assert seen.keys() == model.hook_dict.keys()


def test_inspect_lists_them_with_the_numbers_of_the_config():
    lines = hook_lines(small_config())
    assert [line.split()[0] for line in lines] == list(small_model().hook_dict)
    text = "\n".join(re.sub(" +", " ", line) for line in lines)
    assert "blocks.0.linear_attn.hook_state b h=4 k=16 v=24 fp32 model.materialize(state={0: [position]})" in text
    assert "blocks.3.self_attn.hook_k b t kh=2 d=32 model\n" in text


def test_a_gate_a_head_is_listed_so():
    model = small_model(attention_gate="headwise")
    _, acts = model.run_with_cache(TOKENS, names_filter="*self_attn.hook_gate")
    assert acts["blocks.3.self_attn.hook_gate"].shape == (2, 7, 4, 1)
    assert model.hook_dict["blocks.3.self_attn.hook_gate"].shape == "b t h 1"
