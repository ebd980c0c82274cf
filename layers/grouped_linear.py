"""Many linear maps, each over its own run of rows: the products of experts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from layers.backends import choose
from layers.linear import product


def grouped_linear(
    x: Float[Tensor, "rows k"], weight: Float[Tensor, "e n k"], ends: Int32[Tensor, "e"]
) -> Float[Tensor, "rows n"]:
    """Rows up to ends[0] times weight[0]ᵀ, up to ends[1] times weight[1]ᵀ, …; in autocast's dtype under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if choose("linear", "auto", x) == "onednn":
        return _Grouped.apply(x, weight, ends)
    return F.grouped_mm(x, weight.mT, offs=ends)


class _Grouped(torch.autograd.Function):
    """One product a run through oneDNN, where torch's own fp32 products are slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for e, run in runs(ends):
            y[run] = product(x[run], weight[e])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, ends = ctx.saved_tensors
        to_x, to_weight = torch.empty_like(x), torch.empty_like(weight)
        used = runs(ends)
        for e in set(range(len(weight))) - {e for e, _ in used}:
            to_weight[e] = 0.0
        for e, run in used:
            to_x[run] = product(grad[run], weight[e].mT)
            to_weight[e] = product(grad[run].mT, x[run].mT)
        return to_x, to_weight, None


def runs(ends: Tensor) -> list[tuple[int, slice]]:
    """Number and rows of each map that has any."""
    last = ends.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *last[:-1]], last, strict=True)) if a < b]
