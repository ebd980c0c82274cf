"""The token mixers that a configuration asks for."""

from typing import Any

from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.variants.attention import AttentionVariant
from layers.variants.deltanet import DeltaNetVariant
from qwen3next.config import ModelConfig


def linear_attention(c: ModelConfig) -> GatedDeltaNet:
    """Gated DeltaNet, or the variant of it that c chooses."""
    sizes: dict[str, Any] = {
        "key_heads": c.linear_num_key_heads,
        "value_heads": c.linear_num_value_heads,
        "key_dim": c.linear_key_head_dim,
        "value_dim": c.linear_value_head_dim,
        "conv_kernel_size": c.linear_conv_kernel_dim,
        "eps": c.rms_norm_eps,
    }
    if not c.chosen("linear_"):
        return GatedDeltaNet(c.hidden_size, **sizes)
    return DeltaNetVariant(
        c.hidden_size,
        **sizes,
        output_gate=c.linear_output_gate,
        conv=c.linear_use_conv,
        output_norm=c.linear_output_norm,
        decay=c.linear_decay,
        delta=c.linear_delta,
        negative_eigenvalues=c.linear_negative_eigenvalues,
    )


def softmax_attention(c: ModelConfig) -> GatedAttention:
    """Gated attention, or the variant of it that c chooses."""
    shared: dict[str, Any] = {
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "eps": c.rms_norm_eps,
        "gate": c.attention_gate,
        "qk_norm": c.use_qk_norm,
        "zero_centred": c.zero_centred_norms,
        "bias": c.attention_bias,
    }
    if not c.has_attention_variant:
        return GatedAttention(c.hidden_size, **shared)
    return AttentionVariant(
        c.hidden_size,
        **shared,
        position=c.attention_gate_position,
        form=c.attention_gate_form,
        activation=c.attention_gate_activation,
        source=c.attention_gate_input,
        output_norm=c.attention_output_norm,
        output_activation=c.attention_output_activation,
        switch=c.attention_switch,
        switch_experts=c.attention_switch_experts,
        switch_top_k=c.attention_switch_top_k,
    )
