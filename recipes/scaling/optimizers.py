"""The optimizers of divided weights: their groups, Muon on whole matrices, and clipping over several meshes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.tools.utils import device_type

import qwen3next as q
from recipes.scaling.layout import Layout
from recipes.scaling.pieces import piece_names, rows_of
from recipes.scaling.settings import ScalingSettings
from recipes.scaling.sharding import mesh_of
from recipes.training.muon import Muon, matrices
from recipes.training.steps import parameter_groups


class DividedMuon(Muon):
    """Muon on parameters that are divided over processes.

    Only a whole matrix can be made orthogonal. Where a process holds whole experts, it does so with its own. Otherwise
    the momentum is gathered, every process makes all of it orthogonal, and keeps its part.
    """

    def direction(self, update: Tensor, rows: tuple[int, ...]) -> Tensor:
        if not isinstance(update, DTensor):
            return super().direction(update, rows)
        mesh, placements = update.device_mesh, update.placements
        if all(isinstance(place, Replicate) or _divides(place) < update.ndim - 2 for place in placements):
            own = super().direction(update.to_local(), rows)
            return DTensor.from_local(
                own, mesh, placements, run_check=False, shape=update.shape, stride=update.stride()
            )
        return distribute_tensor(super().direction(update.full_tensor(), rows), mesh, placements, src_data_rank=None)


def _divides(place: Placement) -> int:
    """The dimension that a placement divides; FSDP over TP has a class of its own for it."""
    assert isinstance(place, Shard | _StridedShard)
    return place.dim


class Optimizers(OptimizersContainer):
    """torchtitan's optimizers, with our Muon among them."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return DividedMuon if name == "Muon" else OptimizersContainer._resolve_optimizer_factory(name)


def optimizers_of(config: q.ModelConfig, settings: ScalingSettings, layout: Layout) -> Optimizers.Config:
    """AdamW for all parameters, or Muon for the matrices and AdamW for the rest, as in `recipes.training.optimizers`.

    AdamW's groups are with and without decay, as `parameter_groups` says. There is a group for each mesh, since one
    call of a fused optimizer takes tensors of one mesh.
    """
    with torch.device("meta"):
        model = q.Qwen3Next(config)
    names = {id(p): name for name, p in model.named_parameters()}
    rows = matrices(model) if settings.optimizer == "muon" else {}
    found: dict[tuple[str, float, tuple[int, ...], str], list[str]] = {}
    for group in parameter_groups(model, settings.weight_decay):
        for p in group["params"]:
            name, split = names[id(p)], rows_of(config, names[id(p)], rows.get(p, ()))
            kind, decay = ("Muon", settings.weight_decay) if p in rows else ("AdamW", group["weight_decay"])
            for piece in piece_names(config, name):
                mesh = mesh_of(piece, tensor=layout.tensor > 1, expert=layout.expert > 1)
                found.setdefault((kind, decay, split, mesh), []).append(piece)
    groups = []
    for (kind, decay, split, _), some in found.items():
        pattern = "^core\\.(" + "|".join(name.replace(".", "\\.") for name in some) + ")$"
        own: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8} if kind == "AdamW" else {"rows": split}
        options = own | {"lr": settings.lr, "weight_decay": decay}
        groups.append(ParamGroupConfig(pattern=pattern, optimizer_name=kind, optimizer_kwargs=options))
    dtype = torch.float32 if device_type == "cpu" else torch.bfloat16  # CPUs may emulate bf16 slowly
    return Optimizers.Config(
        implementation="for-loop" if device_type == "cpu" else "fused",
        param_groups=groups,
        optimizer_factory_kwargs_by_name={"Muon": {"lr": settings.lr, "dtype": dtype}},
    )


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
