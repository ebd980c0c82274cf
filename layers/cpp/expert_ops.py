"""What surrounds the products of experts, in C++: sort, weight, sum. See ops.py."""

import torch
from torch import Tensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, call, names, operator


@operator("(Tensor out, Tensor weights, Tensor inverse, bool exact) -> Tensor")
def combine(out: Tensor, weights: Tensor, inverse: Tensor, exact: bool) -> Tensor:
    """Σ_j weights[i, j] · out[inverse[i, j]] for each token i, added in fp32 in the order of inverse; fp32 if `exact`.

    weights (n k) are fp32; inverse (n k) name each row of out (n · k, d) once, as those of `permute` do.
    """
    out, weights, inverse = _combine_operands("combine", out, weights, inverse)
    y = out.new_empty(inverse.shape[0], out.shape[1], dtype=FP32 if exact else out.dtype)
    call(f"combine_{names(out, y)}", out, weights, inverse, y, *inverse.shape, out.shape[1])
    return y


@operator("(Tensor out, Tensor weights, Tensor inverse, Tensor to_y) -> Tensor[]")
def combine_backward(out: Tensor, weights: Tensor, inverse: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of `combine`'s out and weights."""
    out, weights, inverse = _combine_operands("combine_backward", out, weights, inverse)
    to_y = operand("combine_backward: to_y", to_y, (inverse.shape[0], out.shape[1]), FP32, out.dtype)
    grads = [torch.empty_like(out), torch.empty_like(weights)]
    call(f"combine_backward_{names(out, to_y)}", out, weights, inverse, to_y, *grads, *inverse.shape, out.shape[1])
    return grads


def _combine_operands(name: str, out: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if out.ndim != 2 or inverse.ndim != 2:
        raise ValueError(
            f"{name}: out must be (n · k, d) and inverse (n, k), got {tuple(out.shape)} and {tuple(inverse.shape)}."
        )
    out = operand(f"{name}: out", out, tuple(out.shape), FP32, BF16)
    weights = operand(f"{name}: weights", weights, tuple(inverse.shape), FP32)
    inverse = operand(f"{name}: inverse", inverse, tuple(inverse.shape), torch.int64)
    if not call("each_once", inverse, inverse.numel(), out.shape[0]):
        raise ValueError(f"{name}: inverse must name each of the {out.shape[0]} rows of out once.")
    return out, weights, inverse


@operator("(Tensor indices, int experts) -> Tensor[]")
def permute(indices: Tensor, experts: int) -> list[Tensor]:
    """Sort the choices (n k) by expert: the token of each place, the place of each choice, where each expert ends.

    Raises: ValueError for an index that names no expert.
    """
    if indices.ndim != 2 or experts < 1 or indices.numel() >= 2**31:
        raise ValueError(f"permute: indices must be (n, k) for at least one expert, they are {tuple(indices.shape)}.")
    indices = operand("permute: indices", indices, tuple(indices.shape), torch.int64)
    token, inverse = indices.new_empty(indices.numel()), torch.empty_like(indices)
    ends = indices.new_empty(experts, dtype=torch.int32)
    if not call("permute", indices, token, inverse, ends, indices.numel(), indices.shape[1], experts):
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"Tokens are routed to the experts {low} to {high}, and there are 0 to {experts - 1}.")
    return [token, inverse, ends]
