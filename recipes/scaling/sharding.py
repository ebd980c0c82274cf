"""Divide the model's weights: heads and inner dimensions by TP, experts by EP, everything by FSDP.

`apply` works on a model on the meta device, before there are numbers. The mathematics stays that of the model's own
modules: they run with fewer heads, and the regions around them exchange what is missing.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import qwen3next as q
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from qwen3next.block import Block
from recipes.scaling.experts import exchanged_experts, own_count
from recipes.scaling.pieces import divide
from recipes.scaling.regions import Group, Substitution, local, part, region, shared
from recipes.scaling.vocabulary import divided_embedding, divided_head

# Parameters of a region by the dimension that is divided; None: every process has it whole, and all heads use it.
ATTENTION = dict.fromkeys(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight"), 0) | {
    "o_proj.weight": 1, "q_norm.weight": None, "k_norm.weight": None
}  # fmt: skip
DELTANET = dict.fromkeys(
    ("in_proj_qkv.q", "in_proj_qkv.k", "in_proj_qkv.v", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight",
     "conv_q", "conv_k", "conv_v", "A_log", "dt_bias"), 0
) | {"out_proj.weight": 1, "norm.weight": None}  # fmt: skip
FEED_FORWARD = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
EXPERTS = {"gate_up_proj": 2, "down_proj": 2}  # (e, 2, inner, width) and (e, width, inner)


def blocks_of(model: q.Qwen3Next) -> list[Block]:
    """All blocks, the MTP layer's too."""
    return [*model.blocks, *(model.mtp.blocks if model.mtp is not None else [])]


def compile_blocks(model: q.Qwen3Next) -> None:
    """Compile each block by itself. Blocks share code but not regions, so torch has to keep a graph for each."""
    blocks = blocks_of(model)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(blocks))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 64 * len(blocks))
    for block in blocks:
        block.compile()


def apply(model: q.Qwen3Next, *, tensor: DeviceMesh | None, expert: DeviceMesh | None) -> None:
    """Store fused tensors in pieces, and divide the model over the meshes of TP and EP."""
    divide(model)
    group = None if tensor is None else tensor.get_group()
    for block in blocks_of(model):
        if block.mixer == "linear_attention":
            _deltanet(block.linear_attn, tensor, group)
        elif tensor is not None:
            _attention(block.self_attn, tensor, group)
        if isinstance(block.mlp, SparseMoE):
            _sparse(block.mlp, tensor, expert, group)
        elif tensor is not None:
            items = _divided(block.mlp, FEED_FORWARD, tensor, group)
            block.mlp.forward = region(block.mlp.forward, items, group)  # type: ignore[method-assign]
    if tensor is not None:
        tied = model.lm_head.weight is model.embed_tokens.weight
        for module in (model.embed_tokens, model.lm_head):
            _shard(module, "weight", tensor, 0)
        if tied:
            model.lm_head.weight = model.embed_tokens.weight
        divided_embedding(model, tensor)
        divided_head(model, tensor)


def _deltanet(mixer: nn.Module, mesh: DeviceMesh | None, group: Group) -> None:
    if type(mixer) is not GatedDeltaNet:
        return
    items = [] if mesh is None else _divided(mixer, DELTANET, mesh, group)
    items = [item for item in items if item.leaf not in ("q", "k", "v", "conv_q", "conv_k", "conv_v")]
    qkv = mixer.in_proj_qkv
    items += [
        Substitution(qkv, "weight", lambda: torch.cat([local(qkv, name) for name in "qkv"])),
        Substitution(mixer, "conv_weight", lambda: torch.cat([local(mixer, f"conv_{name}") for name in "qkv"])),
    ]
    if mesh is not None:
        mixer.key_heads //= mesh.size()
        mixer.value_heads //= mesh.size()
        mixer.split = tuple(rows // mesh.size() for rows in mixer.split)  # type: ignore[assignment]
    mixer.forward = region(mixer.forward, items, group)  # type: ignore[method-assign]


def _attention(mixer: nn.Module, mesh: DeviceMesh, group: Group) -> None:
    assert type(mixer) is GatedAttention  # check_layout has seen to it
    items = _divided(mixer, ATTENTION, mesh, group)
    mixer.heads //= mesh.size()
    mixer.kv_heads //= mesh.size()
    mixer.forward = region(mixer.forward, items, group)  # type: ignore[method-assign]


def _sparse(mlp: SparseMoE, tensor: DeviceMesh | None, expert: DeviceMesh | None, group: Group) -> None:
    """The sum over experts is a region; the router before it is not divided."""
    experts = mlp.experts
    assert type(experts) is Experts
    gate_up = Substitution(experts, "gate_up_proj", lambda: local(experts, "gate_up_proj").flatten(1, 2))
    own = [gate_up, part(experts, "down_proj")]
    items: list[Substitution] = []
    if expert is not None:
        for leaf in EXPERTS:
            _shard(experts, leaf, expert, 0)
        experts.forward = exchanged_experts(experts, expert, tensor, own)  # type: ignore[method-assign, assignment]
    else:
        items += own
        for leaf, dim in EXPERTS.items():
            if tensor is not None:
                _shard(experts, leaf, tensor, dim)
    if tensor is not None and isinstance(mlp.shared_expert, SwiGLU):
        items += _divided(mlp.shared_expert, FEED_FORWARD, tensor, group)
        items.append(shared(mlp.shared_expert_gate, "weight", group))
    # The weights of the choices are used with every process's part of an expert, so they have gradients from all.
    summed = region(mlp._expert_sum, items, group, inputs=2)
    # A compiled block leaves this out under EP: the host must know how many rows come, and torch 2.13 would trace the
    # forward of the class in place of the one that exchanges them.
    mlp._expert_sum = summed if expert is None else torch.compiler.disable(summed)  # type: ignore[method-assign]


def mesh_of(piece: str, *, tensor: bool, expert: bool) -> str:
    """What divides a parameter besides FSDP, by the name of its piece: "expert", "tensor" or ""."""
    if ".experts." in piece:
        return "expert" if expert else "tensor" if tensor else ""
    plans = ((".self_attn.", ATTENTION), (".linear_attn.", DELTANET), (".mlp.shared_expert.", FEED_FORWARD))
    for place, plan in (*plans, (".mlp.", FEED_FORWARD)):
        if plan.get(piece.partition(place)[2]) is not None:
            return "tensor" if tensor else ""
    return "tensor" if tensor and piece in ("embed_tokens.weight", "lm_head.weight") else ""


def _divided(module: nn.Module, plan: Mapping[str, int | None], mesh: DeviceMesh, group: Group) -> list[Substitution]:
    """Divide the parameters of a region, and what stands for them in a call."""
    items = []
    for name, dim in plan.items():
        path, _, leaf = name.rpartition(".")
        owner = getattr(module, path, None) if path else module
        if owner is None or owner._parameters.get(leaf) is None:
            continue  # a layer without a gate or norms
        if dim is None:
            items.append(shared(owner, leaf, group))
        else:
            _shard(owner, leaf, mesh, dim)
            items.append(part(owner, leaf))
    return items


def _shard(module: nn.Module, leaf: str, mesh: DeviceMesh, dim: int) -> None:
    whole = module._parameters[leaf]
    assert whole is not None
    module._parameters[leaf] = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None))


def shard_fully(
    root: nn.Module, model: q.Qwen3Next, *, data: DeviceMesh, expert_data: DeviceMesh | None, force_sum: bool
) -> None:
    """FSDP2 for each block and for the rest. Gradients are sums: losses are local sums over global counts already.

    Weights are gathered in fp32, and autocast chooses the dtype of products, as on one machine: router, norms, A_log
    and dt_bias stay exact.

    Args:
        data: mesh of FSDP, with the replicas in front for HSDP; `expert_data` the same for experts under EP.
        force_sum: reduce by sums instead of pre-multiplied ones, which gloo lacks.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        if expert_data is not None and isinstance(block.mlp, SparseMoE):
            experts, size = block.mlp.experts, expert_data.size(-1)
            assert isinstance(experts, Experts)
            few = bool(own_count(experts) % size)

            def dimension(p: nn.Parameter, few: bool = few) -> Shard:  # the inner one where experts are too few
                return Shard(p.ndim - 2) if few else Shard(0)

            fully_shard(experts, mesh=expert_data, mp_policy=policy, shard_placement_fn=dimension)
        fully_shard(block, mesh=data, mp_policy=policy)
    fully_shard(root, mesh=data, mp_policy=policy)
    for module in _fsdp_modules(root):
        module.set_gradient_divide_factor(1.0)
        if force_sum:
            module.set_force_sum_reduction_for_comms(True)


def _fsdp_modules(root: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in root.modules() if isinstance(module, FSDPModule))
