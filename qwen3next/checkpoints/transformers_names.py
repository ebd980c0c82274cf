"""Configurations and tensor names of transformers' classes, and of ours under its names (qwen3next/hf.py)."""

from collections.abc import Collection
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)

from qwen3next.checkpoints.state_dict_adapter import Layout, TensorSpec, tensor_specs
from qwen3next.config import ModelConfig
from qwen3next.families import FAMILIES, ROPE


def model_config(config: PreTrainedConfig) -> ModelConfig:
    """Our configuration from transformers'. Raises: ValueError for values that this model does not support."""
    family, values = FAMILIES[config.model_type], config.to_dict()
    known = {f.name for f in fields(ModelConfig)} - {"extra", "wrapper_config", "model_type"}
    known |= {"rope_parameters", "hidden_act", "qkv_bias"} | family.fixed.keys() | family.gate_flags.keys()
    kept = {"mtp_num_hidden_layers": 0} | {key: values[key] for key in known & values.keys()}
    rope = dict(kept.pop("rope_parameters", None) or {})
    if rope.get("rope_type") != "yarn":  # what other types add is transformers' to read
        rope = {key: x for key, x in rope.items() if key in ROPE} | {"rope_type": "default"}
    kept["rope_parameters"] = rope
    return ModelConfig.from_dict({"model_type": config.model_type, **kept})


ROPE_TYPES = ("default", "yarn")  # of this model; the others are computed by transformers
OURS = ("linear_attn.conv_weight", "mlp.router.weight", "self_attn.gate_proj.weight")  # names of no released tensor


@lru_cache(maxsize=4)
def _specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """The released tensors by the first of their parts here; experts in two tensors a layer."""
    layout = replace(Layout.released(config), fused_experts=True, fused_mtp_experts=True)
    return {spec.places[0].name: spec for spec in tensor_specs(config, layout)}


class Released(ConversionOps):
    """Splits a released tensor into the parameters that it holds, or merges them again."""

    def __init__(self, *, split: bool = True):
        self.split = split

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        config: PreTrainedConfig,
        **_options: Any,
    ) -> dict[str, Tensor]:
        given = {key: x[0] if isinstance(x, list) else x for key, x in input_dict.items()}
        name, parts = full_layer_name, target_patterns
        if not self.split:
            name, parts = name.replace(target_patterns[0], source_patterns[0]), source_patterns
        name = name.removeprefix("model.")
        name = f"blocks.{name.removeprefix('layers.')}" if name.startswith("layers.") else name
        own = model_config(config)
        spec = _specs(own.replace(mtp_num_hidden_layers=1) if name.startswith("mtp.") else own)[name]
        if self.split:
            return dict(zip(parts, (x.contiguous() for x in spec.split(*given.values())), strict=False))
        return {target_patterns[0]: spec.merge(*(given[part] for part in parts if part in given))}

    @property
    def reverse_op(self) -> ConversionOps:
        return Released(split=not self.split)


def conversions(config: PreTrainedConfig, names: Collection[str] = ()) -> list[WeightRenaming | WeightConverter]:
    """How the tensors of a checkpoint become those of qwen3next/hf.py; transformers reverses it to save.

    Args:
        names: the tensors of the checkpoint; without any, it is arranged as released.
    """
    own = model_config(config)
    layout, gdn = Layout.found(own, names), "linear_attn."
    parts: dict[str, list[str]] = {f"{gdn}conv1d.weight": [f"{gdn}conv_weight"]}
    for x in ("weight", "bias") if own.attention_bias else ("weight",):
        parts[f"self_attn.q_proj.{x}"] = [f"self_attn.q_proj.{x}", f"self_attn.gate_proj.{x}"]
    if not layout.flat_projections:
        parts[f"{gdn}in_proj_qkvz.weight"] = [f"{gdn}in_proj_qkv.weight", f"{gdn}in_proj_z.weight"]
        parts[f"{gdn}in_proj_ba.weight"] = [f"{gdn}in_proj_b.weight", f"{gdn}in_proj_a.weight"]
    mtp = bool(own.mtp_num_hidden_layers) or any(name.startswith("mtp.") for name in names)
    return [
        PrefixChange(prefix_to_remove="language_model", model_prefix="model"),
        WeightRenaming("mlp.gate.weight", "mlp.router.weight"),
        *([WeightRenaming("mtp.layers.", "mtp.blocks.")] if mtp else []),
        *(WeightConverter(released, ours, [Released()]) for released, ours in parts.items()),
        *_experts("mtp.blocks.0.mlp.experts" if layout.fused_experts else "mlp.experts"),
    ]


def _experts(prefix: str) -> list[WeightConverter]:
    """Three tensors an expert, where a checkpoint has them so, to two for all."""
    gate_up = [f"{prefix}.*.{name}.weight" for name in ("gate_proj", "up_proj")]
    return [
        WeightConverter(gate_up, f"{prefix}.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter(f"{prefix}.*.down_proj.weight", f"{prefix}.down_proj", [MergeModulelist(dim=0)]),
    ]
