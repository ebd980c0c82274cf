"""Named configurations. A preset is a function whose arguments change fields: `presets.tiny(vocab_size=1000)`.

Parameter counts exclude the MTP layer; docs/architecture.md lists all of them.
"""

from collections.abc import Callable
from typing import Any

from qwen3next.config import ModelConfig
from qwen3next.study import PRESETS as STUDY

_SMALL: dict[str, Any] = {"partial_rotary_factor": 0.25, "rope_theta": 1e4, "max_position_embeddings": 32_768}


def tiny(**changes: Any) -> ModelConfig:
    """2.1M parameters, 0.9M active; trains in minutes on two CPU cores. Tokens are bytes."""
    values = _SMALL | {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "router_aux_loss_coef": 1e-2,  # with 1e-3, one expert of a layer takes every token after 500 steps
        "eos_token_id": 256,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


def small(**changes: Any) -> ModelConfig:
    """28.7M parameters, 12.2M active."""
    values = _SMALL | {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


def medium(**changes: Any) -> ModelConfig:
    """122.7M parameters, 34.6M active; the size of the CPU benchmarks."""
    values = _SMALL | {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


def large(**changes: Any) -> ModelConfig:
    """1.51B parameters, 0.42B active, with the vocabulary and head dimensions of the released model."""
    values: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 384,
        "shared_expert_intermediate_size": 384,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


def nano_60m(**changes: Any) -> ModelConfig:
    """56.8M parameters, 28.5M active."""
    values = _SMALL | {
        "vocab_size": 16_384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 192,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


def base_350m_a100m(**changes: Any) -> ModelConfig:
    """344.8M parameters, 97.1M active."""
    values = _SMALL | {
        "vocab_size": 32_768,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 12,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 320,
        "shared_expert_intermediate_size": 320,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


def qwen3_next_80b_a3b(**changes: Any) -> ModelConfig:
    """Qwen3-Next-80B-A3B as released: 79.7B parameters, 3.9B active including embedding and head."""
    return ModelConfig(**({"bos_token_id": 151_643, "eos_token_id": 151_645} | changes))


def qwen3_coder_next(**changes: Any) -> ModelConfig:
    """Qwen3-Coder-Next: Qwen3-Next-80B-A3B's sizes with another RoPE base."""
    return qwen3_next_80b_a3b(**({"rope_theta": 5e6} | changes))


_QWEN3_5: dict[str, Any] = {"vocab_size": 248_320, "eos_token_id": 248_044}


def qwen3_5_27b(**changes: Any) -> ModelConfig:
    """Qwen3.5-27B, Qwen3.6-27B and Qwen3.8-27B as released, without their vision towers: dense."""
    values = _QWEN3_5 | {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17_408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
        "num_experts": 0,
    }
    return ModelConfig(**(values | changes))


def qwen3_5_35b_a3b(**changes: Any) -> ModelConfig:
    """Qwen3.5-35B-A3B and Qwen3.6-35B-A3B as released, without their vision towers."""
    values = _QWEN3_5 | {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 40,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    }
    return ModelConfig(**(values | changes))


RELEASED = (qwen3_next_80b_a3b, qwen3_coder_next, qwen3_5_27b, qwen3_5_35b_a3b)
ALL = {f.__name__: f for f in (tiny, small, medium, large, nano_60m, base_350m_a100m, *RELEASED)}


def named(name: str) -> Callable[..., ModelConfig]:
    """The preset of that name: one of `ALL`, or a row of the gated-attention study (`study.PRESETS`).

    Raises: ValueError for an unknown name.
    """
    found = ALL.get(name) or STUDY.get(name)
    if found is None:
        raise ValueError(f"There is no preset {name!r}: choose {', '.join(ALL)}, or a row such as moe_15b_baseline.")
    return found
