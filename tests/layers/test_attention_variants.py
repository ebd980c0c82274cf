"""Every row of the gated-attention study, as a layer against an independent reference, and in a model."""

import itertools

import pytest
import torch
from attention_rows import attention
from conftest import small_config, small_model

import qwen3next as q
from layers.gated_attention import GatedAttention
from layers.rope import rotation
from layers.segments import Segments
from layers.variants.attention import AttentionVariant
from qwen3next.mixers import softmax_attention
from qwen3next.study import ROWS

pytestmark = pytest.mark.oracle

ROW_NAMES = [name for name, row in ROWS.items() if row.number]
# Beyond the paper's rows: combinations of the options.
MORE = {
    "constant_headwise_value": {
        "attention_gate": "headwise",
        "attention_gate_position": "G2",
        "attention_gate_input": "constant",
    },
    "shared_key_additive": {
        "attention_gate": "head_shared",
        "attention_gate_position": "G3",
        "attention_gate_form": "additive",
        "attention_gate_activation": "identity",
    },
    "shared_query_ns": {
        "attention_gate": "head_shared",
        "attention_gate_position": "G4",
        "attention_gate_activation": "ns_sigmoid",
    },
    "constant_output": {"attention_gate_position": "G5", "attention_gate_input": "constant"},
    "all_at_once": {
        "attention_gate_position": "G2",
        "attention_output_norm": True,
        "attention_output_activation": "silu",
        "attention_switch": "kv",
        "attention_switch_experts": 3,
        "attention_switch_top_k": 2,
    },
}
NAMES = [*ROW_NAMES, *MORE]
SOFTMAX = {"full_attention_interval": 1, "num_hidden_layers": 2, "attention_gate": "none", "mtp_num_hidden_layers": 0}


def config_of(name, **changes):
    config = small_config(**(SOFTMAX | ({} if name == "more_experts" else {"num_experts": 0}) | changes))
    return ROWS[name].of(config) if name in ROWS else config.replace(**({"attention_gate": "elementwise"} | MORE[name]))


def model_of(name, dtype=torch.float64, **changes):
    """A model of two layers with large enough weights."""
    config = config_of(name, initializer_range=0.06, **changes)
    torch.manual_seed(0)
    model = q.Qwen3Next(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("gate_constant"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.lm_head.weight.normal_(0, 0.15)
    return model.to(dtype).eval()


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def layer_of(config):
    torch.manual_seed(0)
    layer = softmax_attention(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.double()


@pytest.mark.parametrize("t", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_layer_equals_the_formulas_in_values_and_gradients(name, t):
    """In fp64; the tolerance of 1e-10 covers rounding."""
    config = config_of(name)
    layer, x = layer_of(config), torch.randn(1, t, 64, dtype=torch.float64, requires_grad=True)
    assert isinstance(layer, AttentionVariant) == config.has_attention_variant
    positions = torch.arange(t)[None]
    rope = rotation(positions, rotary_dim=config.rotary_dim, theta=config.rope_theta, dtype=torch.float64)
    y = layer(x, rope)
    weights = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    expected = attention(weights, x[0], config)
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-6)  # the reference computes cos and sin of fp32 angles
    # Gradients are compared at the same angles, because the reference's differ by fp32 rounding.
    pull = torch.randn(t, 64, dtype=torch.float64)
    got = torch.autograd.grad((y[0] * pull).sum(), [x, *layer.parameters()])
    wanted = torch.autograd.grad((expected * pull).sum(), [x, *weights.values()])
    for (parameter, _), a, b in zip([("x", x), *weights.items()], got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, parameter=parameter: f"{parameter}: {m}")
        assert t == 1 or bool(a.abs().sum() > 0), parameter


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
def test_the_released_choices_are_bit_for_bit_the_plain_layer(gate):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "gate": gate}
    plain, variant = GatedAttention(64, **sizes), AttentionVariant(64, **sizes)
    variant.load_state_dict(plain.state_dict())
    x, rope = torch.randn(2, 9, 64), rotation(torch.arange(9)[None], rotary_dim=8, theta=1e4, dtype=torch.float32)
    for graded in (True, False):  # without gradients attention uses tiles
        with torch.set_grad_enabled(graded):
            assert torch.equal(plain(x, rope), variant(x, rope))


def test_one_value_weighed_is_the_headwise_gate_on_the_value():
    """As the paper states for its switch v 1 top-1."""
    switched, gated = layer_of(config_of("switch_v_1_top1")), layer_of(config_of("g2_headwise"))
    weights = {n.replace("switch_proj", "gate_proj"): p for n, p in switched.state_dict().items()}
    gated.load_state_dict(weights)
    x, rope = (
        torch.randn(2, 9, 64).double(),
        rotation(torch.arange(9)[None], rotary_dim=8, theta=1e4, dtype=torch.float64),
    )
    torch.testing.assert_close(switched(x, rope), gated(x, rope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "sandwich_norm"])
def test_cached_packed_and_rolled_back_equal_cold(name):
    """Prefill, decoding, a fork, a rollback and a packed row equal one cold forward."""
    model, tokens = model_of(name), ids(2, 20)
    with torch.no_grad():
        cold = model(tokens).logits
        cache = model.new_cache(batch=2, max_len=20, history=4)
        parts = [model(tokens[:, :11], cache=cache).logits]
        (fork,) = cache.fork()
        model(ids(2, 3, seed=5), cache=cache)
        cache.rollback(3)
        for side in (cache, fork):
            after = [model(tokens[:, t : t + 1], cache=side).logits for t in range(11, 20)]
            torch.testing.assert_close(torch.cat([*parts, *after], 1), cold, rtol=0, atol=1e-10)
        packed = model(tokens.reshape(1, 40), segments=Segments.from_lengths([[20, 20]])).logits
    torch.testing.assert_close(packed.reshape(2, 20, -1), cold, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "more_experts"])  # it has no hook points of its own
def test_every_point_fires_and_acts(name):
    """In a forward and in cached decoding, on "eager", which has all points."""
    model = model_of(name, torch.float32, num_hidden_layers=1)
    model.set_backend("attention", "eager")
    tokens = ids(2, 7)

    def patch(x, hook):
        return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))

    def decode(hooks):
        cache = model.new_cache(batch=2, max_len=7)
        model(tokens[:, :5], cache=cache)
        with model.hooks(hooks):
            return torch.cat([model(tokens[:, t : t + 1], cache=cache).logits for t in (5, 6)], dim=1)

    runs = (lambda hooks: model.run_with_hooks(tokens, fwd_hooks=hooks).logits, decode)
    with torch.no_grad():
        for run in runs:
            plain = run([])
            for point in model.hook_dict:
                assert not torch.equal(run([(point, patch)]), plain), point


def test_points_of_variants_are_as_listed():
    """Shapes for each position and granularity."""
    gates = itertools.product(("G1", "G2", "G3", "G4"), ("elementwise", "headwise", "head_shared"))
    for position, gate in [*gates, ("G5", "elementwise")]:
        config = small_config(**(SOFTMAX | {"attention_gate": gate, "attention_gate_position": position}))
        model, seen = q.Qwen3Next(config), []

        def check(x, hook, config=config, seen=seen):
            from qwen3next.inspect import hook_sizes

            sizes = hook_sizes(config, hook.name) | {"b": 2, "t": 7, "1": 1}
            assert list(x.shape) == [sizes[letter] for letter in hook.shape.split()], hook.name
            seen.append(hook.name)

        model.run_with_hooks(ids(2, 7), fwd_hooks=[("blocks.*.self_attn.hook_[ghvq]*", check)])
        assert {"blocks.0.self_attn.hook_gate", "blocks.1.self_attn.hook_gate_logit"} <= set(seen)
    acts = model_of("switch_v_8_top2").run_with_cache(ids(1, 7), names_filter="*hook_switch")[1]
    weights = acts["blocks.0.self_attn.hook_switch"]
    assert weights.shape == (1, 7, 2, 8)
    assert bool(((weights > 0).sum(-1) == 2).all())


def test_a_gate_on_the_value_shows_what_attention_reads():
    model = model_of("g2_elementwise")
    names = ["*hook_v", "*hook_v_pre", "*hook_gate"]
    acts = model.run_with_cache(ids(1, 7), names_filter=names)[1]
    for i in (0, 1):
        at = f"blocks.{i}.self_attn."
        assert torch.equal(acts[at + "hook_v"], acts[at + "hook_v_pre"] * acts[at + "hook_gate"])


def test_sandwich_norms_stand_before_the_residual_stream():
    model = model_of("sandwich_norm")
    acts = model.run_with_cache(ids(1, 7), names_filter=["*hook_attn_out", "*hook_mlp_out", "*hook_resid_*"])[1]
    for i, block in enumerate(model.blocks):
        mixed = acts[f"blocks.{i}.hook_attn_out"]
        unit = (mixed / (1 + block.attn_out_norm.weight)).square().mean(-1)
        torch.testing.assert_close(unit, torch.ones_like(unit), rtol=0, atol=1e-3)  # eps matters for small outputs
        torch.testing.assert_close(acts[f"blocks.{i}.hook_resid_mid"], acts[f"blocks.{i}.hook_resid_pre"] + mixed)
    with pytest.raises(ValueError, match="norms or gates the sum of its heads"):
        model.run_with_cache(ids(1, 7))[1].stack_head_results(0)


@pytest.mark.parametrize("name", [*NAMES, "sandwich_norm"])
def test_saved_and_loaded(name, tmp_path):
    """Equal bytes in every tensor, an equal configuration, and an architecture name that engines do not know."""
    model = model_of(name, torch.float32)
    model.save_pretrained(tmp_path)
    again = q.load(tmp_path)
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(a, b), n
    assert again.config.replace(extra={}) == model.config
    with torch.no_grad():
        assert torch.equal(model(ids(1, 7)).logits, again(ids(1, 7)).logits)
    variant = bool(model.config.chosen()) or model.config.attention_gate == "head_shared"
    (architecture,) = model.config.to_dict()["architectures"]
    assert architecture == "Qwen3NextForCausalLM" + "Variant" * variant
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "mtp_num_hidden_layers": 1, "num_experts": 8}, {"model_type": "qwen3"}]
)
@pytest.mark.parametrize("name", ["g1_silu", "g1_headwise", "g5_elementwise", "switch_kv_4_top4", "g1_head_shared"])
def test_saved_with_biases_and_in_the_other_family(name, changes, tmp_path):
    model = model_of(name, torch.float32, **changes)
    model.save_pretrained(tmp_path)
    again = q.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.config.replace(extra={}) == model.config


def test_a_variant_of_a_loaded_model_does_not_keep_its_architecture(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = q.ModelConfig.load(tmp_path).replace(sandwich_norm=True)
    assert config.to_dict()["architectures"] == ["Qwen3NextForCausalLMVariant"]
