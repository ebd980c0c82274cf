"""Writes GGUF files as llama.cpp's converter does, and decodes blocks number by number, with code of its own."""

import math
import struct

import numpy as np
import torch

from qwen3next.checkpoints.state_dict_adapter import Layout, to_released

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13,
         "Q6_K": 14, "BF16": 30, "MXFP4": 39}  # fmt: skip
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
         "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
         "MXFP4": (32, 17)}  # fmt: skip
ARCHITECTURES = {"qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}


def text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()


def value(x) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, str):
        return struct.pack("<I", 8) + text(x)
    kind = 8 if x and isinstance(x[0], str) else 5
    items = [text(item) if kind == 8 else struct.pack("<i", item) for item in x]
    return struct.pack("<IIQ", 9, kind, len(x)) + b"".join(items)


def write(path, metadata, tensors, *, align=32, version=3):
    """`tensors`: name to (type, shape, bytes)."""
    data, infos = bytearray(), b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % align)
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", TYPES[kind], len(data))
        data += content
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(x) for key, x in metadata.items()) + infos
    path.write_bytes(head + bytes(-len(head) % align) + data)


def random_blocks(rng, kind, numbers):
    """Bytes of that many numbers; scales are such that the numbers are small and finite."""
    per, size = SIZES[kind]
    blocks = rng.integers(0, 256, (numbers // per, size), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(118, 124, len(blocks))
    ends = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))
    small = 0.0001 if kind.endswith("K") else 0.01 if kind != "Q8_0" else 0.001
    for at in ends if kind != "MXFP4" else ():
        halves = rng.uniform(small / 2, small, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks


def half(b, at):
    return np.frombuffer(bytes(b[at : at + 2]), np.float16)[0].astype(np.float32)


def decode(kind, b):
    """The numbers of one block, each by ggml's formula; numpy keeps every product and sum in fp32."""
    f, out = np.float32, []
    if kind == "Q8_0":
        return [f(np.int8(b[2 + i])) * half(b, 0) for i in range(32)]
    if kind == "MXFP4":
        values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        codes = [(b[1 + i % 16] >> (4 * (i // 16))) & 15 for i in range(32)]
        return [f(math.ldexp((-1 if c & 8 else 1) * values[c & 7], int(b[0]) - 127)) for c in codes]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        at = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8}[kind]
        for i in range(32):
            q = int(b[at + i % 16] >> (4 * (i // 16))) & 15
            if kind[1] == "5":
                q |= (int(b[at - 4 + i // 8]) >> (i % 8) & 1) << 4
            out.append(
                half(b, 0) * f(q - (1 << int(kind[1])) // 2) if kind[-1] == "0" else half(b, 0) * f(q) + half(b, 2)
            )
        return out
    if kind in ("Q4_K", "Q5_K"):
        for i in range(256):
            j = i // 32  # sub-block
            s = b[4 + j] & 63 if j < 4 else (b[8 + j] & 15) | (b[j] >> 6 << 4)
            t = b[8 + j] & 63 if j < 4 else (b[8 + j] >> 4) | (b[4 + j] >> 6 << 4)
            start = 16 if kind == "Q4_K" else 48
            q = int(b[start + j // 2 * 32 + i % 32]) >> (4 * (j % 2)) & 15
            q |= (int(b[16 + i % 32]) >> j & 1) << 4 if kind == "Q5_K" else 0
            out.append((half(b, 0) * f(s)) * f(q) - half(b, 2) * f(t))
        return out
    for i in range(256):  # Q6_K
        n, r, x = i // 128, i % 128 // 32, i % 32
        low = int(b[n * 64 + x + 32 * (r % 2)]) >> (4 * (r // 2)) & 15
        q = low | (int(b[128 + n * 32 + x]) >> (2 * r) & 3) << 4
        out.append((half(b, 208) * f(np.int8(b[192 + i // 16]))) * f(q - 32))
    return out


def plain_bytes(x, kind):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return bytes(x.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())


def metadata_of(config):
    """As convert_hf_to_gguf.py writes it."""
    arch = ARCHITECTURES[config.model_type]
    mtp = config.mtp_num_hidden_layers if arch != "qwen3next" else 0
    found = {
        "block_count": config.num_hidden_layers + mtp,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rotary_dim,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "full_attention_interval": config.full_attention_interval,
    }
    if arch != "qwen35":
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }
    found |= {"nextn_predict_layers": mtp} if mtp else {}
    return {"general.architecture": arch} | {f"{arch}.{key}": x for key, x in found.items()}


BELOW = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_ba": "ssm_ba", "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha", "conv1d": "ssm_conv1d", "norm": "ssm_norm", "out_proj": "ssm_out",
    "gate": "ffn_gate_inp", "shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip


def tensors_of(model):
    """llama.cpp's names and fp32 tensors of a model."""
    c = model.config
    tiled = c.model_type != "qwen3_next"
    released = dict(to_released(c, dict(model.named_parameters()), Layout.released(c)))
    released = {name: x.detach().float() for name, x in released.items()}
    out = {}
    experts = {}
    for name, x in released.items():
        if name.startswith("mtp") and not tiled:
            continue
        if name == "model.embed_tokens.weight":
            out["token_embd.weight"] = x
        elif name == "model.norm.weight":
            out["output_norm.weight"] = x + 1
        elif name == "lm_head.weight":
            out["output.weight"] = x
        elif name.startswith("mtp.") and ".layers." not in name:
            new = {
                "fc": "eh_proj",
                "pre_fc_norm_embedding": "enorm",
                "pre_fc_norm_hidden": "hnorm",
                "norm": "shared_head_norm",
            }
            leaf = name.split(".")[1]
            out[f"blk.{c.num_hidden_layers}.nextn.{new[leaf]}.weight"] = x if leaf == "fc" else x + 1
        else:
            parts = name.split(".")
            at = parts.index("layers")
            block = int(parts[at + 1]) + (c.num_hidden_layers if parts[0] == "mtp" else 0)
            rest = parts[at + 2 :]
            if "experts" in rest:
                experts.setdefault((block, rest[-1] if rest[-1] != "weight" else rest[-2]), []).append(x)
                continue
            out |= {f"blk.{block}.{key}": y for key, y in _below(rest, x, c, tiled)}
    for (block, leaf), found in experts.items():
        stacked = found[0] if found[0].ndim == 3 else torch.stack(found)
        if leaf == "gate_up_proj":
            out[f"blk.{block}.ffn_gate_exps.weight"], out[f"blk.{block}.ffn_up_exps.weight"] = stacked.chunk(2, 1)
        else:
            out[f"blk.{block}.ffn_{leaf.removesuffix('_proj')}_exps.weight"] = stacked
    return out


def _below(rest, x, c, tiled):
    keys, d = c.linear_num_key_heads, c.linear_value_head_dim
    each = c.linear_num_value_heads // keys

    def tile(y, size):
        """Value heads of size rows, from (key head, j) to (j, key head)."""
        rows = [y[(k * each + j) * size : (k * each + j + 1) * size] for j in range(each) for k in range(keys)]
        return torch.cat(rows) if tiled else y

    first = 2 * keys * c.linear_key_head_dim
    module, leaf = rest[0], rest[-1] if rest[-1] in ("A_log", "dt_bias") else rest[-2]
    if leaf == "A_log":
        yield "ssm_a", tile(-torch.exp(x), 1)
    elif leaf == "dt_bias":
        yield "ssm_dt.bias", tile(x, 1)
    elif leaf == "conv1d":
        x = x.squeeze(1)
        yield "ssm_conv1d.weight", torch.cat((x[:first], tile(x[first:], d)))
    elif leaf == "in_proj_qkvz":
        k, v = c.linear_key_head_dim, each * d
        groups = x.view(keys, 2 * k + 2 * v, -1)
        flat = [groups[:, a:b].flatten(0, 1) for a, b in ((0, k), (k, 2 * k), (2 * k, 2 * k + v))]
        yield "attn_qkv.weight", torch.cat(flat)
        yield "attn_gate.weight", groups[:, 2 * k + v :].flatten(0, 1)
    elif leaf == "in_proj_qkv":
        yield "attn_qkv.weight", torch.cat((x[:first], tile(x[first:], d)))
    elif leaf in ("in_proj_z", "in_proj_a", "in_proj_b"):
        yield f"{BELOW[leaf]}.weight", tile(x, d if leaf == "in_proj_z" else 1)
    elif leaf == "out_proj":
        yield "ssm_out.weight", tile(x.T, d).T
    elif module == "mlp" and leaf.endswith("_proj"):
        yield f"ffn_{leaf.removesuffix('_proj')}{'_shexp' if 'shared_expert' in rest else ''}.weight", x
    else:
        norm = leaf.endswith("norm") and module != "linear_attn"
        yield f"{BELOW[leaf]}.weight", x + 1 if norm else x


def write_model(path, model, *, kind="F32", metadata=None, tokens=None):
    """Matrices in `kind` (plain types), the rest in F32, as the converter does."""
    tensors = {}
    for name, x in tensors_of(model).items():
        small = x.ndim == 1 or "norm" in name or "conv1d" in name or "ffn_gate_inp" in name
        use = "F32" if small else kind
        tensors[name] = (use, tuple(x.shape), plain_bytes(x, use))
    write(path, metadata_of(model.config) | (tokens or {}) | (metadata or {}), tensors)
    return tensors
