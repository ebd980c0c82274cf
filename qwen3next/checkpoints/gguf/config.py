"""A model's configuration from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qwen3next.checkpoints.gguf.header import Header
from qwen3next.config import ModelConfig

MODEL_TYPES = {"qwen3next": "qwen3_next", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text"}
SIZES = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_key_head_dim": "ssm.state_size",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
}
EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def read_config(header: Header) -> ModelConfig:
    """The configuration that the metadata and the tensors' names give.

    Raises: ValueError for another architecture, and for missing or unsupported metadata.
    """
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise ValueError(f"its architecture {arch!r} is not supported: {', '.join(MODEL_TYPES)} are.")
    given = _Metadata(header.metadata, arch)
    values: dict[str, Any] = {"model_type": MODEL_TYPES[arch]}
    values |= {name: given.one(key) for name, key in SIZES.items()}
    if arch != "qwen35":
        values |= {name: given.one(key) for name, key in EXPERTS.items()}
    # A model without dense layers may leave it out; nothing then depends on it.
    values["intermediate_size"] = given.get("feed_forward_length") or values.get("moe_intermediate_size")
    mtp = given.get("nextn_predict_layers") or 0
    layers = given.whole("block_count") - mtp
    values["full_attention_interval"] = given.get("full_attention_interval")
    values["num_hidden_layers"], values["mtp_num_hidden_layers"] = layers, mtp
    values["layer_types"] = [_layer_type(header, i) for i in range(min(layers, len(header.tensors)))]
    values["linear_value_head_dim"] = given.whole("ssm.inner_size") // max(values["linear_num_value_heads"], 1)
    values["partial_rotary_factor"] = given.whole("rope.dimension_count") / max(values["head_dim"], 1)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it lacks token_embd.weight.")
    values["vocab_size"] = embedding.shape[0]
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    values |= {name: header.metadata.get(f"tokenizer.ggml.{key}") for name, key in TOKENS.items()}
    values["torch_dtype"] = str(_dtype(header)).removeprefix("torch.")
    given.refuse()
    if yarn := given.yarn():
        values["rope_scaling"] = yarn
    return ModelConfig.from_dict({key: value for key, value in values.items() if value is not None})


class _Metadata:
    def __init__(self, values: Mapping[str, Any], arch: str):
        self.values, self.arch = values, arch

    def get(self, key: str) -> Any:
        return self.values.get(f"{self.arch}.{key}")

    def one(self, key: str) -> Any:
        """A required number; an array, one entry a layer, stands for its only value besides 0."""
        value = self.get(key)
        if isinstance(value, list):
            found = set(value) - {0}
            if len(found) != 1:
                raise ValueError(f"its {self.arch}.{key} differs between layers, which is not supported.")
            (value,) = found
        if value is None:
            raise ValueError(f"its metadata lacks {self.arch}.{key}.")
        # A number in fp32 stands for the decimal that it was written from: 1e-6, not 9.99999997e-07.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def whole(self, key: str) -> int:
        value = self.one(key)
        if type(value) is not int:
            raise ValueError(f"its {self.arch}.{key} must be an integer, got {value!r}.")
        return value

    def refuse(self) -> None:
        """Raises: ValueError for metadata that asks for another computation than the family's."""
        if (length := self.get("attention.value_length")) not in (None, self.get("attention.key_length")):
            raise ValueError(f"its {self.arch}.attention.value_length {length} differs from key_length.")
        for key, usual in (
            ("expert_gating_func", 1),
            ("expert_weights_norm", True),
            ("expert_weights_scale", 1.0),
            ("expert_group_count", 1),
        ):
            if self.get(key) not in (None, usual, 0.0 if key == "expert_weights_scale" else usual):
                raise ValueError(f"its {self.arch}.{key} is {self.get(key)!r}; only {usual!r} is supported.")

    def yarn(self) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type")
        if kind in (None, "none"):
            return None
        if kind != "yarn":
            raise ValueError(f"its RoPE scaling {kind!r} is not supported: 'yarn' is.")
        length = self.whole("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "factor": self.one("rope.scaling.factor"),
            "original_max_position_embeddings": length,
        }


def _layer_type(header: Header, i: int) -> str:
    return "full_attention" if f"blk.{i}.attn_q.weight" in header.tensors else "linear_attention"


def _dtype(header: Header) -> torch.dtype:
    """The dtype to compute in: that of most bytes of matrices, or bfloat16 for blocks."""
    held: dict[torch.dtype, int] = {}
    for packed in header.tensors.values():
        if len(packed.shape) > 1 and packed.shape[0] > 1:
            held[packed.kind.dtype] = held.get(packed.kind.dtype, 0) + packed.stored.nbytes
    most = max(held, key=lambda dtype: held[dtype], default=torch.bfloat16)
    return torch.bfloat16 if most == torch.uint8 else most
