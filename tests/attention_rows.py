"""An independent reference of the study's attention layer, from the paper's formulas: one head and sequence at a time.

Weights have the names of `AttentionVariant`, options those of the fields of `ModelConfig`.
"""

import torch

ACT = {
    "sigmoid": lambda s: 1 / (1 + (-s).exp()),
    "silu": lambda s: s / (1 + (-s).exp()),
    "identity": lambda s: s,
    "ns_sigmoid": lambda s: 0.5 + 0.5 / (1 + (-s).exp()),
}


def attention(w, x, c):
    """(t, width) to (t, width)."""
    heads, kv, d, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    t = len(x)
    n = c.attention_switch_experts

    def rms(y, name):
        return y / (y.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * (1 + w[f"{name}.weight"])

    def turn(y):  # rotate-half RoPE on the first dimensions
        half = c.rotary_dim // 2
        angles = torch.outer(torch.arange(t), c.rope_theta ** (-torch.arange(half) / half)).to(y)
        a, b, rest = y[:, :half], y[:, half : 2 * half], y[:, 2 * half :]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest), dim=-1)

    def gate(position, group, y):
        """Equation 5 of the paper for one head's y (t, d), if the gate is at this position."""
        if c.attention_gate == "none" or c.attention_gate_position != position:
            return y
        groups = {"G1": heads, "G4": heads, "G2": kv, "G3": kv, "G5": 1}[position]
        rows = 1 if c.attention_gate == "headwise" else y.shape[-1]
        act = ACT[c.attention_gate_activation]
        if c.attention_gate_input == "constant":
            scores = [act(w["gate_constant"][g]).expand(t, -1) for g in range(groups)]
        else:
            scores = [act(x @ w["gate_proj.weight"][g * rows : (g + 1) * rows].T) for g in range(groups)]
        score = sum(scores) / groups if c.attention_gate == "head_shared" else scores[group]
        return y + score if c.attention_gate_form == "additive" else y * score

    def key_or_value(name, group, mixed):
        if not mixed:
            return x @ w[f"{name}.weight"][group * d : (group + 1) * d].T
        scores = ACT["sigmoid"](x @ w["switch_proj.weight"][group * n : (group + 1) * n].T)  # (t, n)
        y = 0
        for e in range(n):
            better = (scores > scores[:, e : e + 1]).sum(-1)
            chosen = (better < c.attention_switch_top_k)[:, None]
            rows = slice((group * n + e) * d, (group * n + e + 1) * d)
            y = y + chosen * scores[:, e : e + 1] * (x @ w[f"{name}.weight"][rows].T)
        return y

    out = torch.zeros(t, width).to(x)
    for h in range(heads):
        g = h // (heads // kv)
        q = turn(gate("G4", h, rms(x @ w["q_proj.weight"][h * d : (h + 1) * d].T, "q_norm")))
        k = turn(gate("G3", g, rms(key_or_value("k_proj", g, c.attention_switch == "kv"), "k_norm")))
        v = gate("G2", g, key_or_value("v_proj", g, c.attention_switch != "none"))
        scores = (q @ k.T / d**0.5).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
        y = scores.softmax(-1) @ v
        y = rms(y, "o_norm") if c.attention_output_norm else y
        y = ACT["silu"](y) if c.attention_output_activation == "silu" else y
        out = out + gate("G1", h, y) @ w["o_proj.weight"][:, h * d : (h + 1) * d].T
    return gate("G5", 0, out)
