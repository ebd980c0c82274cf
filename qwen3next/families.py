"""How the config.json of each model_type maps to `ModelConfig`.

A family lists the fields that its config.json must give, the fields that it implies, and the keys of other names that
stand for a field of `ModelConfig`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from layers.rope import Yarn
from qwen3next.files.json_files import typed
from qwen3next.variants import RELEASED

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
)
LINEAR = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_DENSE = {
    "num_experts": 0,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "router_aux_loss_coef": 1e-3,
}
_GATED_HYBRID = {"attention_gate": "elementwise", "zero_centred_norms": True, "use_qk_norm": True}


@dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
        required: sizes that its config.json must give, because the defaults of different readers differ.
        implied: values of fields that its config.json omits; written only if they differ.
        fixed: keys and the one supported value of each; another value would change the mathematics.
        gate_flags: keys that, if true, select an `attention_gate`.
        wrapper: the model_type that holds this one as text_config beside a vision tower.
        rope_parameters: whether RoPE's values are written in a nested dictionary, as transformers 5 does.
    """

    model_type: str
    architecture: str
    required: tuple[str, ...]
    implied: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    gate_flags: Mapping[str, str] = field(default_factory=dict)
    wrapper: str | None = None
    rope_parameters: bool = False


_FIXED_35 = {"mamba_ssm_dtype": "float32", "output_gate_type": "swish", "mtp_use_dedicated_embeddings": False}
_TRAINING = {
    "router_z_loss_coef": 0.0,
    "logit_z_loss_coef": 0.0,
    "mtp_loss_coef": 0.1,
    **RELEASED,
}  # implied in every family

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen3_next",
            "Qwen3NextForCausalLM",
            required=(*SIZES, "intermediate_size", *LINEAR, *EXPERTS),
            implied=_GATED_HYBRID | _TRAINING,
        ),
        Family(
            "qwen3_5_text",
            "Qwen3_5ForCausalLM",
            required=(*SIZES, "intermediate_size", *LINEAR),
            implied=_GATED_HYBRID | _DENSE | _TRAINING,
            fixed=_FIXED_35,
            gate_flags={"attn_output_gate": "elementwise"},
            wrapper="qwen3_5",
            rope_parameters=True,
        ),
        Family(
            "qwen3_5_moe_text",
            "Qwen3_5MoeForCausalLM",
            required=(*SIZES, *LINEAR, *EXPERTS),
            implied=_GATED_HYBRID
            | _TRAINING
            | {"intermediate_size": 5120, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": ()},
            fixed=_FIXED_35,
            gate_flags={"attn_output_gate": "elementwise"},
            wrapper="qwen3_5_moe",
            rope_parameters=True,
        ),
        Family(
            "qwen3",  # and the gated-attention study's models, which add flags to it
            "Qwen3ForCausalLM",
            required=(*SIZES, "intermediate_size"),
            implied=_DENSE
            | _TRAINING
            | {
                "attention_gate": "none",
                "zero_centred_norms": False,
                "partial_rotary_factor": 1.0,
                "full_attention_interval": 1,
                "mtp_num_hidden_layers": 0,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_conv_kernel_dim": 4,
            },
            fixed={"use_sliding_window": False},
            gate_flags={"headwise_attn_output_gate": "headwise", "elementwise_attn_output_gate": "elementwise"},
        ),
    )
}
WRAPPERS = {family.wrapper: family for family in FAMILIES.values() if family.wrapper}

# Ignored keys: they do not change the mathematics. They are kept and written back.
_BYSTANDERS = """
    architectures transformers_version torch_dtype dtype use_cache output_router_logits output_hidden_states
    output_attentions return_dict return_dict_in_generate chunk_size_feed_forward is_encoder_decoder is_decoder
    add_cross_attention problem_type id2label label2id _name_or_path name_or_path attn_implementation
    _attn_implementation sliding_window max_window_layers torchscript tie_encoder_decoder task_specific_params
    tokenizer_class prefix router_jitter_noise attention_dropout mrope_section mrope_interleaved quantization_config
    finetuning_task use_bfloat16 pruned_heads cross_attention_hidden_size sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens auto_map image_token_id video_token_id
    vision_start_token_id vision_end_token_id language_model_only comment description license model_name base_model
    use_sliding_window
"""
IRRELEVANT = frozenset(_BYSTANDERS.split())
_NOTE_PREFIXES = ("_", "unsloth_", "transformers_")  # keys that tools write about themselves


# Keys of a wrapper config that describe the whole model. Token ids there are not read.
AROUND = frozenset(("model_type", "vision_config", "bos_token_id", "pad_token_id"))
EITHER = ("tie_word_embeddings", "quantization_config", "eos_token_id")  # valid at either level
ROPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")  # keys of a RoPE dictionary


def ignored_keys(key: str, value: Any) -> bool:
    """Whether an unknown key cannot change the mathematics: an ignored key, a tool's note, an empty or false value."""
    off = value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
    return key in IRRELEVANT or key.startswith(_NOTE_PREFIXES) or off


def unwrap(values: Mapping[str, Any]) -> tuple[Family, dict[str, Any], dict[str, Any]]:
    """Split a config.json into its family, the keys of the text model and those of the wrapper config (may be empty).

    Raises: ValueError for an unsupported model_type, or values that contradict each other.
    """
    if "model_type" not in values:
        raise ValueError("config.json has no model_type: give a model's configuration.")
    kind = values["model_type"]
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind], {key: value for key, value in values.items() if key != "model_type"}, {}
    if not isinstance(kind, str) or kind not in WRAPPERS:
        known = ", ".join([*FAMILIES, *WRAPPERS])
        raise ValueError(f"config.json has model_type {kind!r}, which is not supported: supported are {known}.")
    family, text = WRAPPERS[kind], values.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(
            f"config.json of model_type {kind!r} has no text_config, which must give the language model's sizes."
        )
    if text.get("model_type", family.model_type) not in (family.model_type, kind):
        raise ValueError(f"text_config has model_type {text['model_type']!r}, which {kind!r} cannot contain.")
    wrapper_config = {key: value for key, value in values.items() if key != "text_config"}
    inner = {key: value for key, value in text.items() if key != "model_type"}
    for key in EITHER:
        if wrapper_config.get(key) is None:
            continue
        if inner.get(key) is None:
            inner[key] = wrapper_config[key]
        elif inner[key] != wrapper_config[key]:
            raise ValueError(
                f"config.json gives {key} twice: {inner[key]} in text_config, {wrapper_config[key]} outside it."
            )
    return family, inner, wrapper_config


def check_beside(
    wrapper_config: Mapping[str, Any], fields: Collection[str], changes: Callable[[str, Any], bool]
) -> None:
    """Refuse keys outside text_config that would change the text model.

    Args:
        wrapper_config: the keys outside text_config.
        fields: field names of the configuration.
        changes: whether this key and value would change the text model.
    Raises: ValueError for such a key, or for an unknown key that may change the computation.
    """
    spelt = {"hidden_act", "qkv_bias", "rope_parameters", "rope_scaling", *ROPE}
    for family in FAMILIES.values():
        spelt |= family.fixed.keys() | family.gate_flags.keys()
    for key, value in wrapper_config.items():
        if value is None or key in AROUND or key in EITHER:
            continue
        if (key in fields or key in spelt) and key not in IRRELEVANT:
            if changes(key, value):
                raise ValueError(f"config.json has {key} outside text_config, where it is not read: move it inside.")
        elif not ignored_keys(key, value):
            raise ValueError(
                f"config.json has an unknown key outside text_config that may change the computation: {key}. "
                "Remove it if it does not."
            )


def read(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys of a text model's config.json to our field names, check them and add the implied ones.

    Raises: ValueError for a missing, unsupported or contradicting key.
    """
    values = dict(values)
    for key, expected in {"hidden_act": "silu", **family.fixed}.items():
        value = values.pop(key, None)
        if value is not None and value != expected and not (expected == "swish" and value == "silu"):
            raise ValueError(f"config.json has {key} {value!r}; only {expected!r} is supported.")
    read_rope(values)
    _read_gate(family, values)
    if family.model_type == "qwen3":
        if (bias := values.pop("qkv_bias", None)) is not None:  # the study's name for a bias in all four projections
            if values.get("attention_bias") and not bias:
                raise ValueError(
                    f"config.json has attention_bias {values['attention_bias']} and qkv_bias {bias}: make them equal."
                )
            values["attention_bias"] = bias
        if values.get("head_dim") is None and isinstance(values.get("hidden_size"), int):
            heads = values.get("num_attention_heads")
            if isinstance(heads, int) and heads > 0 and values["hidden_size"] % heads == 0:
                values["head_dim"] = values["hidden_size"] // heads
    kinds = {key: values[key] for key in ("dtype", "torch_dtype") if values.get(key) is not None}
    if len(set(map(str, kinds.values()))) > 1:
        raise ValueError(f"config.json gives two dtypes: {' and '.join(f'{k} {v}' for k, v in kinds.items())}.")
    if missing := [key for key in family.required if values.get(key) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}.")
    return {**family.implied, **{k: v for k, v in values.items() if v is not None or k not in family.implied}}


def _read_gate(family: Family, values: dict[str, Any]) -> None:
    given = {flag: values.pop(flag) for flag in family.gate_flags if values.get(flag) is not None}
    if wrong := [flag for flag, value in given.items() if not isinstance(value, bool)]:
        raise ValueError(f"{wrong[0]} must be true or false, got {given[wrong[0]]!r}.")
    kinds = [family.gate_flags[flag] for flag, value in given.items() if value]
    if len(kinds) > 1:
        raise ValueError(f"config.json sets both {' and '.join(given)} to true: set one of them only.")
    if given:
        said = kinds[0] if kinds else "none"
        gate = values.get("attention_gate")
        if gate is not None and gate != said:
            raise ValueError(f"config.json has attention_gate {gate!r}, but {' and '.join(given)} give {said!r}.")
        values["attention_gate"] = said


def read_rope(values: dict[str, Any]) -> None:
    """Merge the old keys (rope_theta, rope_scaling) with the new one (rope_parameters)."""
    spelt = {name: values.pop(name, None) for name in ("rope_parameters", "rope_scaling")}
    found: list[Yarn] = []
    for name, given in spelt.items():
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must be a dictionary, got {given!r}.")
        given = {key: value for key, value in given.items() if value is not None}
        old, new = given.pop("type", None), given.pop("rope_type", None)
        if old and new and old != new:
            raise ValueError(f"config.json gives the RoPE type twice in {name}: {old!r} and {new!r}.")
        kind = new or old or "default"
        if kind == "yarn":
            found.append(read_yarn(given, values))
        elif kind not in ("default", "mrope"):  # mrope: on text, its three positions are all the token's position
            raise ValueError(f"config.json asks for {kind!r} RoPE in {name}; supported are 'default' and 'yarn'.")
        for key, value in given.items():
            if key not in ROPE and (key in IRRELEVANT or not ignored_keys(key, value)):
                raise ValueError(
                    f"config.json has an unknown key in {name}: {key}. Remove it if it does not change the computation."
                )
            if values.get(key) is not None and values[key] != value:
                raise ValueError(f"config.json gives {key} twice: {values[key]} and {value}.")
            if key in ROPE:
                values[key] = value
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"config.json gives YaRN twice: {found[0]} in rope_parameters, {found[1]} in rope_scaling.")
    if found:
        values["rope_scaling"] = found[0]


def read_yarn(given: dict[str, Any], values: Mapping[str, Any]) -> Yarn:
    """Remove YaRN's values from a RoPE dictionary and return them; missing ones are derived as in transformers."""
    kinds = {f.name: f.type for f in fields(Yarn)} | {"factor": float, "attention_factor": float}
    taken = {name: given.pop(name) for name in [*kinds, "mscale", "mscale_all_dim"] if given.get(name) is not None}
    longest = values.get("max_position_embeddings")
    taken.setdefault("original_max_position_embeddings", longest)
    if (
        "factor" not in taken
        and isinstance(longest, int)
        and isinstance(taken["original_max_position_embeddings"], int)
    ):
        taken["factor"] = longest / max(taken["original_max_position_embeddings"], 1)
    scales = [typed(name, float, taken.pop(name, 0.0)) for name in ("mscale", "mscale_all_dim")]
    numbers = {name: typed(name, kinds[name], value) for name, value in taken.items()}
    if all(scales) and "attention_factor" not in numbers:
        over, under = (0.1 * scale * math.log(max(numbers["factor"], 1.0)) + 1.0 for scale in scales)
        numbers["attention_factor"] = over / under
    return Yarn(**numbers)


def with_yarn(written: dict[str, Any], yarn: Yarn) -> dict[str, Any]:
    """The contents of a config.json with YaRN added."""
    spelt = {"rope_type": "yarn", **{k: v for k, v in asdict(yarn).items() if v != getattr(Yarn, k, None)}}
    if "rope_parameters" in written:
        return {**written, "rope_parameters": written["rope_parameters"] | spelt}
    return {**written, "rope_scaling": spelt}


def write(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `read`: all fields, including `extra`, under the family's keys."""
    extra = dict(values.pop("extra"))
    values.pop("rope_scaling")  # `with_yarn` adds it
    values = {k: v for k, v in values.items() if k not in family.implied or v != family.implied[k]}
    extra = {k: v for k, v in extra.items() if k not in family.implied or k not in values}
    # Inference engines choose their code by the architecture's name: a variant needs a name that they do not know.
    variant = values.keys() & RELEASED.keys() or values.get("attention_gate") == "head_shared"
    architecture = f"{family.architecture}Variant" if variant else family.architecture
    extra |= {"architectures": [architecture]} if variant else {}
    written: dict[str, Any] = {"architectures": [architecture], "model_type": family.model_type}
    written |= {"hidden_act": "silu", **family.fixed, **values}
    gate = values.get("attention_gate", family.implied["attention_gate"])
    elsewhere = any(key.startswith("attention_gate_") for key in values)  # the flags imply a sigmoid gate at G1
    if not elsewhere and (gate == "none" or gate in family.gate_flags.values()):
        written |= {flag: gate == kind for flag, kind in family.gate_flags.items()}
        if family.gate_flags:
            written.pop("attention_gate", None)
    if "linear_output_gate" in values:
        written.pop("output_gate_type", None)
    mrope = {key: extra.pop(key) for key in ("mrope_section", "mrope_interleaved") if key in extra}
    if family.rope_parameters:
        rope = {key: written.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in written}
        written["rope_parameters"] = {"rope_type": "default", **rope, **mrope}
    else:
        written |= {"rope_scaling": None, **mrope}
    if family.model_type == "qwen3":
        written["qkv_bias"] = written["attention_bias"]
    return written | extra
