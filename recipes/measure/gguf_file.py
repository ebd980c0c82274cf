"""Write a checkpoint of ours as a GGUF file that llama.cpp reads: weights as they are, and no tokenizer.

Only what `recipes.benchmark` compares: the released model_type `qwen3_next`, without MTP, in fp32 or bf16. Names and
layout follow llama.cpp's reader: norms hold 1 + w, A_log becomes -exp(A_log), q, k, v and z are in four blocks.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen3next.config import ModelConfig
from qwen3next.files.atomic import fresh_file

ALIGNMENT = 32
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9  # types of a value in the header
TYPES = {torch.float32: 0, torch.bfloat16: 30}  # of tensors

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.conv1d": "ssm_conv1d",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FP32 = ("norm", "ssm_conv1d", "ffn_gate_inp", "ssm_a", "ssm_dt")  # llama.cpp wants these in fp32


def write_gguf(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint in `folder` to `path`, its matrices in `dtype`.

    Raises: ValueError for a checkpoint that this file cannot hold.
    """
    config = ModelConfig.load(folder)
    if config.model_type != "qwen3_next" or not config.num_experts or config.mtp_num_hidden_layers:
        raise ValueError(
            f"{folder} cannot be written for llama.cpp here: it takes qwen3_next with experts, without MTP."
        )
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise ValueError("llama.cpp has one width for the key and value heads of Gated DeltaNet: make them equal.")
    rounded = {name: x.to(dtype) for name, x in _read(folder).items()}  # as our side rounds them
    tensors = {name: _widened(name, x) for name, x in _renamed(rounded, config)}
    fields = _fields(config)
    with fresh_file(path) as fresh, fresh.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for key, (kind, value) in fields.items():
            file.write(_string(key) + struct.pack("<I", kind) + _value(kind, value))
        offset = 0
        for name, x in tensors.items():
            shape = tuple(reversed(x.shape))
            file.write(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            file.write(struct.pack("<IQ", TYPES[x.dtype], offset))
            offset += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        for x in tensors.values():
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(x.contiguous().view(torch.uint8).numpy().tobytes())
        file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:  # of booleans
        return struct.pack(f"<IQ{len(value)}?", BOOL, len(value), *value)
    return struct.pack({UINT32: "<I", FLOAT32: "<f"}[kind], value)


def _fields(c: ModelConfig) -> dict[str, tuple[int, Any]]:
    """The header: what llama.cpp asks for, by its names."""
    counts = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": int(c.head_dim * c.partial_rotary_factor),
        "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.shared_expert_intermediate_size,
        "ssm.conv_kernel": c.linear_conv_kernel_dim,
        "ssm.state_size": c.linear_key_head_dim,
        "ssm.group_count": c.linear_num_key_heads,
        "ssm.time_step_rank": c.linear_num_value_heads,
        "ssm.inner_size": c.linear_num_value_heads * c.linear_value_head_dim,
    }
    numbers = {"attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_theta}
    recurrent = [mixer == "linear_attention" for mixer in c.layer_types]
    return {
        "general.architecture": (STRING, "qwen3next"),
        "tokenizer.ggml.model": (STRING, "none"),
        **{f"qwen3next.{key}": (UINT32, n) for key, n in counts.items()},
        **{f"qwen3next.{key}": (FLOAT32, float(x)) for key, x in numbers.items()},
        "qwen3next.attention.recurrent_layers": (ARRAY, recurrent),
    }


def _read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _renamed(tensors: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, x in tensors.items():
        whole, _, last = name.rpartition(".")
        if whole in OUTER:
            yield f"{OUTER[whole]}.weight", x.float() + 1 if whole == "model.norm" else x
            continue
        _, _, layer, part = name.split(".", 3)
        to, part = f"blk.{layer}.", part.removesuffix(".weight")
        if part == "linear_attn.A_log":
            yield f"{to}ssm_a", -x.float().exp()
        elif part == "linear_attn.dt_bias":
            yield f"{to}ssm_dt.bias", x
        elif part == "linear_attn.in_proj_qkvz":
            qkv, z = _in_blocks(x, config)
            yield f"{to}attn_qkv.weight", qkv
            yield f"{to}attn_gate.weight", z
        elif ".experts." in part:
            if part.startswith("mlp.experts.0."):
                kind = part.rpartition(".")[2]
                every = [
                    tensors[f"model.layers.{layer}.mlp.experts.{e}.{kind}.weight"] for e in range(config.num_experts)
                ]
                yield f"{to}ffn_{kind.removesuffix('_proj')}_exps.weight", torch.stack(every)
        else:
            centred = part.endswith("norm") and part != "linear_attn.norm"
            x = x[0] if part == "mlp.shared_expert_gate" else x.squeeze(1) if part == "linear_attn.conv1d" else x
            yield f"{to}{NAMES[part]}.{last}", x.float() + 1 if centred else x


def _in_blocks(x: Tensor, c: ModelConfig) -> tuple[Tensor, Tensor]:
    """The rows of a key head, q k v z, sorted into all q, all k, all v, and all z."""
    key, values = c.linear_key_head_dim, c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim
    q, k, v, z = x.unflatten(0, (c.linear_num_key_heads, -1)).split((key, key, values, values), dim=1)
    return torch.cat([part.flatten(0, 1) for part in (q, k, v)]), z.flatten(0, 1)


def _widened(name: str, x: Tensor) -> Tensor:
    return x.float() if x.ndim == 1 or any(part in name for part in FP32) else x
