"""Muon: momentum whose update is made orthogonal, for the matrices of a model, experts as one batch.

The update of a matrix is the nearest matrix with equal singular values, times a factor. torch.optim.Muon takes single
2D matrices. Here a parameter may be a stack of matrices (e m n), one an expert, or several projections in one, whose
rows are split: q, k and v of a Gated DeltaNet layer, gate and up of an expert.

Source: https://kellerjordan.github.io/posts/muon/; the scale is that of arXiv:2502.16982, section 2.2.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layers.gated_deltanet import GatedDeltaNet
from layers.moe import Experts, SparseMoE

COEFFICIENTS = 3.4445, -4.7750, 2.0315
STEPS = 5


def orthogonalised(x: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Matrices (… m n) with their singular values moved near 1, by five Newton-Schulz steps in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(STEPS):
        gram = y @ y.mT  # the smaller one
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    The factor 0.2 √max(m, n) gives the update the root mean square of AdamW's, so both take the same learning rate.

    Args:
        params: groups; "rows" of a group are the rows of each projection of its parameters, () for one projection.
        dtype: of the Newton-Schulz steps.
    Raises: ValueError for a parameter that is no matrix or stack of matrices.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rows": ()})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon takes matrices or stacks of them, not {tuple(p.shape)}: give it to AdamW.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = p.grad.lerp(buffer, group["momentum"])
                p.add_(self.direction(update, group["rows"]), alpha=-group["lr"])
        return loss

    def direction(self, update: Tensor, rows: tuple[int, ...]) -> Tensor:
        """The step of a parameter at a rate of 1: its matrices (… m n) made orthogonal, and scaled.

        Args:
            rows: of each projection; () for one.
        """
        parts = []
        for part in update.split(list(rows) or update.shape[-2], dim=-2):
            scale = 0.2 * max(part.shape[-2:]) ** 0.5
            parts.append(orthogonalised(part, dtype=self.dtype).to(update.dtype) * scale)
        return torch.cat(parts, dim=-2)


def matrices(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The parameters that Muon trains, with the rows of their projections.

    These are linear maps and experts. Left to AdamW are the router, embedding and head, whose rows stand for single
    experts or tokens; gates of one row; convolutions; and everything of one dimension.
    """
    routers = {id(m.router.weight) for m in model.modules() if isinstance(m, SparseMoE)}
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    ends |= {id(head.weight)} if isinstance(head, nn.Linear) else set()
    found: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            p = module.weight
            if id(p) not in routers | ends and min(p.shape) > 1:
                found.setdefault(p, ())
        elif isinstance(module, Experts):
            inner = module.gate_up_proj.shape[-2] // 2
            found[module.gate_up_proj], found[module.down_proj] = (inner, inner), ()
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            found[module.in_proj_qkv.weight] = module.split
    return found
