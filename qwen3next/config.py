"""The configuration type of every model: the fields of a checkpoint's config.json, under their own names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from layers.deprecation import renamed_attribute
from layers.rope import Yarn
from qwen3next.families import FAMILIES, Family, check_beside, ignored_keys, read, unwrap, with_yarn, write
from qwen3next.files.json_files import read_object, typed
from qwen3next.variants import Variants

LAYER_TYPES = ("linear_attention", "full_attention")
MAY_BE_ZERO = (
    "mtp_num_hidden_layers",
    "num_experts",
    "shared_expert_intermediate_size",
    "full_attention_interval",
)
MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000  # a larger number is a mistake; building lists of that length would hang


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Variants):
    """Sizes and choices of a model. Field names are those of the released config.json, defaults Qwen3-Next-80B-A3B's.

    These fields are not in a released config.json: the fields of `Variants`; `attention_gate` and `zero_centred_norms`
    (set there by the model_type or by flags of other names); `router_z_loss_coef`, `logit_z_loss_coef` and
    `mtp_loss_coef` (weights of training losses); `extra` (ignored keys, kept and written back); `wrapper_config` (the
    keys around a nested text_config, such as the vision tower's sizes). Loading a checkpoint sets
    `mtp_num_hidden_layers` from its tensors.
    Raises: ValueError, on construction, for sizes that contradict each other.
    """

    model_type: str = "qwen3_next"  # selects the checkpoint layout only; the other fields define the mathematics
    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 48
    layer_types: Sequence[str] = ()  # empty: every full_attention_interval-th layer is softmax attention
    full_attention_interval: int = 4
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262_144
    initializer_range: float = 0.02
    zero_centred_norms: bool = True  # scale is 1 + w, applied in fp32; if False, w, applied after the cast

    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25
    rope_scaling: Yarn | None = None
    attention_gate: str = "elementwise"  # or "headwise" (one scalar per head), "head_shared", "none"
    use_qk_norm: bool = True
    attention_bias: bool = False  # of q, k, v, o and the gate

    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4

    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: Sequence[int] = ()

    mtp_num_hidden_layers: int = 1
    router_aux_loss_coef: float = 1e-3
    router_z_loss_coef: float = 0.0
    logit_z_loss_coef: float = 0.0
    mtp_loss_coef: float = 0.1

    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    wrapper_config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("layer_types", "mlp_only_layers"):
            set_field(self, name, tuple(getattr(self, name)))
        if isinstance(self.eos_token_id, list):
            set_field(self, "eos_token_id", tuple(self.eos_token_id))
        if not self.layer_types and self.full_attention_interval > 0 and self.num_hidden_layers <= MOST_LAYERS:
            types = (LAYER_TYPES[(i + 1) % self.full_attention_interval == 0] for i in range(self.num_hidden_layers))
            set_field(self, "layer_types", tuple(types))
        self._check()

    def _check(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not supported: choose one of {', '.join(FAMILIES)}.")
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in MAY_BE_ZERO else 1
            if f.type is int and value < least:
                raise ValueError(f"{f.name} must be at least {least}, got {value}.")
            if f.type is float and not 0 <= value < math.inf:
                raise ValueError(f"{f.name} must be finite and not negative, got {value}.")
        self.check_variants(self.attention_gate)
        for name, most in (("num_hidden_layers", MOST_LAYERS), ("num_experts", MOST_EXPERTS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}.")
        if not self.rope_theta:
            raise ValueError("rope_theta must not be 0.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries and num_hidden_layers is {self.num_hidden_layers}: "
                "make them equal, or leave layer_types out."
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types has unknown types {unknown}: use {' and '.join(LAYER_TYPES)}.")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many} ({getattr(self, many)}) must be a multiple of {few} ({getattr(self, few)}).")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be 1 to num_experts ({self.num_experts}), got {self.num_experts_per_tok}."
            )
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, got {self.partial_rotary_factor}.")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotated dimensions: make it an even number from 2 to head_dim."
            )
        if self.mtp_num_hidden_layers > 1:
            raise ValueError("mtp_num_hidden_layers must be 0 or 1: Qwen3-Next has one MTP layer, applied repeatedly.")
        if bad := [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]:
            raise ValueError(f"mlp_only_layers has layers {bad}, but num_hidden_layers is {self.num_hidden_layers}.")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and chosen

    def bytes_per_token(self, kv_bytes: int = 2, *, mtp: bool = False) -> int:
        """Bytes of KV cache per token of context: in the main model, or in the MTP layer only if `mtp`.

        Args:
            kv_bytes: bytes per element. 1 means int8, which adds one fp32 scale per token and head.
        """
        head = self.head_dim * kv_bytes + (4 if kv_bytes == 1 else 0)
        layers = self.mtp_num_hidden_layers if mtp else self.layer_types.count("full_attention")
        return layers * 2 * self.num_key_value_heads * head

    def bytes_per_sequence(self, conv_bytes: int = 2) -> int:
        """Bytes of recurrent state (fp32) and conv state of one sequence; independent of its length."""
        memory = self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim * 4
        conv = self.conv_channels * (self.conv_kernel_size - 1) * conv_bytes
        return self.layer_types.count("linear_attention") * (memory + conv)

    @property
    def longest_context(self) -> int:
        """Longest supported context in tokens: max_position_embeddings, or more with YaRN."""
        yarn = self.rope_scaling
        extended = 0 if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, extended)

    @property
    def conv_channels(self) -> int:
        """Channels of a Gated DeltaNet layer's convolution: those of q, k and v together."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    conv_taps = renamed_attribute("conv_taps", "conv_kernel_size")
    outer = renamed_attribute("outer", "wrapper_config")

    @property
    def conv_kernel_size(self) -> int:
        """Kernel size of a Gated DeltaNet layer's causal convolution, in tokens; 1 without convolution."""
        return self.linear_conv_kernel_dim if self.linear_use_conv else 1

    @property
    def has_attention_variant(self) -> bool:
        """Whether the softmax layers differ from those of every released model."""
        return self.attention_gate == "head_shared" or bool(self.chosen("attention_"))

    @property
    def has_released_gate(self) -> bool:
        """Whether a checkpoint stores the gate's rows inside q_proj, as the released models do."""
        return self.attention_gate in ("elementwise", "headwise") and not self.chosen("attention_gate_")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids of eos_token_id: none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed. A new num_hidden_layers or full_attention_interval resets layer_types."""
        if changes.keys() & {"num_hidden_layers", "full_attention_interval"}:
            changes.setdefault("layer_types", ())
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a config.json of any supported model_type, as released or as transformers 5 writes it.

        Raises: ValueError for another model_type, a missing size, an unknown key or contradicting values.
        """
        family, text, wrapper_config = unwrap(values)
        config = cls._read(family, text, wrapper_config)
        if wrapper_config:
            names = {f.name for f in fields(cls)} - {"extra", "wrapper_config", "model_type"}

            def changes(key: str, value: Any) -> bool:
                if text.get(key) is not None:
                    return text[key] != value
                return cls._read(family, text | {key: value}, wrapper_config).replace(extra={}) != config.replace(
                    extra={}
                )

            check_beside(wrapper_config, names, changes)
        return config

    @classmethod
    def _read(cls, family: Family, text: dict[str, Any], wrapper_config: dict[str, Any]) -> "ModelConfig":
        # Keys that the file gives although the family implies them; `write` repeats them while the value is unchanged.
        spelt = {key: value for key, value in text.items() if key in family.implied and value is not None}
        text = read(family, text)
        known = {f.name: f.type for f in fields(cls) if f.name not in ("extra", "wrapper_config", "model_type")}
        if unknown := sorted(k for k, v in text.items() if k not in known and not ignored_keys(k, v)):
            raise ValueError(
                f"config.json has unknown keys that may change the computation: {', '.join(unknown)}. "
                "Remove those that do not change it."
            )
        extra = spelt | {key: text[key] for key in text if key not in known}
        given = {key: v for key, v in text.items() if key in known and v is not None}
        given = {key: v if isinstance(v, Yarn) else typed(key, known[key], v) for key, v in given.items()}
        return cls(model_type=family.model_type, extra=extra, wrapper_config=wrapper_config, **given)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json in the released form; `from_dict` turns them into an equal configuration."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("wrapper_config", "model_type")}
        text = write(FAMILIES[self.model_type], values)
        if self.rope_scaling is not None:
            text = with_yarn(text, self.rope_scaling)
        text = {key: list(value) if isinstance(value, tuple) else value for key, value in text.items()}
        if not self.wrapper_config:
            return text
        for key in ("architectures", "quantization_config"):
            if key in self.wrapper_config:
                text.pop(key, None)
        return {**self.wrapper_config, "text_config": text}

    def text_only(self) -> "ModelConfig":
        """The configuration of the language model alone, without the wrapper config of a vision tower."""
        kept = {key: self.wrapper_config[key] for key in ("torch_dtype", "dtype") if key in self.wrapper_config}
        return self.replace(wrapper_config={}, extra={**kept, **self.extra}) if self.wrapper_config else self

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json, or the one in a folder. Raises: ValueError that names the file."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise ValueError(f"{path} does not exist: give a config.json, or a folder that holds one.")
        values = read_object(path, "a model configuration")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
