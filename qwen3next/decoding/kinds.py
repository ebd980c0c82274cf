"""The kinds of modules that a compiled step can run, one entry each.

To add a kind of weight (LoRA, another format): register its module here for the role "linear" or "experts", and teach
`Mat` (layers/cpp/step.py, decode_arguments.h) how it lies in memory.
"""

from torch import nn

from layers.cpp.group_ops import knows_groups
from layers.delta_rule import gated_delta_rule
from layers.experts.disk import OffloadedExperts
from layers.experts.int8 import Int8Experts
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from layers.norm import GatedRMSNorm, RMSNorm
from layers.quantised.experts import QuantisedExperts
from layers.quantised.group_weight import GroupWeight
from layers.quantised.linear import QuantisedLinear
from layers.variants.attention import AttentionVariant
from layers.variants.deltanet import DeltaNetVariant
from qwen3next.block import Block
from qwen3next.decoding.description import Needed, Place, Shape, StepSpec, describes, refuses
from qwen3next.mtp import MTP


@describes(Linear, nn.Linear, roles=("linear",))
def _linear(_: nn.Linear, place: Place) -> StepSpec:
    bias = Needed(f"{place.field}_bias", place.shape[:1], optional=True)
    return StepSpec({"weight": Needed(place.field, place.shape), "bias": bias})


@describes(QuantisedLinear, roles=("linear",))
def _quantised_linear(m: QuantisedLinear, place: Place) -> StepSpec:
    bias = Needed(f"{place.field}_bias", place.shape[:1], optional=True)
    weights, refusal = _in_groups("weight", m.in_groups, place.field, place.shape)
    return StepSpec(weights | {"bias": bias}, refusal=refusal)


def _in_groups(name: str, weight: GroupWeight, field: str, shape: Shape) -> tuple[dict[str, Needed], str | None]:
    """The buffers of a weight in groups, which must have that shape, and why it is refused, if it is."""
    *outer, columns = shape
    groups, size = weight.scale.shape[-1], weight.group_size if weight.scale.shape[-1] else 0
    found = {
        f"{name}_codes": Needed(field, (*outer, columns and columns * weight.bits // 8), in_groups=True),
        f"{name}_scale": Needed(field, (*outer, groups), part="scale"),
    }
    if weight.zero is not None:
        found[f"{name}_zero"] = Needed(field, (*outer, groups), part="zero")
    fits = size and weight.shape[-1] == size * groups and knows_groups(weight.shape[-1], size)
    return found, None if fits else f"keeps a weight in groups of {size}, not of a power of two from 8 on"


@describes(nn.Embedding, roles=("embedding",))
def _embedding(m: nn.Embedding, place: Place) -> StepSpec:
    refusal = "limits its norms" if m.max_norm is not None else None
    return StepSpec({"weight": Needed(place.field, place.shape)}, refusal=refusal)


@describes(RMSNorm, roles=("norm", "head_norm"))
def _rms_norm(m: RMSNorm, place: Place) -> StepSpec:
    sizes = {"eps": m.eps, "zero_centred": m.zero_centred}
    return StepSpec({"weight": Needed(place.field, place.shape)}, sizes=sizes)


@describes(GatedRMSNorm, roles=("gated_norm",))
def _gated_rms_norm(m: GatedRMSNorm, place: Place) -> StepSpec:
    refusal = None if m.activation == "silu" else f"gates its norm by {m.activation}, not by silu"
    return StepSpec({"weight": Needed(place.field, place.shape)}, sizes={"eps": m.eps}, refusal=refusal)


@describes(nn.Identity, roles=("head_norm",))
@describes(HookPoint, roles=())
def _without_weights(_: nn.Module, _place: Place) -> StepSpec:
    return StepSpec()


@describes(GatedDeltaNet, roles=("linear_attention",))
def _gated_deltanet(m: GatedDeltaNet, place: Place) -> StepSpec:
    (width,) = place.shape
    keys, values, heads = m.key_heads * m.key_dim, m.value_heads * m.value_dim, m.value_heads
    refusal = None
    if m.rule is not gated_delta_rule:
        refusal = "has another rule than the gated delta rule"
    elif m.value_heads % m.key_heads:
        refusal = "has value heads that cannot share key heads"
    return StepSpec(
        weights={
            "conv_weight": Needed("delta_net.conv", (2 * keys + values, m.conv_weight.shape[1])),
            "A_log": Needed("delta_net.a_log", (heads,)),
            "dt_bias": Needed("delta_net.dt_bias", (heads,)),
        },
        children={
            "in_proj_qkv": Place("linear", "delta_net.in_qkv", (2 * keys + values, width)),
            "in_proj_z": Place("linear", "delta_net.in_z", (values, width)),
            "in_proj_b": Place("linear", "delta_net.in_b", (heads, width)),
            "in_proj_a": Place("linear", "delta_net.in_a", (heads, width)),
            "norm": Place("gated_norm", "delta_net.out_norm", (m.value_dim,)),
            "out_proj": Place("linear", "delta_net.out", (width, values)),
        },
        sizes={
            "key_heads": m.key_heads,
            "value_heads": m.value_heads,
            "key_dim": m.key_dim,
            "value_dim": m.value_dim,
            "kernel_size": m.conv_weight.shape[1],
        },
        refusal=refusal,
    )


@describes(GatedAttention, roles=("full_attention",))
def _gated_attention(m: GatedAttention, place: Place) -> StepSpec:
    (width,) = place.shape
    query, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    rows = 0 if m.gate_proj is None else m.gate_proj.out_features // m.heads  # of the gate, a head
    refusal = None
    if m.heads % m.kv_heads:
        refusal = "has query heads that cannot share key heads"
    elif rows not in (0, 1, m.head_dim):
        refusal = f"has a gate of {rows} rows a head"
    return StepSpec(
        children={
            "q_proj": Place("linear", "attention.q", (query, width)),
            "k_proj": Place("linear", "attention.k", (kv, width)),
            "v_proj": Place("linear", "attention.v", (kv, width)),
            "gate_proj": Place("linear", "attention.gate", (m.heads * rows, width), optional=True),
            "o_proj": Place("linear", "attention.o", (width, query)),
            "q_norm": Place("head_norm", "attention.q_norm", (m.head_dim,)),
            "k_norm": Place("head_norm", "attention.k_norm", (m.head_dim,)),
        },
        sizes={"heads": m.heads, "kv_heads": m.kv_heads, "head_dim": m.head_dim},
        settings={"attention.gate_rows": rows},
        refusal=refusal,
    )


@describes(SwiGLU, roles=("feed_forward", "shared_expert"))
def _swiglu(m: SwiGLU, place: Place) -> StepSpec:
    (width,), inner = place.shape, m.gate_proj.out_features
    return StepSpec(
        children={
            "gate_proj": Place("linear", "feed_forward.shared_gate", (inner, width)),
            "up_proj": Place("linear", "feed_forward.shared_up", (inner, width)),
            "down_proj": Place("linear", "feed_forward.shared_down", (width, inner)),
        },
        sizes={"shared_intermediate_size" if place.role == "shared_expert" else "dense_inner": inner},
    )


@describes(SparseMoE, roles=("sparse_feed_forward",))
def _sparse_moe(m: SparseMoE, place: Place) -> StepSpec:
    (width,), experts = place.shape, len(m.router.weight)
    refusal = None
    if m.shared_expert is None:
        refusal = "has no shared expert, and it knows experts with one"
    elif not 1 <= m.top_k <= experts:
        refusal = f"routes to {m.top_k} of {experts} experts"
    return StepSpec(
        children={
            "router": Place("linear", "feed_forward.router", (experts, width)),
            "experts": Place("experts", "feed_forward.experts", (experts, width)),
            "shared_expert": Place("shared_expert", "", (width,)),
            "shared_expert_gate": Place("linear", "feed_forward.shared_weight", (1, width)),
        },
        sizes={"experts": experts, "top_k": m.top_k, "norm_topk_prob": m.norm_topk_prob},
        refusal=refusal,
    )


@describes(Experts, roles=("experts",))
def _experts(m: Experts, place: Place) -> StepSpec:
    (count, width), inner = place.shape, m.down_proj.shape[2]
    return StepSpec(
        weights={
            "gate_up_proj": Needed(f"{place.field}_in", (count, 2 * inner, width)),
            "down_proj": Needed(f"{place.field}_out", (count, width, inner)),
        },
        sizes={"inner": inner},
    )


@describes(QuantisedExperts, roles=("experts",))
def _quantised_experts(m: QuantisedExperts, place: Place) -> StepSpec:
    (count, width), inner = place.shape, m.down.shape[2]
    first, refusal = _in_groups("gate_up_proj", m.gate_up, f"{place.field}_in", (count, 2 * inner, width))
    second, other = _in_groups("down_proj", m.down, f"{place.field}_out", (count, width, inner))
    return StepSpec(first | second, sizes={"inner": inner}, refusal=refusal or other)


@describes(Int8Experts, roles=("experts",))
def _int8_experts(m: Int8Experts, place: Place) -> StepSpec:
    (count, width), inner = place.shape, m.down_proj.shape[2]
    return StepSpec(
        weights={
            "gate_up_proj": Needed(f"{place.field}_in", (count, 2 * inner, width), in_groups=True),
            "gate_up_scale": Needed(f"{place.field}_in", (count, 2 * inner), part="scale"),
            "down_proj": Needed(f"{place.field}_out", (count, width, inner), in_groups=True),
            "down_scale": Needed(f"{place.field}_out", (count, width), part="scale"),
        },
        sizes={"inner": inner},
    )


@describes(Block, roles=("block",))
def _block(m: Block, place: Place) -> StepSpec:
    softmax = m.mixer == "full_attention"
    mixer = {"self_attn": Place("full_attention", "", place.shape)}
    if not softmax:
        mixer = {"linear_attn": Place("linear_attention", "", place.shape)}
    return StepSpec(
        children={
            "input_layernorm": Place("norm", "norm_in", place.shape),
            **mixer,
            "post_attention_layernorm": Place("norm", "norm_post", place.shape),
            "mlp": Place("sparse_feed_forward" if m.sparse else "feed_forward", "", place.shape),
        },
        settings={"softmax": softmax, "sparse": m.sparse},
    )


@describes(nn.ModuleList, roles=("only_block",))
def _only_block(m: nn.ModuleList, place: Place) -> StepSpec:
    refusal = None if len(m) == 1 else f"has {len(m)} blocks where it knows one"
    return StepSpec(children={"0": Place("block", shape=place.shape)}, refusal=refusal)


@describes(MTP, roles=("mtp",))
def _mtp(_: MTP, place: Place) -> StepSpec:
    (width,) = place.shape
    assert width is not None
    return StepSpec(
        children={
            "pre_fc_norm_embedding": Place("norm", "norm_embedding", (width,)),
            "pre_fc_norm_hidden": Place("norm", "norm_hidden", (width,)),
            "fc": Place("linear", "fc", (width, 2 * width)),
            "blocks": Place("only_block", shape=(width,)),
            "norm": Place("norm", "norm", (width,)),
        }
    )


refuses(OffloadedExperts, "its experts stay on disk")
refuses(AttentionVariant, "it is a variant of softmax attention")
refuses(DeltaNetVariant, "it is a variant of Gated DeltaNet")
