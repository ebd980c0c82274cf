"""Gated DeltaNet's variants: each as a layer against a token loop, in a model with cache, hooks and files."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config, small_model

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from layers.segments import Segments
from layers.variants.deltanet import DeltaNetVariant
from layers.variants.simple_gla import simple_gla
from qwen3next.mixers import linear_attention

pytestmark = pytest.mark.oracle

CHOICES = {
    "sigmoid_gate": {"linear_output_gate": "sigmoid"},
    "no_gate": {"linear_output_gate": "none"},
    "no_conv": {"linear_use_conv": False},
    "no_norm": {"linear_output_norm": False},
    "neither_norm_nor_gate": {"linear_output_norm": False, "linear_output_gate": "none"},
    "deltanet": {"linear_decay": False},
    "mamba2_like": {"linear_delta": False},
    "linear_attention": {"linear_decay": False, "linear_delta": False},
    "negative": {"linear_negative_eigenvalues": True},
    "negative_deltanet_sigmoid_no_conv": {
        "linear_negative_eigenvalues": True,
        "linear_decay": False,
        "linear_output_gate": "sigmoid",
        "linear_use_conv": False,
    },
    "bare_linear_attention": {
        "linear_decay": False,
        "linear_delta": False,
        "linear_use_conv": False,
        "linear_output_norm": False,
        "linear_output_gate": "none",
    },
}


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def loop(w, x, c):
    """(t, width) to (t, width), one token of one value head at a time, from the table in docs/architecture.md."""
    t, kh, h = len(x), c.linear_num_key_heads, c.linear_num_value_heads
    dk, dv = c.linear_key_head_dim, c.linear_value_head_dim
    qkv = x @ w["in_proj_qkv.weight"].T
    if c.linear_use_conv:
        taps = c.linear_conv_kernel_dim
        padded = torch.cat((torch.zeros(taps - 1, qkv.shape[1]).to(x), qkv))
        qkv = torch.stack([(padded[i : i + taps] * w["conv_weight"].T).sum(0) for i in range(t)])
    qkv = qkv / (1 + (-qkv).exp())
    out = []
    for head in range(h):
        key = head // (h // kh)
        query, k = (qkv[:, i * kh * dk + key * dk :][:, :dk] for i in (0, 1))
        query, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (query, k))
        v = qkv[:, 2 * kh * dk + head * dv :][:, :dv]
        beta = (1 + c.linear_negative_eigenvalues) / (1 + (-x @ w["in_proj_b.weight"][head]).exp())
        memory, answers = torch.zeros(dk, dv).to(x), []
        for i in range(t):
            if c.linear_decay:
                step = F.softplus(x[i] @ w["in_proj_a.weight"][head] + w["dt_bias"][head])
                memory = memory * (-w["A_log"][head].exp() * step).exp()
            new = v[i] - memory.T @ k[i] if c.linear_delta else v[i]
            memory = memory + beta[i] * torch.outer(k[i], new)
            answers.append(memory.T @ query[i] / dk**0.5)
        y = torch.stack(answers)
        if c.linear_output_norm:
            y = y / (y.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w["norm.weight"]
        if c.linear_output_gate != "none":
            z = x @ w["in_proj_z.weight"][head * dv : (head + 1) * dv].T
            y = y / (1 + (-z).exp()) * (z if c.linear_output_gate == "silu" else 1)
        out.append(y)
    return torch.cat(out, dim=-1) @ w["out_proj.weight"].T


def layer_of(config):
    torch.manual_seed(0)
    layer = linear_attention(config)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, mean=-1.0 if name == "A_log" else 0.0)
    return layer.double()


@pytest.mark.parametrize("t", [1, 65])  # one token, and one more than a chunk
@pytest.mark.parametrize("name", CHOICES)
def test_layer_equals_a_loop_in_values_and_gradients(name, t):
    """In fp64, with both backends; the tolerance of 1e-9 covers rounding over 65 tokens."""
    config = small_config(**CHOICES[name])
    layer, x = layer_of(config), torch.randn(1, t, 64, dtype=torch.float64, requires_grad=True)
    assert isinstance(layer, DeltaNetVariant)
    weights = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    expected, pull = loop(weights, x[0], config), torch.randn(t, 64, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * pull).sum(), [x, *weights.values()])
    for layer.backend in ("chunked", "recurrent"):
        y = layer(x)
        torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-9)
        got = torch.autograd.grad((y[0] * pull).sum(), [x, *layer.parameters()])
        for parameter, a, b in zip(["x", *weights], got, wanted, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-8, atol=1e-9, msg=lambda m, parameter=parameter: f"{parameter}: {m}"
            )


def test_the_released_choices_are_bit_for_bit_the_plain_layer():
    sizes = {"key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 24}
    plain, variant = GatedDeltaNet(64, **sizes), DeltaNetVariant(64, **sizes)
    variant.load_state_dict(plain.state_dict())
    x = torch.randn(2, 70, 64)
    assert torch.equal(plain(x), variant(x))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("t", [1, 63, 64, 65, 130])
def test_the_rule_without_delta_in_chunks_equals_its_loop(t, packed):
    """Output, final state and all six gradients from a non-zero state, in fp64."""
    torch.manual_seed(t)
    x = [torch.randn(2, t, n, d, dtype=torch.float64) for n, d in ((2, 8), (2, 8), (4, 6))]
    gates = [-torch.rand(2, t, 4, dtype=torch.float64), torch.rand(2, t, 4, dtype=torch.float64)]
    inputs = [y.requires_grad_() for y in (*x, *gates, torch.randn(2, 4, 8, 6, dtype=torch.float64))]
    segments = None
    if packed and t > 3:
        document_ids = torch.zeros(2, t, dtype=torch.long)
        document_ids[0, t // 3 :], document_ids[1, -3:] = 1, -1
        segments = Segments.from_document_ids(document_ids)
    results = []
    for backend in ("recurrent", "chunked"):
        o, state = simple_gla(*inputs[:5], state=inputs[5], segments=segments, backend=backend)
        real = 1.0 if segments is None else segments.mask[..., None, None]
        total = (o * real * torch.linspace(-1, 1, 6)).sum() + (state * torch.linspace(0, 1, 6)).sum()
        results.append((o * real, state, *torch.autograd.grad(total, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_rule_without_delta_has_no_other_backend():
    y = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="has no backend 'fla'"):
        simple_gla(y, y, y, y[..., 0], y[..., 0], backend="fla")
    with pytest.raises(ValueError, match="cannot share"):
        simple_gla(y.repeat(1, 1, 2, 1), y.repeat(1, 1, 2, 1), y, y[..., 0], y[..., 0])


@pytest.mark.parametrize("name", CHOICES)
def test_cached_packed_and_rolled_back_equal_cold(name):
    model = small_model(
        dtype=torch.float64, num_hidden_layers=2, num_experts=0, mtp_num_hidden_layers=0, **CHOICES[name]
    )
    tokens = ids(2, 80)
    with torch.no_grad():
        cold = model(tokens).logits
        cache = model.new_cache(batch=2, max_len=80, history=4)
        first = model(tokens[:, :70], cache=cache).logits
        (fork,) = cache.fork()
        model(ids(2, 3, seed=5), cache=cache)
        cache.rollback(3)
        for side in (cache, fork):
            after = [model(tokens[:, t : t + 1], cache=side).logits for t in range(70, 80)]
            torch.testing.assert_close(torch.cat([first, *after], 1), cold, rtol=0, atol=1e-10)
        packed = model(tokens.reshape(1, 160), segments=Segments.from_lengths([[80, 80]])).logits
    torch.testing.assert_close(packed.reshape(2, 80, -1), cold, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CHOICES)
def test_every_point_fires_and_acts(name):
    """In a forward and in cached decoding, with "recurrent" and exposed states, which has all points."""
    changes = {"num_hidden_layers": 1, "num_experts": 0, "mtp_num_hidden_layers": 0}
    model, tokens = small_model(**changes, **CHOICES[name]), ids(2, 7)
    model.set_backend("delta_rule", "recurrent")
    model.materialize(state={0: [5]}, pattern=[0])
    left_out = {"linear_output_gate": ("none", "hook_gate"), "linear_delta": (False, "hook_recalled")}
    for field, (value, point) in left_out.items():
        present = CHOICES[name].get(field) != value
        assert (f"blocks.0.linear_attn.{point}" in model.hook_dict) == present

    def patch(x, hook):
        return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))

    def decode(hooks):
        cache = model.new_cache(batch=2, max_len=7)
        model(tokens[:, :5], cache=cache)
        with model.hooks(hooks):
            return torch.cat([model(tokens[:, t : t + 1], cache=cache).logits for t in (5, 6)], dim=1)

    with torch.no_grad():
        for run in (lambda hooks: model.run_with_hooks(tokens, fwd_hooks=hooks).logits, decode):
            plain = run([])
            for point in model.hook_dict:
                assert not torch.equal(run([(point, patch)]), plain), point


@pytest.mark.parametrize("name", ["mamba2_like", "linear_attention", "negative", "deltanet"])
def test_matrix_states_and_ledger_are_the_models(name):
    """States rebuilt from cached activations against those of generation; A v against the layer."""
    changes = {"num_hidden_layers": 1, "num_experts": 0, "mtp_num_hidden_layers": 0}
    model, tokens = small_model(dtype=torch.float64, **changes, **CHOICES[name]), ids(1, 70)
    _, acts = model.run_with_cache(tokens)
    at = "blocks.0.linear_attn."
    o = acts.implicit_attention(0) @ acts[f"{at}hook_v"].transpose(1, 2)
    torch.testing.assert_close(o.transpose(1, 2), acts[f"{at}hook_o"], rtol=0, atol=1e-10)
    cache = model.new_cache(max_len=70)
    model(tokens[:, :67], cache=cache)
    torch.testing.assert_close(acts.state(0, 66), cache.layers[0].recurrent, rtol=0, atol=1e-10)
    ledger = acts.ledger(0)
    jump = acts.state(0, 66) - ledger.decay[:, 66, :, None, None] * acts.state(0, 65)
    # |k| deviates from 1, because 1e-6 is added to a sum of squares of about 0.1 here.
    torch.testing.assert_close(jump.flatten(2).norm(dim=-1), ledger.written[:, 66], rtol=1e-5, atol=0)
    assert bool((ledger.erased > 0).any()) == model.config.linear_delta


def test_edits_of_states_reach_what_follows_without_a_delta():
    changes = {"num_hidden_layers": 1, "num_experts": 0, "mtp_num_hidden_layers": 0}
    model, tokens = small_model(**changes, linear_delta=False), ids(1, 20)
    plain = model(tokens).logits
    with model.materialize(state={0: [9]}):
        cut = model.run_with_hooks(tokens, fwd_hooks=[("*hook_state", lambda s, hook: s * 0)]).logits
    torch.testing.assert_close(cut[:, :10], plain[:, :10])
    assert not torch.allclose(cut[:, 10], plain[:, 10])
    with pytest.raises(RuntimeError, match="does not exist as the model runs now"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.linear_attn.hook_state", lambda s, hook: s)])


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
@pytest.mark.parametrize("name", CHOICES)
def test_saved_and_loaded(name, family, tmp_path):
    changes = {"model_type": family, "num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 0}
    model = small_model(**changes, **CHOICES[name])
    model.save_pretrained(tmp_path)
    again = q.load(tmp_path)
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(a, b), n
    assert again.config.replace(extra={}) == model.config
    with torch.no_grad():
        assert torch.equal(model(ids(1, 7)).logits, again(ids(1, 7)).logits)


def test_a_cache_of_a_layer_without_convolution_is_saved(tmp_path):
    model, tokens = small_model(linear_use_conv=False), ids(1, 20)
    cache = model.new_cache(max_len=20)
    assert cache.nbytes() == model.config.bytes_per_sequence()  # in fp32, without a convolution state
    assert small_model().new_cache(max_len=20).nbytes() == small_config().bytes_per_sequence(conv_bytes=4)
    with torch.no_grad():
        model(tokens[:, :15], cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        other = q.HybridCache.load(tmp_path / "cache.safetensors", model)
        assert torch.equal(model(tokens[:, 15:], cache=other).logits, model(tokens[:, 15:], cache=cache).logits)


def test_explain_names_the_rule_and_no_convolution_that_is_not_there():
    rows = {row.operation: row.runs for row in q.explain(small_model(linear_delta=False, linear_use_conv=False))}
    assert rows["simple_gla"] == "chunked"
    assert not {"delta_rule", "causal_conv"} & rows.keys()


def test_gradients_reach_every_parameter():
    for gate, norm, decay in itertools.product(("silu", "sigmoid"), (True, False), (True, False)):
        model = small_model(
            num_hidden_layers=2, linear_output_gate=gate, linear_output_norm=norm, linear_decay=decay, num_experts=0
        )
        model.loss(ids(2, 12)).total.backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_single_tokens_are_taken_back_to_the_bit(name):
    model = small_model(num_hidden_layers=2, num_experts=0, mtp_num_hidden_layers=0, **CHOICES[name])
    cache, tokens = model.new_cache(max_len=90, history=8), ids(1, 90)
    model(tokens[:, :70], cache=cache)

    def states():
        return [x.clone() for s in cache.layers if hasattr(s, "recurrent") for x in (s.conv, s.recurrent)]

    seen = []
    for t in range(70, 78):
        seen.append(states())
        model(tokens[:, t : t + 1], cache=cache)
    for back, before in ((1, seen[7]), (3, seen[4]), (4, seen[0])):
        cache.rollback(back)
        for found, wanted in zip(states(), before, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_packed_and_padded_prompts_leave_the_states_of_single_ones(name):
    model = small_model(
        dtype=torch.float64, num_hidden_layers=2, num_experts=0, mtp_num_hidden_layers=0, **CHOICES[name]
    )
    a, b = ids(1, 70), ids(1, 9, seed=3)
    single = []
    for x in (a, b):
        cache = model.new_cache(max_len=80)
        model(x, cache=cache)
        single.append((cache, model(x[:, :1], cache=cache).logits))
    packed = model.new_cache(batch=2, max_len=80)
    model(torch.cat([a, b], dim=1), segments=Segments.from_lengths([[70, 9]]), cache=packed)
    padded = model.new_cache(batch=2, max_len=80)
    mask = torch.arange(70) < torch.tensor([[70], [9]])
    model(torch.cat([a, torch.nn.functional.pad(b, (0, 61))]), segments=Segments.from_mask(mask), cache=padded)
    for cache in (packed, padded):
        after = model(torch.cat([a[:, :1], b[:, :1]]), cache=cache).logits
        torch.testing.assert_close(after, torch.cat([logits for _, logits in single]), rtol=0, atol=1e-10)
        for n, (alone, _) in enumerate(single):
            for x, y in zip(cache.layers, alone.layers, strict=True):
                if hasattr(x, "recurrent"):
                    torch.testing.assert_close(x.recurrent[n], y.recurrent[0], rtol=0, atol=1e-10)
