"""The optimizers of divided weights: their groups, and clipping over several meshes."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import ParamGroupConfig

import qwen3next as q
from recipes.scaling.layout import Layout
from recipes.scaling.pieces import piece_names
from recipes.scaling.settings import ScalingSettings
from recipes.scaling.sharding import mesh_of
from recipes.training.steps import parameter_groups


def optimizer_groups(config: q.ModelConfig, settings: ScalingSettings, layout: Layout) -> list[ParamGroupConfig]:
    """AdamW's groups: with and without decay, as `parameter_groups` says, and one for each mesh.

    One call of a fused optimizer takes tensors of one mesh.
    """
    with torch.device("meta"):
        model = q.Qwen3Next(config)
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for group in parameter_groups(model, settings.weight_decay):
        by_mesh: dict[str, list[str]] = {}
        for p in group["params"]:
            for piece in piece_names(config, names[id(p)]):
                mesh = mesh_of(piece, tensor=layout.tensor > 1, expert=layout.expert > 1)
                by_mesh.setdefault(mesh, []).append(piece)
        for some in by_mesh.values():
            pattern = "^core\\.(" + "|".join(name.replace(".", "\\.") for name in some) + ")$"
            adam = {"lr": settings.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": group["weight_decay"]}
            found.append(ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=adam))
    return found


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale all gradients so that their norm is at most `largest`; return the norm before.

    Norms are taken mesh by mesh: DTensors of different meshes cannot stand in one list.
    """
    meshes: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    square = 0.0
    for some in meshes.values():
        one = nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
        square += float(one.full_tensor() if isinstance(one, DTensor) else one) ** 2
    norm = math.sqrt(square) if math.isfinite(square) else square
    if math.isfinite(norm):
        for some in meshes.values():
            nn.utils.clip_grads_with_norm_(some, largest, torch.tensor(norm, device=some[0].device))
    return norm
