"""State-dict adapter: maps the tensors of a released checkpoint to the model's parameters and back.

One `TensorSpec` describes one released tensor. Reading splits it into pieces, writing merges them; the two are exact
inverses, and also apply to gradients and optimizer moments. A `Layout` describes how a folder arranges its tensors.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen3next.checkpoints.variant_tensors import attention_tensors, mixed_projections
from qwen3next.config import ModelConfig

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ParamSlice:
    """A model parameter, or the view of it that `index` selects."""

    name: str
    index: tuple[int | slice, ...] = ()

    def of(self, ours: Tensors) -> Tensor:
        return ours[self.name][self.index] if self.index else ours[self.name]


@dataclass(frozen=True)
class TensorSpec:
    """One released tensor: `split` returns the pieces for `places`, `merge` rebuilds the tensor from them."""

    name: str
    shape: tuple[int, ...]
    places: tuple[ParamSlice, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)
    merge: Callable[..., Tensor] = lambda x: x


@dataclass(frozen=True)
class Layout:
    """How a folder arranges its tensors.

    Attributes:
        prefix: prefix of the language model's tensor names; with a vision tower, "model.language_model.".
        flat_projections: Gated DeltaNet's projections are four tensors qkv, z, b, a (Qwen3.5), instead of two tensors
            with rows grouped by key head (Qwen3-Next).
        gate_by_group: the rows of q_proj are, per key head, all queries and then all gates (the gated-attention
            study), instead of query and gate per query head.
        fused_experts, fused_mtp_experts: two tensors per layer for all experts, instead of three per expert.
    """

    prefix: str = "model."
    flat_projections: bool = False
    gate_by_group: bool = False
    fused_experts: bool = False
    fused_mtp_experts: bool = False

    @classmethod
    def released(cls, config: ModelConfig) -> "Layout":
        """The layout in which the family of this configuration was released."""
        return cls(
            flat_projections=config.model_type in ("qwen3_5_text", "qwen3_5_moe_text")
            or bool(config.chosen("linear_")),
            gate_by_group=config.model_type == "qwen3",
            fused_experts=config.model_type == "qwen3_5_moe_text",
        )

    @classmethod
    def found(cls, config: ModelConfig, names: Collection[str]) -> "Layout":
        """The layout of a folder with tensors of these names."""
        usual = cls.released(config)
        # ".in_proj_qkv." or ".in_proj_qkvz.", if there is any Gated DeltaNet layer
        flat = {".in_proj_qkv." in name for name in names if ".in_proj_qkv" in name}
        fused = [name for name in names if name.endswith(".mlp.experts.gate_up_proj")]
        single = [name for name in names if ".mlp.experts.0.up_proj." in name]
        prefixes = [p for p in PREFIXES if f"{p}embed_tokens.weight" in names]
        return cls(
            prefix=prefixes[0] if prefixes else usual.prefix,
            flat_projections=flat.pop() if len(flat) == 1 else usual.flat_projections,
            gate_by_group=usual.gate_by_group,
            fused_experts=_either(fused, single, usual.fused_experts, mtp=False),
            fused_mtp_experts=_either(fused, single, usual.fused_mtp_experts, mtp=True),
        )


PREFIXES = ("model.language_model.", "model.", "")  # "": a backbone saved without its head
VISION = ("model.visual.", "visual.")


def _either(fused: list[str], single: list[str], usual: bool, *, mtp: bool) -> bool:
    has_fused, has_single = (any(name.startswith("mtp.") == mtp for name in names) for names in (fused, single))
    return has_fused if has_fused != has_single else usual


def tensor_specs(config: ModelConfig, layout: Layout | None = None) -> Iterator[TensorSpec]:
    """The tensors of a checkpoint, layer by layer, in `layout` (None: the released layout of the family)."""
    c, width = config, config.hidden_size
    layout = Layout.released(config) if layout is None else layout
    prefix = layout.prefix
    yield _whole(f"{prefix}embed_tokens.weight", "embed_tokens.weight", (c.vocab_size, width))
    yield _whole(f"{prefix}norm.weight", "norm.weight", (width,))
    if not c.tie_word_embeddings:
        yield _whole("lm_head.weight", "lm_head.weight", (c.vocab_size, width))
    for i, kind in enumerate(c.layer_types):
        yield from _block(c, layout, f"{prefix}layers.{i}.", f"blocks.{i}.", kind, c.is_sparse(i), layout.fused_experts)
    for i in range(c.mtp_num_hidden_layers):
        yield _whole("mtp.fc.weight", "mtp.fc.weight", (width, 2 * width))
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield _whole(f"mtp.{norm}.weight", f"mtp.{norm}.weight", (width,))
        sparse, fused = c.num_experts > 0, layout.fused_mtp_experts
        yield from _block(c, layout, f"mtp.layers.{i}.", f"mtp.blocks.{i}.", "full_attention", sparse, fused)


def _whole(released: str, ours: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(released, shape, (ParamSlice(ours),))


def _block(
    c: ModelConfig, layout: Layout, theirs: str, ours: str, kind: str, sparse: bool, fused: bool
) -> Iterator[TensorSpec]:
    width = c.hidden_size
    sandwich = ("attn_out_norm", "mlp_out_norm") if c.sandwich_norm else ()
    for norm in ("input_layernorm", "post_attention_layernorm", *sandwich):
        yield _whole(f"{theirs}{norm}.weight", f"{ours}{norm}.weight", (width,))
    if kind == "linear_attention":
        yield from _linear_attention(c, layout, f"{theirs}linear_attn.", f"{ours}linear_attn.")
    else:
        yield from _full_attention(c, layout, f"{theirs}self_attn.", f"{ours}self_attn.")
    theirs, ours = f"{theirs}mlp.", f"{ours}mlp."
    if not sparse:
        yield from _swiglu(theirs, ours, width, c.intermediate_size)
        return
    yield _whole(f"{theirs}gate.weight", f"{ours}router.weight", (c.num_experts, width))
    yield from _experts(c, f"{theirs}experts.", f"{ours}experts.", fused)
    if shared := c.shared_expert_intermediate_size:
        yield from _swiglu(f"{theirs}shared_expert.", f"{ours}shared_expert.", width, shared)
        yield _whole(f"{theirs}shared_expert_gate.weight", f"{ours}shared_expert_gate.weight", (1, width))


def _swiglu(theirs: str, ours: str, width: int, inner: int) -> Iterator[TensorSpec]:
    for name, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
        yield _whole(f"{theirs}{name}.weight", f"{ours}{name}.weight", shape)


def _experts(c: ModelConfig, theirs: str, ours: str, fused: bool) -> Iterator[TensorSpec]:
    """Fused: gate rows above up rows in one tensor, down in another, for all experts. Else three tensors per expert."""
    width, inner = c.hidden_size, c.moe_intermediate_size
    if fused:
        yield _whole(f"{theirs}gate_up_proj", f"{ours}gate_up_proj", (c.num_experts, 2 * inner, width))
        yield _whole(f"{theirs}down_proj", f"{ours}down_proj", (c.num_experts, width, inner))
        return
    for e in range(c.num_experts):
        for name, shape, tensor, rows in (
            ("gate_proj", (inner, width), "gate_up_proj", slice(0, inner)),
            ("up_proj", (inner, width), "gate_up_proj", slice(inner, 2 * inner)),
            ("down_proj", (width, inner), "down_proj", slice(None)),
        ):
            yield TensorSpec(f"{theirs}{e}.{name}.weight", shape, (ParamSlice(ours + tensor, (e, rows)),))


def _full_attention(c: ModelConfig, layout: Layout, theirs: str, ours: str) -> Iterator[TensorSpec]:
    width, d = c.hidden_size, c.head_dim
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    gate_rows = {"elementwise": d, "headwise": 1}[c.attention_gate] if c.has_released_gate else 0
    kinds: list[tuple[str, tuple[int, ...]]] = [("weight", (width,))]
    if c.attention_bias:
        kinds.append(("bias", ()))
    for kind, columns in kinds:
        q = f"{theirs}q_proj.{kind}"
        if gate_rows:
            places = (ParamSlice(f"{ours}q_proj.{kind}"), ParamSlice(f"{ours}gate_proj.{kind}"))
            groups = kv if layout.gate_by_group else heads
            parts = (heads // groups * d, heads // groups * gate_rows)  # rows of a group: queries, then gates
            split, merge = partial(_split_groups, groups, parts), partial(_merge_groups, groups)
            yield TensorSpec(q, (heads * (d + gate_rows), *columns), places, split, merge)
        else:
            yield _whole(q, f"{ours}q_proj.{kind}", (heads * d, *columns))
        for name, mixed in mixed_projections(c).items():
            yield _whole(f"{theirs}{name}.{kind}", f"{ours}{name}.{kind}", (kv * mixed * d, *columns))
    yield _whole(f"{theirs}o_proj.weight", f"{ours}o_proj.weight", (width, heads * d))
    if c.attention_bias:
        yield _whole(f"{theirs}o_proj.bias", f"{ours}o_proj.bias", (width,))
    if c.use_qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _whole(f"{theirs}{name}.weight", f"{ours}{name}.weight", (d,))
    for name, shape in attention_tensors(c).items():
        yield _whole(f"{theirs}{name}", f"{ours}{name}", shape)


def _linear_attention(c: ModelConfig, layout: Layout, theirs: str, ours: str) -> Iterator[TensorSpec]:
    width, groups = c.hidden_size, c.linear_num_key_heads
    k, heads = c.linear_key_head_dim, c.linear_num_value_heads
    v = c.linear_value_head_dim * heads // groups  # value rows per key head
    keys, values, taps = groups * k, groups * v, c.linear_conv_kernel_dim
    channels = 2 * keys + values
    if layout.flat_projections or c.chosen("linear_"):  # variants may lack z or a, so rows are not interleaved
        projections = {"in_proj_qkv": channels, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
        absent = {"in_proj_z": c.linear_output_gate == "none", "in_proj_a": not c.linear_decay}
        for name, rows in projections.items():
            if absent.get(name):
                continue
            yield _whole(f"{theirs}{name}.weight", f"{ours}{name}.weight", (rows, width))
    else:
        # Rows per key head: its q, its k, the v and the z of the value heads that share it; likewise b and a.
        yield TensorSpec(
            f"{theirs}in_proj_qkvz.weight",
            (channels + values, width),
            (ParamSlice(f"{ours}in_proj_qkv.weight"), ParamSlice(f"{ours}in_proj_z.weight")),
            partial(_split_qkvz, groups, (k, k, v, v)),
            partial(_merge_qkvz, groups, (keys, keys, values)),
        )
        yield TensorSpec(
            f"{theirs}in_proj_ba.weight",
            (2 * heads, width),
            (ParamSlice(f"{ours}in_proj_b.weight"), ParamSlice(f"{ours}in_proj_a.weight")),
            partial(_split_groups, groups, (heads // groups, heads // groups)),
            partial(_merge_groups, groups),
        )
    if c.linear_use_conv:
        yield TensorSpec(
            f"{theirs}conv1d.weight",
            (channels, 1, taps),
            (ParamSlice(f"{ours}conv_weight"),),
            lambda x: (x.squeeze(1),),
            lambda x: x.unsqueeze(1),
        )
    if c.linear_decay:
        yield _whole(f"{theirs}A_log", f"{ours}A_log", (heads,))
        yield _whole(f"{theirs}dt_bias", f"{ours}dt_bias", (heads,))
    if c.linear_output_norm:
        yield _whole(f"{theirs}norm.weight", f"{ours}norm.weight", (c.linear_value_head_dim,))
    yield _whole(f"{theirs}out_proj.weight", f"{ours}out_proj.weight", (width, values))


def _split_groups(groups: int, parts: tuple[int, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Split rows that repeat a pattern of parts in each group into one tensor per part."""
    return tuple(part.flatten(0, 1) for part in x.unflatten(0, (groups, -1)).split(parts, dim=1))


def _merge_groups(groups: int, *parts: Tensor) -> Tensor:
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _split_qkvz(groups: int, parts: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, z = _split_groups(groups, parts, x)
    return torch.cat((q, k, v)), z


def _merge_qkvz(groups: int, parts: tuple[int, ...], qkv: Tensor, z: Tensor) -> Tensor:
    return _merge_groups(groups, *qkv.split(parts), z)


def to_released(config: ModelConfig, ours: Tensors, layout: Layout | None = None) -> Iterator[tuple[str, Tensor]]:
    """The released names and tensors for the model's parameters, or for gradients or moments of the same shapes."""
    for entry in tensor_specs(config, layout):
        yield entry.name, entry.merge(*(place.of(ours) for place in entry.places))
