"""The tensors of a released checkpoint and the places in our parameters that they fill.

Every released tensor is described by one `Entry`. Reading splits a tensor into pieces, writing merges them; the two
are inverse to the bit, and serve anything of the parameters' shapes: gradients, moments.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3next.config import ModelConfig

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A part of one of our parameters: the whole, or what `index` selects, always a view."""

    name: str
    index: tuple[int | slice, ...] = ()

    def of(self, ours: Tensors) -> Tensor:
        return ours[self.name][self.index] if self.index else ours[self.name]


@dataclass(frozen=True)
class Entry:
    """One released tensor: `split` gives the pieces for `places`, `merge` makes the tensor from them."""

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)
    merge: Callable[..., Tensor] = lambda x: x


def entries(config: ModelConfig) -> list[Entry]:
    """The tensors of a qwen3_next checkpoint, in the order of the layers."""
    c, width = config, config.hidden_size
    found = [
        _whole("model.embed_tokens.weight", "embed_tokens.weight", (c.vocab_size, width)),
        _whole("model.norm.weight", "norm.weight", (width,)),
    ]
    if not c.tie_word_embeddings:
        found.append(_whole("lm_head.weight", "lm_head.weight", (c.vocab_size, width)))
    for i, kind in enumerate(c.layer_types):
        found += _block(c, f"model.layers.{i}.", f"blocks.{i}.", kind, c.is_sparse(i))
    for i in range(c.mtp_num_hidden_layers):
        found.append(_whole("mtp.fc.weight", "mtp.fc.weight", (width, 2 * width)))
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            found.append(_whole(f"mtp.{norm}.weight", f"mtp.{norm}.weight", (width,)))
        found += _block(c, f"mtp.layers.{i}.", f"mtp.blocks.{i}.", "full_attention", c.num_experts > 0)
    return found


def _whole(released: str, ours: str, shape: tuple[int, ...]) -> Entry:
    return Entry(released, shape, (Place(ours),))


def _block(c: ModelConfig, theirs: str, ours: str, kind: str, sparse: bool) -> list[Entry]:
    width = c.hidden_size
    found = [_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", (width,)) for n in _BLOCK_NORMS]
    mixer = _linear_attention if kind == "linear_attention" else _full_attention
    found += mixer(c, theirs, ours)
    if not sparse:
        return found + _swiglu(f"{theirs}mlp.", f"{ours}mlp.", width, c.intermediate_size)
    inner, experts = c.moe_intermediate_size, f"{ours}mlp.experts."
    found.append(_whole(f"{theirs}mlp.gate.weight", f"{ours}mlp.router.weight", (c.num_experts, width)))
    for e in range(c.num_experts):
        for name, shape, tensor, rows in (
            ("gate_proj", (inner, width), "gate_up_proj", slice(0, inner)),
            ("up_proj", (inner, width), "gate_up_proj", slice(inner, 2 * inner)),
            ("down_proj", (width, inner), "down_proj", slice(None)),
        ):
            found.append(Entry(f"{theirs}mlp.experts.{e}.{name}.weight", shape, (Place(experts + tensor, (e, rows)),)))
    shared = "mlp.shared_expert."
    found += _swiglu(theirs + shared, ours + shared, width, c.shared_expert_intermediate_size)
    gate = "mlp.shared_expert_gate.weight"
    return [*found, _whole(theirs + gate, ours + gate, (1, width))]


_BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


def _swiglu(theirs: str, ours: str, width: int, inner: int) -> list[Entry]:
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return [_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", shape) for n, shape in shapes.items()]


def _full_attention(c: ModelConfig, theirs: str, ours: str) -> list[Entry]:
    theirs, ours = f"{theirs}self_attn.", f"{ours}self_attn."
    width, d = c.hidden_size, c.head_dim
    heads, kv = c.num_attention_heads, c.num_key_value_heads

    def split_gate(x: Tensor) -> tuple[Tensor, ...]:
        """Rows per head: d of the query, then d of its gate."""
        query, gate = x.unflatten(0, (heads, 2, d)).unbind(1)
        return query.flatten(0, 1), gate.flatten(0, 1)

    def merge_gate(query: Tensor, gate: Tensor) -> Tensor:
        return torch.stack([x.unflatten(0, (heads, d)) for x in (query, gate)], dim=1).flatten(0, 2)

    both = (Place(f"{ours}q_proj.weight"), Place(f"{ours}gate_proj.weight"))
    shapes = {"k_proj": (kv * d, width), "v_proj": (kv * d, width), "o_proj": (width, heads * d)}
    return [
        Entry(f"{theirs}q_proj.weight", (2 * heads * d, width), both, split_gate, merge_gate),
        *(_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", shape) for n, shape in shapes.items()),
        *(_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", (d,)) for n in ("q_norm", "k_norm")),
    ]


def _linear_attention(c: ModelConfig, theirs: str, ours: str) -> list[Entry]:
    theirs, ours = f"{theirs}linear_attn.", f"{ours}linear_attn."
    width, groups = c.hidden_size, c.linear_num_key_heads
    k, heads = c.linear_key_head_dim, c.linear_num_value_heads
    v = c.linear_value_head_dim * heads // groups  # value rows beside one key head
    keys, values, taps = groups * k, groups * v, c.linear_conv_kernel_dim

    def split_qkvz(x: Tensor) -> tuple[Tensor, ...]:
        """Rows per key head: its q, its k, the v and the z of the value heads that share it."""
        q, key, value, z = (p.flatten(0, 1) for p in x.unflatten(0, (groups, -1)).split((k, k, v, v), dim=1))
        return torch.cat((q, key, value)), z

    def merge_qkvz(qkv: Tensor, z: Tensor) -> Tensor:
        parts = (*qkv.split((keys, keys, values)), z)
        return torch.cat([p.unflatten(0, (groups, -1)) for p in parts], dim=1).flatten(0, 1)

    def split_ba(x: Tensor) -> tuple[Tensor, ...]:
        """Rows per key head: b, then a, of the value heads that share it."""
        b, a = x.unflatten(0, (groups, 2, -1)).unbind(1)
        return b.flatten(0, 1), a.flatten(0, 1)

    def merge_ba(b: Tensor, a: Tensor) -> Tensor:
        return torch.stack([p.unflatten(0, (groups, -1)) for p in (b, a)], dim=1).flatten(0, 2)

    def at(*names: str) -> tuple[Place, ...]:
        return tuple(Place(ours + name) for name in names)

    qkvz = at("in_proj_qkv.weight", "in_proj_z.weight")
    ba = at("in_proj_b.weight", "in_proj_a.weight")
    channels = 2 * keys + values
    return [
        Entry(f"{theirs}in_proj_qkvz.weight", (channels + values, width), qkvz, split_qkvz, merge_qkvz),
        Entry(f"{theirs}in_proj_ba.weight", (2 * heads, width), ba, split_ba, merge_ba),
        Entry(
            f"{theirs}conv1d.weight",
            (channels, 1, taps),
            at("conv_weight"),
            lambda x: (x.squeeze(1),),
            lambda x: x.unsqueeze(1),
        ),
        _whole(f"{theirs}A_log", f"{ours}A_log", (heads,)),
        _whole(f"{theirs}dt_bias", f"{ours}dt_bias", (heads,)),
        _whole(f"{theirs}norm.weight", f"{ours}norm.weight", (c.linear_value_head_dim,)),
        _whole(f"{theirs}out_proj.weight", f"{ours}out_proj.weight", (width, values)),
    ]


def to_released(config: ModelConfig, ours: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The released names and tensors for our parameters, or for anything of their shapes: gradients, moments."""
    for entry in entries(config):
        yield entry.name, entry.merge(*(place.of(ours) for place in entry.places))
