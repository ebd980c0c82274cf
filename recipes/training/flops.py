"""Floating-point operations of a training step by a counted formula, and the share of a device's peak (MFU).

A product of (m, k) and (k, n) counts 2 m k n. Forward and backward of a product with a weight are three such products.
Counted are products with weights, attention's scores and sums over the mean causal span, and the delta rule in chunks.
Norms, activations, softmax, router's sorting and the optimizer are left out, and so is what recomputation adds: MFU is
about useful work.
"""

import torch

import qwen3next as q

CHUNK = 64  # tokens of the delta rule's chunks
# Dense bf16 FLOP/s of the data sheets, by a part of the device's name; without sparsity.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12, "A10G": 70e12}


def forward_flops(config: q.ModelConfig, window: int) -> dict[str, float]:
    """Operations of a token in a forward pass over documents of `window` tokens, by part of the model."""
    c, parts = config, dict.fromkeys(("linear_attention", "full_attention", "feed_forward", "mtp", "head"), 0.0)
    for layer, kind in enumerate(c.layer_types):
        parts[kind] += _linear_attention(c) if kind == "linear_attention" else _full_attention(c, window)
        parts["feed_forward"] += _feed_forward(c, sparse=c.is_sparse(layer))
    parts["head"] = 2.0 * c.hidden_size * c.vocab_size
    if c.mtp_num_hidden_layers and c.mtp_loss_coef:
        block = _full_attention(c, window) + _feed_forward(c, sparse=c.num_experts > 0)
        parts["mtp"] = 4.0 * c.hidden_size**2 + block + parts["head"]
    return parts


def training_flops(config: q.ModelConfig, window: int) -> float:
    """Operations of a token in a training step: forward, and twice that for gradients."""
    return 3 * sum(forward_flops(config, window).values())


def _full_attention(c: q.ModelConfig, window: int) -> float:
    inner, gate = c.num_attention_heads * c.head_dim, {"elementwise": c.head_dim, "headwise": 1}
    gate_rows = c.num_attention_heads * gate.get(c.attention_gate, 0)
    rows = inner + gate_rows + 2 * c.num_key_value_heads * c.head_dim
    return 2.0 * c.hidden_size * (rows + inner) + 2.0 * inner * window  # a query sees window / 2 keys on average, twice


def _linear_attention(c: q.ModelConfig) -> float:
    keys, values = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    weights = 2.0 * c.hidden_size * (2 * keys + 3 * values + 2 * c.linear_num_value_heads)
    conv = 2.0 * c.conv_channels * c.conv_kernel_size
    k, v = c.linear_key_head_dim, c.linear_value_head_dim
    # Of a token and head: k kᵀ and q kᵀ in the chunk, the triangular solve for its rows, three products with the state.
    head = 4 * CHUNK * k + CHUNK * CHUNK / 3 + 2 * CHUNK * (k + v) + 2 * CHUNK * v + 6 * k * v
    return weights + conv + c.linear_num_value_heads * head


def _feed_forward(c: q.ModelConfig, *, sparse: bool) -> float:
    if not sparse:
        return 6.0 * c.hidden_size * c.intermediate_size
    used = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
    return 6.0 * c.hidden_size * used + 2.0 * c.hidden_size * c.num_experts


def peak_flops(device: torch.device) -> float | None:
    """The peak of a CUDA device in bf16, where its name is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
