"""x times a weight in groups, without keeping the dequantised weight."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.cpp.build import missing
from layers.cpp.group_ops import dequantise_groups, group_linear, knows_groups
from layers.dispatch.autocast import product_dtype
from layers.linear import linear
from layers.quantised.group_weight import GroupWeight

FEW = (
    16  # rows of x up to which codes are multiplied as they are; beyond, a large product of dequantised ones is faster
)
TILE = 2**22  # weights that are dequantised at a time
FAST = (torch.float32, torch.bfloat16)  # dtypes of compiled code


def multiply(
    x: Float[Tensor, "*batch in"], weight: GroupWeight, bias: Tensor | None = None, *, backend: str = "auto"
) -> Float[Tensor, "*batch out"]:
    """x times the transpose of the dequantised weight (out, in), in x's dtype; gradients reach x and bias alone.

    Args:
        backend: of `linear`. "torch" is the definition; "auto" uses compiled code on the CPU, which for a few rows
            multiplies the codes themselves in fp32: there the weight is not rounded to x's dtype first.
    Raises: as `linear`.
    """
    rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
    y = _Product.apply(rows, *weight.tensors, backend) if torch.is_grad_enabled() else _product(rows, weight, backend)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


def dequantised(weight: GroupWeight, dtype: torch.dtype, backend: str = "auto") -> Float[Tensor, "out in"]:
    """`weight.dequantise()` rounded to a dtype; the same bits by any backend."""
    if backend != "torch" and compiled(weight.codes, dtype):
        return dequantise_groups(*weight.tensors, dtype)
    return weight.dequantise().to(dtype)


def compiled(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether compiled code takes codes like x for products in this dtype."""
    return x.device.type == "cpu" and dtype in FAST and missing() is None


def _product(x: Tensor, weight: GroupWeight, backend: str) -> Tensor:
    few = len(x) <= FEW and knows_groups(x.shape[1], weight.group_size)
    if backend == "auto" and few and not torch.compiler.is_exporting() and compiled(x, x.dtype):
        return group_linear(x, *weight.tensors)
    step, rows = max(TILE // max(x.shape[1], 1), 1), weight.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        tiles = [weight.at(slice(a, a + step)) for a in range(0, rows, step)]
        found = [linear(x, dequantised(tile, x.dtype, backend), backend=backend) for tile in tiles]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


class _Product(torch.autograd.Function):
    """Saves the codes for the backward pass, where autograd would save the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(codes, scale, zero)
        ctx.backend = backend
        return _product(x, GroupWeight(codes, scale, zero), backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight = GroupWeight(*ctx.saved_tensors)
        with torch.autocast(grad.device.type, enabled=False):
            return F.linear(grad, dequantised(weight, grad.dtype, ctx.backend).mT), None, None, None, None
