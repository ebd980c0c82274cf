"""The work of a model's steps: floating-point operations of the matrix products, and bytes that must be read."""

from qwen3next.config import ModelConfig


def linear_weights(config: ModelConfig) -> int:
    """Number of weights that a token is multiplied with in all layers: chosen experts only, without the head."""
    c, total = config, 0
    for i, mixer in enumerate(c.layer_types):
        if mixer == "linear_attention":
            values = c.linear_num_value_heads * c.linear_value_head_dim
            total += c.hidden_size * (c.conv_channels + values + 2 * c.linear_num_value_heads) + values * c.hidden_size
        else:
            queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            gates = {"elementwise": queries, "headwise": c.num_attention_heads, "none": 0}[c.attention_gate]
            total += c.hidden_size * (queries + gates + 2 * keys) + queries * c.hidden_size
        if c.is_sparse(i):
            inner = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
            total += c.hidden_size * (3 * inner + c.num_experts + 1)
        else:
            total += 3 * c.hidden_size * c.intermediate_size
    return total


def delta_rule_flops(*, tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Operations of the recurrence: recall, write, read, each k by v. The chunked form has more, in larger products."""
    return tokens * heads * 6 * key_dim * value_dim


def routed_weights(config: ModelConfig) -> int:
    """The part of `linear_weights` that belongs to the chosen experts."""
    sparse = sum(map(config.is_sparse, range(config.num_hidden_layers)))
    return sparse * 3 * config.hidden_size * config.num_experts_per_tok * config.moe_intermediate_size


def flops_by_operation(config: ModelConfig, tokens: int, *, past: int = 0, logits: int = 1) -> dict[str, int]:
    """Operations by name for `tokens` new tokens after `past` others, with logits for the last `logits` of them."""
    c = config
    rule = delta_rule_flops(
        tokens=tokens,
        heads=c.linear_num_value_heads,
        key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim,
    )
    seen = tokens * past + tokens * (tokens + 1) // 2  # pairs of query and key
    routed = 2 * tokens * routed_weights(c)
    return {
        "linear maps": 2 * tokens * linear_weights(c) - routed + 2 * logits * c.hidden_size * c.vocab_size,
        "experts": routed,
        "delta rule": c.layer_types.count("linear_attention") * rule,
        "attention": c.layer_types.count("full_attention") * 4 * seen * c.num_attention_heads * c.head_dim,
    }


def forward_flops(config: ModelConfig, tokens: int, *, past: int = 0, logits: int = 1) -> int:
    """The sum of `flops_by_operation`."""
    return sum(flops_by_operation(config, tokens, past=past, logits=logits).values())


def train_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of loss and gradients over one sequence; the backward pass counts as two forward passes."""
    return 3 * forward_flops(config, tokens, logits=tokens)


def active_weight_bytes(config: ModelConfig, element_size: int, *, tokens: int = 1) -> int:
    """Bytes of weights that a step of so many tokens reads: those they are multiplied with, and the head.

    Of experts as many as independent tokens choose on average, if all are chosen equally often.
    """
    c, routed = config, routed_weights(config)
    if routed and tokens > 1:
        chosen = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** tokens)
        routed = round(routed * chosen / c.num_experts_per_tok)
    others = linear_weights(c) - routed_weights(c) + c.hidden_size * c.vocab_size
    return element_size * (others + routed)


def bytes_by_operation(config: ModelConfig, past: int, element_size: int) -> dict[str, int]:
    """Bytes that one decoded token after `past` others reads: weights, states, keys and values."""
    routed = element_size * routed_weights(config)
    return {
        "linear maps": active_weight_bytes(config, element_size) - routed,
        "experts": routed,
        "delta rule": config.bytes_per_sequence(element_size),
        "attention": past * config.bytes_per_token(element_size),
    }
