"""llama.cpp's tensors under the released names, with what its converter changes put back.

Norms are stored plus 1, except the one inside Gated DeltaNet; A_log as −exp(A_log); the convolution without its middle
axis. qwen3next keeps b and a in one tensor whose rows alternate by key head. qwen35 and qwen35moe have the value heads
in another order: head j of key head k at place (j, k) instead of (k, j). The MTP layer is a block after the last one.
Source: llama.cpp, conversion/qwen.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layers.quantised.group_weight import GroupWeight, pack
from layers.quantised.held import GroupLayout
from qwen3next.checkpoints.gguf.blocks import Kind, dequantised
from qwen3next.checkpoints.gguf.header import Header, Packed
from qwen3next.checkpoints.quantised.weight import QuantisedWeight
from qwen3next.checkpoints.state_dict_adapter import Layout, TensorSpec, tensor_specs
from qwen3next.config import ModelConfig
from qwen3next.files.tensor_files import Files, Stored

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MTP = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}
# Below a block. Experts are listed under the name of one expert's matrix.
BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
UNREAD = ("rope_freqs.weight",)  # follow from the configuration
LAYOUT = Layout(flat_projections=True)


@dataclass(frozen=True)
class GGUFWeight(QuantisedWeight):
    """One released tensor: numbers of a GGUF tensor, changed back by `restore`."""

    kind: Kind
    restore: Callable[[Tensor], Tensor]

    codes = ""

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"GGUF {self.kind.name}"

    @property
    def exact_dtype(self) -> torch.dtype | None:
        return torch.float32 if len(self.shape) == 1 else None  # norms, A_log and dt_bias are always fp32 there

    def read(self, files: Files, index: int | None = None) -> Tensor:
        assert index is None
        return self.restore(dequantised(self.kind, files.read(self.parts[""]))).reshape(self.shape)

    def group_layout(self, files: Files) -> GroupLayout | None:  # noqa: ARG002
        if self.kind.codes is None or len(self.shape) != 2:
            return None
        if self.name.endswith("out_proj.weight"):  # its columns may be in another order: of whole groups?
            order = self.restore(torch.arange(self.shape[1])[None]).view(-1, 32)
            if not torch.equal(order, order[:, :1] + torch.arange(32)):
                return None
        return GroupLayout(4 if self.kind.name == "Q4_0" else 8, 32, torch.float16)

    def read_groups(self, files: Files, index: int | None = None) -> GroupWeight:
        """Codes and scales put back as values are; a scale moves with its group's 32 inputs."""
        assert index is None
        assert self.kind.codes is not None
        stored = files.read(self.parts[""])
        blocks = stored.reshape(-1, self.kind.nbytes)
        codes = self.kind.codes(blocks).view(*stored.shape[:-1], -1)
        scale = blocks[:, :2].contiguous().view(torch.float16).view(*stored.shape[:-1], -1)
        spread = self.restore(scale.repeat_interleave(32, -1)).reshape(self.shape)
        codes = self.restore(codes).reshape(self.shape)
        return GroupWeight(pack(codes) if self.kind.name == "Q4_0" else codes.view(torch.int8), spread[..., ::32])


def gguf_name(released: str, config: ModelConfig) -> tuple[str, int | None]:
    """The GGUF tensor that holds a released one, and the expert in it."""
    if released in TOP:
        return TOP[released], None
    if released in MTP:
        return f"blk.{config.num_hidden_layers}.{MTP[released]}", None
    mtp = released.startswith("mtp.")
    number, _, below = released.removeprefix("mtp.layers." if mtp else "model.layers.").partition(".")
    block = int(number) + (config.num_hidden_layers if mtp else 0)
    expert = None
    if below.startswith("mlp.experts."):
        one, _, matrix = below.removeprefix("mlp.experts.").partition(".")
        below, expert = f"mlp.experts.{matrix}", int(one)
    name = BLOCK[below]
    if name in ("ssm_beta.weight", "ssm_alpha.weight") and config.model_type == "qwen3_next":
        name = "ssm_ba.weight"
    return f"blk.{block}.{name}", expert


def weights(header: Header, config: ModelConfig) -> Iterator[tuple[str, QuantisedWeight]]:
    """Released names and weights; a GGUF tensor that no released one needs keeps its own name."""
    used = set(UNREAD)
    for spec in tensor_specs(config, LAYOUT):
        name, expert = gguf_name(spec.name, config)
        packed = header.tensors.get(name)
        used.add(name)
        if packed is not None:
            yield spec.name, _weight(spec, packed, expert, config)
    for name, packed in header.tensors.items():
        if name not in used:
            yield name, GGUFWeight(name, {"": packed.stored}, packed.shape, packed.kind, lambda x: x)


def _weight(spec: TensorSpec, packed: Packed, expert: int | None, config: ModelConfig) -> GGUFWeight:
    stored, shape = packed.stored, packed.shape
    if expert is not None:
        if len(shape) != 3 or expert >= shape[0]:
            return GGUFWeight(spec.name, {"": stored}, shape, packed.kind, lambda x: x)  # refused for its shape
        stored, shape = _one_expert(stored, expert), shape[1:]
    held = _held_shape(spec, config)
    fits = [n for n in shape if n != 1] == [n for n in held if n != 1]
    if not fits:
        return GGUFWeight(spec.name, {"": stored}, shape, packed.kind, lambda x: x)
    return GGUFWeight(spec.name, {"": stored}, spec.shape, packed.kind, restoring(spec.name, config))


def _one_expert(stored: Stored, expert: int) -> Stored:
    size = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    return replace(stored, begin=stored.begin + expert * size, shape=stored.shape[1:])


def _held_shape(spec: TensorSpec, config: ModelConfig) -> tuple[int, ...]:
    """The shape in the file: that of the released tensor, or of b and a together."""
    both = config.model_type == "qwen3_next" and spec.name.endswith(("in_proj_b.weight", "in_proj_a.weight"))
    return (2 * spec.shape[0], *spec.shape[1:]) if both else spec.shape


def restoring(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """What turns the numbers in the file into those of the released tensor."""
    if is_shifted(name):
        return lambda x: x - 1
    if ".linear_attn." not in name:
        return lambda x: x
    keys, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if name.endswith(("in_proj_b.weight", "in_proj_a.weight")) and config.model_type == "qwen3_next":
        part = 0 if name.endswith("in_proj_b.weight") else 1  # rows alternate by key head: its b, then its a
        return lambda x: x.unflatten(0, (keys, 2, each))[:, part].flatten(0, 1)
    if name.endswith("A_log"):
        return lambda x: (-_in_order(name, config, (each, keys), x.flatten())).log()
    return lambda x: _in_order(name, config, (each, keys), x)


def storing(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The reverse of `restoring`, but for b and a of qwen3next."""
    if is_shifted(name):
        return lambda x: x + 1
    if ".linear_attn." not in name:
        return lambda x: x
    keys, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if name.endswith("A_log"):
        return lambda x: _in_order(name, config, (keys, each), -x.exp())
    if name.endswith("conv1d.weight"):
        return lambda x: _in_order(name, config, (keys, each), x.squeeze(1))
    return lambda x: _in_order(name, config, (keys, each), x)


def is_shifted(name: str) -> bool:
    """Whether a released tensor is a norm's weight, which is stored plus 1."""
    return "norm" in name and not name.endswith("linear_attn.norm.weight")


def _in_order(name: str, config: ModelConfig, axes: tuple[int, int], x: Tensor) -> Tensor:
    """Value heads of a released tensor in the other order; `axes` are x's numbers of heads, outer first."""
    if config.model_type == "qwen3_next":
        return x
    d, leaf = config.linear_value_head_dim, name.rpartition("linear_attn.")[2].removesuffix(".weight")
    if leaf == "norm":
        return x
    dim, size = (1, d) if leaf == "out_proj" else (0, d if leaf in ("in_proj_qkv", "in_proj_z", "conv1d") else 1)
    first = 2 * config.linear_num_key_heads * config.linear_key_head_dim if leaf in ("in_proj_qkv", "conv1d") else 0
    kept, moved = x[:first], x[first:]  # rows of q and k stay
    moved = moved.unflatten(dim, (*axes, size)).transpose(dim, dim + 1).flatten(dim, dim + 2)
    return torch.cat((kept, moved))
