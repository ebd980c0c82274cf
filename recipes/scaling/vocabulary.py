"""Embedding and head divided by rows of the vocabulary, and a cross-entropy that never has all logits in one place."""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import qwen3next as q
from layers.hook_point import HookPoint
from layers.linear import linear
from layers.segments import Segments
from recipes.scaling.regions import all_reduced, copied, local, summed

ROWS = 1024  # tokens whose logits are in memory together


def divided_embedding(model: q.Qwen3Next, mesh: DeviceMesh) -> None:
    """Each process looks up the tokens whose rows it holds."""
    embedding, group, rank = model.embed_tokens, mesh.get_group(), mesh.get_local_rank()

    def forward(ids: Tensor) -> Tensor:
        weight = local(embedding, "weight")
        place = ids - rank * len(weight)
        here = (place >= 0) & (place < len(weight))
        rows = F.embedding(place.clamp(0, len(weight) - 1), weight).masked_fill(~here[..., None], 0.0)
        return summed(rows, group)

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def divided_head(model: q.Qwen3Next, mesh: DeviceMesh) -> None:
    """The losses of the model by logits that are divided over the mesh; hooks on logits do not fire.

    The head itself gathers all logits, for measures without gradients.
    """
    group, rank = mesh.get_group(), mesh.get_local_rank()

    def logits(rows: Tensor) -> Tensor:
        own = linear(rows, local(model.lm_head, "weight")).contiguous()
        parts = [torch.empty_like(own) for _ in range(mesh.size())]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts, -1)

    def summed_cross_entropy(
        self: Any, hidden: Tensor, place: Tensor, target: Tensor, segments: Segments, hook: HookPoint, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        del segments, hook
        rows, weight = copied(hidden[place], group), local(self.lm_head, "weight")
        loss = squares = rows.new_zeros((), dtype=torch.float32)
        for some, wanted in zip(rows.split(ROWS), target.split(ROWS), strict=True):  # one part where none has a target
            one, squared = checkpoint(
                cross_entropy, some, weight, wanted, rank * len(weight), z_loss, group, use_reentrant=False
            )
            loss, squares = loss + one, squares + squared
        return loss, squares

    model.lm_head.forward = logits  # type: ignore[method-assign, assignment]
    model._summed_cross_entropy = MethodType(summed_cross_entropy, model)  # type: ignore[method-assign]


def cross_entropy(
    rows: Tensor, weight: Tensor, target: Tensor, first: int, z_loss: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Σ −ln p(target) + z_loss · logsumexp², and Σ logsumexp² without gradient, in fp32.

    Args:
        weight: (v, width) the rows of the head from number `first` on; the others are with the group.
    """
    logits = linear(rows, weight).float()
    largest = all_reduced(logits.detach().amax(-1), group, dist.ReduceOp.MAX)
    logsumexp = largest + summed((logits - largest[:, None]).exp().sum(-1), group).log()
    place = target - first
    here = (place >= 0) & (place < len(weight))
    found = logits.gather(-1, place.clamp(0, len(weight) - 1)[:, None])[:, 0].masked_fill(~here, 0.0)
    squared = logsumexp.square().sum()
    loss = (logsumexp - summed(found, group)).sum() + z_loss * squared
    return loss, squared.detach() if z_loss else torch.zeros_like(loss.detach())
