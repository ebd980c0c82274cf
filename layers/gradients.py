"""Two functions with their gradients written out: those that autograd derives would take more time and memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def filter_taps(history: Tensor, weight: Tensor) -> Tensor:
    """Σ_j weight[:, j] · history[:, i + j] at each i: history (b, taps − 1 + t, d), weight (d, taps) → (b t d)."""
    return FilterTaps.apply(history, weight)


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + tril(a, −1))⁻¹ of each matrix (… n n)."""
    return UnitLowerInverse.apply(a)


class FilterTaps(torch.autograd.Function):
    """One pass a tap over memory as it lies, (b, t, d).

    torch's conv1d wants (b, d, t): with the transposition there and back it takes over twice the time on a CPU, forward
    and backward, and leaves the delta rule a layout that it must copy again.
    """

    @staticmethod
    def forward(ctx: Any, history: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(history, weight)
        carried = weight.shape[1] - 1
        t = history.shape[1] - carried
        y = history[:, carried:] * weight[:, carried]
        for j in range(carried):
            y.addcmul_(history[:, j : j + t], weight[:, j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        history, weight = ctx.saved_tensors
        t = grad.shape[1]
        to_history = torch.zeros_like(history)
        to_weight = torch.empty_like(weight)
        for j in range(weight.shape[1]):
            to_history[:, j : j + t].addcmul_(grad, weight[:, j])
            to_weight[:, j] = (grad * history[:, j : j + t]).sum((0, 1))
        return to_history, to_weight


class UnitLowerInverse(torch.autograd.Function):
    """The gradient, −tril(Tᵀ G Tᵀ, −1), is two products instead of two more solves."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return -(inverse.mT @ grad @ inverse.mT).tril(-1)
