"""An independent, short and slow reference of the gated-attention study's dense model, written from its description.

Rotate-half RoPE over the whole head, standard RMS norms, softmax in fp32, y · σ(gate) before o_proj. The rows of q_proj
are ordered by key head: the queries of that head's group, then their gates.
"""

import torch
import torch.nn.functional as F

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
}


def config(gate: str, *, bias: bool = False, qk_norm: bool = True, tied: bool = False) -> dict:
    """A config.json with the keys of the study's files."""
    return SIZES | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "use_qk_norm": qk_norm,
        "qkv_bias": bias,
        "headwise_attn_output_gate": gate == "headwise",
        "elementwise_attn_output_gate": gate == "elementwise",
    }


def random_tensors(c: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.1) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    width, inner, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    gates = heads if c["headwise_attn_output_gate"] else heads * d if c["elementwise_attn_output_gate"] else 0
    tensors = {"model.embed_tokens.weight": normal(c["vocab_size"], width, std=0.3)}
    tensors["model.norm.weight"] = normal(width, mean=1.0)
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(c["vocab_size"], width, std=0.15)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{norm}.weight"] = normal(width, mean=1.0)
        rows = {"q_proj": heads * d + gates, "k_proj": kv * d, "v_proj": kv * d}
        for name, n in rows.items():
            tensors[f"{at}self_attn.{name}.weight"] = normal(n, width)
            if c["qkv_bias"]:
                tensors[f"{at}self_attn.{name}.bias"] = normal(n)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(width, heads * d)
        if c["qkv_bias"]:
            tensors[f"{at}self_attn.o_proj.bias"] = normal(width)
        if c["use_qk_norm"]:
            for name in ("q_norm", "k_norm"):
                tensors[f"{at}self_attn.{name}.weight"] = normal(d, mean=1.0)
        tensors[f"{at}mlp.gate_proj.weight"] = normal(inner, width)
        tensors[f"{at}mlp.up_proj.weight"] = normal(inner, width)
        tensors[f"{at}mlp.down_proj.weight"] = normal(width, inner)
    return tensors


def logits(c: dict, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """(b, t) token ids to (b, t, vocab) logits, one head of one sequence at a time."""
    x = w["model.embed_tokens.weight"][ids]
    t, d = ids.shape[1], c["head_dim"]
    frequencies = c["rope_theta"] ** (-torch.arange(0, d, 2).to(x.dtype) / d)
    angles = torch.outer(torch.arange(t).to(x.dtype), frequencies)
    cos, sin = angles.cos(), angles.sin()

    def rms(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * weight

    def turn(v):  # (t, d): pairs are (i, i + d/2)
        a, b = v[:, : d // 2], v[:, d // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."

        def linear(name, v, at=at):
            return F.linear(v, w[f"{at}{name}.weight"], w.get(f"{at}{name}.bias"))

        y = rms(x, w[f"{at}input_layernorm.weight"])
        x = x + torch.stack([_attention(c, w, at, row, linear, rms, turn) for row in y])
        y = rms(x, w[f"{at}post_attention_layernorm.weight"])
        x = x + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y))
    head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return rms(x, w["model.norm.weight"]) @ head.T


def _attention(c, w, at, y, linear, rms, turn):
    d, kv = c["head_dim"], c["num_key_value_heads"]
    share = c["num_attention_heads"] // kv
    t = y.shape[0]
    q_all = linear("self_attn.q_proj", y).view(t, kv, -1)
    k_all, v_all = (linear(f"self_attn.{n}", y).view(t, kv, d) for n in ("k_proj", "v_proj"))
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    outputs = []
    for group in range(kv):
        k = k_all[:, group]
        if c["use_qk_norm"]:
            k = rms(k, w[f"{at}self_attn.k_norm.weight"])
        k = turn(k)
        for member in range(share):
            q = q_all[:, group, member * d : (member + 1) * d]
            if c["use_qk_norm"]:
                q = rms(q, w[f"{at}self_attn.q_norm.weight"])
            scores = (turn(q) @ k.T / d**0.5).masked_fill(future, -torch.inf)
            out = scores.softmax(-1) @ v_all[:, group]
            gates = q_all[:, group, share * d :]
            if c["headwise_attn_output_gate"]:
                out = out * gates[:, member, None].sigmoid()
            elif c["elementwise_attn_output_gate"]:
                out = out * gates[:, member * d : (member + 1) * d].sigmoid()
            outputs.append(out)
    return linear("self_attn.o_proj", torch.cat(outputs, dim=-1))
