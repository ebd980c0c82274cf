"""Configurations: released files are read, contradictions and unknown keys are refused."""

import json

import pytest
from conftest import small_config

from qwen3next import ModelConfig, presets

# The public config.json of Qwen3-Next-80B-A3B-Instruct, key by key.
RELEASED = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_released_config_is_the_preset():
    config = ModelConfig.from_dict(RELEASED)
    assert config.replace(extra={}) == presets.qwen3_next_80b_a3b()
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == list(range(3, 48, 4))


def test_nothing_is_lost_on_the_way_back():
    again = ModelConfig.from_dict(RELEASED).to_dict()
    assert {key: again[key] for key in RELEASED} == RELEASED
    assert ModelConfig.from_dict(json.loads(json.dumps(again))) == ModelConfig.from_dict(RELEASED)


def test_transformers_form_is_read():
    values = {k: v for k, v in RELEASED.items() if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")}
    values |= {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25}}
    values |= {"layer_types": ["linear_attention"] * 47 + ["full_attention"]}
    config = ModelConfig.from_dict(values)
    assert (config.rope_theta, config.rotary_dim) == (1e7, 64)
    assert config.layer_types.count("full_attention") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": 1}, "attention_bias cannot be"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, "'linear' RoPE"),
        ({"rope_parameters": {"rope_theta": 5}}, "rope_theta twice"),
        ({"sparse_indexer": 1}, "sparse_indexer"),
        ({"num_hidden_layers": 47, "layer_types": ["full_attention"]}, "has 1 entries"),
        ({"layer_types": ["mamba"] * 48}, "mamba"),
        ({"linear_num_value_heads": 24}, "multiple"),
        ({"num_attention_heads": 15}, "multiple"),
        ({"num_experts_per_tok": 513}, r"must be 1 to num_experts \(512\), got 513"),
        ({"hidden_size": 0}, "at least 1"),
        ({"hidden_size": 2048.5}, "hidden_size cannot be 2048.5"),
        ({"hidden_size": True}, "hidden_size cannot be True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps cannot be"),
        ({"norm_topk_prob": 1}, "norm_topk_prob cannot be"),
        ({"mlp_only_layers": [1.5]}, "mlp_only_layers cannot be"),
        ({"layer_types": "full_attention"}, "layer_types cannot be"),
        ({"hidden_size": None}, "hidden_size"),
        ({"partial_rotary_factor": 0.004}, "even number"),
        ({"mlp_only_layers": [48]}, r"mlp_only_layers has layers \[48\]"),
        ({"decoder_sparse_step": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.from_dict(RELEASED | change)


def test_files(tmp_path):
    for content in ("", "[1]", "{}", '"x"', "\x00"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            ModelConfig.load(tmp_path)


def test_replace_makes_layer_types_anew():
    assert small_config().replace(num_hidden_layers=2).layer_types == ("linear_attention",) * 2


@pytest.mark.parametrize("make", presets.ALL.values(), ids=presets.ALL)
def test_presets_are_hybrids(make):
    config = make()
    assert {"linear_attention", "full_attention"} == set(config.layer_types)
    assert config.num_experts or make is presets.qwen3_5_27b
    assert config.mtp_num_hidden_layers


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2
    if isinstance(value, str):
        return f"not {value}"
    if isinstance(value, list):
        return value[::-1] if value[::-1] != value else [*value, 1]
    return {**value, "rope_theta": 3.0} if isinstance(value, dict) else 3


def said(values):
    """The mathematical meaning of a config.json, or None if it is refused."""
    try:
        config = ModelConfig.from_dict(values)
    except ValueError:
        return None
    return config.replace(extra={}, wrapper_config={}), config.stop_tokens


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MEANT = {  # besides the keys that a configuration writes
    "rope_scaling": YARN,
    "rope_parameters": YARN | {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.25,
    "qkv_bias": True,
    "hidden_act": "silu",
    "headwise_attn_output_gate": True,
    "elementwise_attn_output_gate": True,
    "attn_output_gate": True,
    "attention_gate": "headwise",
    "use_sliding_window": True,
    "mamba_ssm_dtype": "float32",
    "full_attention_interval": 2,
    "num_key_value_heads": 1,
    "quantization_config": {"quant_method": "awq"},
    "an_invention": 7,
}
NOTHING_MEANT = {"architectures", "bos_token_id", "pad_token_id", "use_sliding_window"}  # qwen3 uses the last one


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3"])
def test_every_key_at_every_level_is_read_or_refused(kind):
    """Each key with another value, inside the text model, outside it and inside RoPE's dictionaries."""
    changes = {} if kind != "qwen3" else {"layer_types": ("full_attention",) * 4, "mtp_num_hidden_layers": 0}
    dense = {} if "moe" in kind or kind == "qwen3_next" else {"num_experts": 0}
    norms = {"zero_centred_norms": False, "partial_rotary_factor": 1.0} if kind == "qwen3" else {}
    config = small_config(model_type=kind, eos_token_id=5, **changes, **dense, **norms)
    text = config.to_dict()
    before = said(text)
    levels = [lambda key, value: text | {key: value}]
    for name in ("rope_parameters", "rope_scaling"):
        levels.append(lambda key, value, name=name: text | {name: (text.get(name) or {}) | {key: value}})
    if kind.startswith("qwen3_5"):
        whole = {"model_type": kind.removesuffix("_text"), "vision_config": {}, "text_config": text}
        assert said(whole) == before
        levels.append(lambda key, value: whole | {key: value})
        levels.append(lambda key, value: whole | {"text_config": text | {key: value}})
        levels.append(lambda key, value: whole | {key: value, "text_config": {k: text[k] for k in text if k != key}})
    keys = {key: [value, other(value)] for key, value in text.items() if key not in ("model_type",)}
    for key, value in MEANT.items():
        keys[key] = [*keys.get(key, []), value, other(value)]
    silent = []
    for n, place in enumerate(levels):
        for key, values in keys.items():
            for value in values:
                # Valid: refused, the same meaning as in the text model, or no effect at either place.
                alone = {k: v for k, v in text.items() if k != key}
                if "rope_parameters" in alone:
                    alone["rope_parameters"] = {k: v for k, v in text["rope_parameters"].items() if k != key}
                meant, now = said(alone | {key: value}), said(place(key, value))
                if now is None or key in NOTHING_MEANT or value is None:
                    continue
                if now != meant and not (now == before == said(text | {key: value})):
                    silent.append((n, key, value))
    assert not silent
