"""The one configuration type: what a checkpoint's config.json says, under its own names."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

LAYER_TYPES = ("linear_attention", "full_attention")

# Keys of released config.json files that do not change the mathematics. They are kept and written back.
IRRELEVANT = frozenset(
    [
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "output_router_logits",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "_name_or_path",
        "attn_implementation",
        "_attn_implementation",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "torchscript",
        "tie_encoder_decoder",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "router_jitter_noise",
        "attention_dropout",
    ]
)
# Keys that would change the mathematics if they had another value than the one here.
FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "model_type": "qwen3_next"}
# A size that is not given is not guessed: the defaults of different readers differ.
REQUIRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "rms_norm_eps",
    "rope_theta",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of a model. Field names are those of the released config.json, defaults Qwen3-Next-80B-A3B's.

    Not in a config.json: `mtp_num_hidden_layers` (found from the tensors of a checkpoint), `router_z_loss_coef` and
    `mtp_loss_coef` (weights of losses in training), and `extra` (harmless keys, kept to be written back).
    Raises: ValueError, on construction, for sizes that contradict each other.
    """

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

    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25

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
    mtp_loss_coef: float = 0.1

    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("layer_types", "mlp_only_layers"):
            set_field(self, name, tuple(getattr(self, name)))
        if isinstance(self.eos_token_id, list):
            set_field(self, "eos_token_id", tuple(self.eos_token_id))
        if not self.layer_types and self.full_attention_interval > 0:
            types = (LAYER_TYPES[(i + 1) % self.full_attention_interval == 0] for i in range(self.num_hidden_layers))
            set_field(self, "layer_types", tuple(types))
        self._check()

    def _check(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in ("mtp_num_hidden_layers", "num_experts", "full_attention_interval") else 1
            if f.type is int and value < least:
                raise ValueError(f"{f.name} must be at least {least}, got {value}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers and num_hidden_layers is {self.num_hidden_layers}: "
                "make them equal, or leave layer_types out."
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types has {unknown}: this model knows {' and '.join(LAYER_TYPES)}.")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many} ({getattr(self, many)}) must be a multiple of {few} ({getattr(self, few)}).")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts: choose fewer."
            )
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotated dimensions: make it an even number from 2 to head_dim."
            )
        if self.mtp_num_hidden_layers > 1:
            raise ValueError("mtp_num_hidden_layers is 0 or 1: Qwen3-Next has one MTP layer, applied repeatedly.")
        if bad := [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]:
            raise ValueError(f"mlp_only_layers names layers {bad} of a model with {self.num_hidden_layers}.")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and chosen

    def bytes_per_token(self, kv_bytes: int = 2) -> int:
        """Bytes of KV cache that each token of context adds, the MTP layer left out."""
        return self.layer_types.count("full_attention") * 2 * self.num_key_value_heads * self.head_dim * kv_bytes

    def bytes_per_sequence(self, conv_bytes: int = 2) -> int:
        """Bytes of recurrent (fp32) and convolution state of one sequence, whatever its length."""
        memory = self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim * 4
        conv = self.conv_channels * (self.linear_conv_kernel_dim - 1) * conv_bytes
        return self.layer_types.count("linear_attention") * (memory + conv)

    @property
    def conv_channels(self) -> int:
        """Channels of a Gated DeltaNet layer's convolution: all q, all k, all v."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids of eos_token_id, which may be none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed. A new num_hidden_layers or interval makes the layer types anew."""
        if changes.keys() & {"num_hidden_layers", "full_attention_interval"}:
            changes.setdefault("layer_types", ())
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a qwen3_next config.json, as released or as transformers 5 writes it.

        Raises: ValueError for another model_type, a missing size, an unknown key or contradicting values.
        """
        values = dict(values)
        if "model_type" not in values:
            raise ValueError("config.json has no model_type: this does not look like a model's configuration.")
        for key, expected in FIXED.items():
            if (value := values.pop(key, expected)) != expected:
                raise ValueError(f"config.json has {key} {value!r}; only {expected!r} is supported.")
        _read_rope(values)
        values = {key: value for key, value in values.items() if value is not None}
        if missing := [key for key in REQUIRED if key not in values]:
            raise ValueError(f"config.json lacks {', '.join(missing)}.")
        known = {f.name for f in fields(cls)} - {"extra"}
        unknown = sorted(values.keys() - known - IRRELEVANT)
        if unknown:
            raise ValueError(
                f"config.json has {', '.join(unknown)}, which this model does not know and so cannot honour. "
                "Remove what does not matter to the mathematics."
            )
        extra = {key: values.pop(key) for key in list(values) if key in IRRELEVANT}
        for f in fields(cls):
            if f.name in values:
                values[f.name] = _typed(f.name, f.type, values[f.name])
        return cls(**values, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json in the released form; `from_dict` reads them back to an equal configuration."""
        values: dict[str, Any] = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
        values |= {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None}
        for f in fields(self):
            value = getattr(self, f.name)
            values[f.name] = list(value) if isinstance(value, tuple) else value
        return values | values.pop("extra")

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json, or the one in a folder. Raises: ValueError that names the file."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: a model folder holds a config.json.") from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a model configuration: {error}.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _typed(name: str, kind: Any, value: Any) -> Any:
    """A value of config.json as its field's type; JSON writes 1e7 as 10000000, and lists for tuples."""
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and kind not in (bool, float, Sequence[str], Sequence[int]):
        return value
    item = str if kind == Sequence[str] else int
    listed = isinstance(value, (list, tuple)) and kind not in (bool, float, int, int | None)
    if listed and all(isinstance(x, item) and not isinstance(x, bool) for x in value):
        return tuple(value)
    raise ValueError(f"{name} cannot be {value!r}.")


def _read_rope(values: dict[str, Any]) -> None:
    """Merge the old keys (rope_theta, rope_scaling) with the new one (rope_parameters)."""
    for name in ("rope_parameters", "rope_scaling"):
        given = dict(values.pop(name, None) or {})
        kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
        if kind != "default":
            raise ValueError(f"config.json asks for {kind!r} RoPE in {name}; only the default one is supported yet.")
        for key, value in given.items():
            if values.get(key, value) != value:
                raise ValueError(f"config.json gives {key} twice, {values[key]} and {value}.")
            values[key] = value
