"""What surrounds the products of experts, in C++: sort, weight, sum. See ops.py."""

import torch
from torch import Tensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, call, names, operator


@operator("(Tensor out, Tensor weights, Tensor places, bool exact) -> Tensor")
def combine(out: Tensor, weights: Tensor, places: Tensor, exact: bool) -> Tensor:
    """Σ_j weights[i, j] · out[places[i, j]] for each token i, added in fp32 in the order of places; left so if `exact`.

    weights (n k) are fp32; places (n k) name each row of out (n · k, d) once, as those of `route` do.
    """
    out, weights, places = _combine_operands("combine", out, weights, places)
    y = out.new_empty(places.shape[0], out.shape[1], dtype=FP32 if exact else out.dtype)
    call(f"combine_{names(out, y)}", out, weights, places, y, *places.shape, out.shape[1])
    return y


@operator("(Tensor out, Tensor weights, Tensor places, Tensor to_y) -> Tensor[]")
def spread(out: Tensor, weights: Tensor, places: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of `combine`'s out and weights."""
    out, weights, places = _combine_operands("spread", out, weights, places)
    to_y = operand("spread: to_y", to_y, (places.shape[0], out.shape[1]), FP32, out.dtype)
    grads = [torch.empty_like(out), torch.empty_like(weights)]
    call(f"spread_{names(out, to_y)}", out, weights, places, to_y, *grads, *places.shape, out.shape[1])
    return grads


def _combine_operands(name: str, out: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if out.ndim != 2 or places.ndim != 2:
        raise ValueError(
            f"{name}: out must be (n · k, d) and places (n, k); they are {tuple(out.shape)} and {tuple(places.shape)}."
        )
    out = operand(f"{name}: out", out, tuple(out.shape), FP32, BF16)
    weights = operand(f"{name}: weights", weights, tuple(places.shape), FP32)
    places = operand(f"{name}: places", places, tuple(places.shape), torch.int64)
    if not call("each_once", places, places.numel(), out.shape[0]):
        raise ValueError(f"{name}: places must name each of the {out.shape[0]} rows of out once.")
    return out, weights, places


@operator("(Tensor indices, int experts) -> Tensor[]")
def route(indices: Tensor, experts: int) -> list[Tensor]:
    """Sort the choices (n k) by expert: the token of each place, the place of each choice, where each expert ends.

    Raises: ValueError for an index that names no expert.
    """
    if indices.ndim != 2 or experts < 1 or indices.numel() >= 2**31:
        raise ValueError(f"route: indices must be (n, k) for at least one expert, they are {tuple(indices.shape)}.")
    indices = operand("route: indices", indices, tuple(indices.shape), torch.int64)
    token, places = indices.new_empty(indices.numel()), torch.empty_like(indices)
    ends = indices.new_empty(experts, dtype=torch.int32)
    if not call("route", indices, token, places, ends, indices.numel(), indices.shape[1], experts):
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"Tokens are routed to the experts {low} to {high}, and there are 0 to {experts - 1}.")
    return [token, places, ends]
