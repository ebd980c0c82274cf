"""Names (below `self_attn.`) and shapes of the tensors that only variants have."""

from qwen3next.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def attention_tensors(c: ModelConfig) -> Shapes:
    """The tensors of a softmax layer besides q, k, v, o and their norms.

    A variant's gate is never part of q_proj, so that a reader which does not know the variant fails on a wrong shape or
    an unknown name.
    """
    rows: dict[str, int] = {}
    shapes: Shapes = {}
    if c.attention_gate != "none" and not c.has_released_gate:
        groups, scores = gate_shape(c)
        if c.attention_gate_input == "constant":
            shapes["gate_constant"] = (groups, scores)
        else:
            rows["gate_proj"] = groups * scores
    if c.attention_switch != "none":
        rows["switch_proj"] = c.num_key_value_heads * c.attention_switch_experts
    for name, n in rows.items():
        shapes[f"{name}.weight"] = (n, c.hidden_size)
        if c.attention_bias:
            shapes[f"{name}.bias"] = (n,)
    if c.attention_output_norm:
        shapes["o_norm.weight"] = (c.head_dim,)
    return shapes


def gate_shape(c: ModelConfig) -> tuple[int, int]:
    """Number of groups of a gate, and of scores per group."""
    groups = {"G1": c.num_attention_heads, "G4": c.num_attention_heads, "G5": 1}
    elements = c.hidden_size if c.attention_gate_position == "G5" else c.head_dim
    scores = 1 if c.attention_gate == "headwise" else elements
    return groups.get(c.attention_gate_position, c.num_key_value_heads), scores


def mixed_projections(c: ModelConfig) -> dict[str, int]:
    """Number of projections per key head that are mixed into its key (k_proj) and into its value (v_proj)."""
    n = c.attention_switch_experts
    return {"k_proj": n if c.attention_switch == "kv" else 1, "v_proj": n}
