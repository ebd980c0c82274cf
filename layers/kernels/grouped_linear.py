"""Many linear maps, each over its own run of rows: the products of experts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.cpp import ops
from layers.dispatch.autocast import product_dtype, under_autocast
from layers.kernels.linear import product

STEP = 16  # rows


def grouped_linear(
    x: Float[Tensor, "rows k"], weight: Float[Tensor, "e n k"], ends: Int32[Tensor, "e"], *, backend: str = "auto"
) -> Float[Tensor, "rows n"]:
    """Rows up to ends[0] times weight[0]ᵀ, up to ends[1] times weight[1]ᵀ, …; in autocast's dtype under autocast.

    `backend`: of `linear`, or "cpp" for one kernel that makes all products, on the CPU.
    """
    dtype = product_dtype(x)
    backend = backend if backend == "cpp" else under_autocast(x, backend)
    if x.device.type == "cpu":
        return _Grouped.apply(x.to(dtype), weight, ends, backend)
    return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=ends)


def wide(run: slice, rows: int) -> tuple[slice, slice]:
    """A run with as many neighbours out of `rows` as make it a multiple of STEP, and where the run lies in that.

    oneDNN compiles and keeps code for every number of rows, up to a megabyte each, so that there should be few.
    """
    n = min(-(-(run.stop - run.start) // STEP) * STEP, rows)
    begin = min(run.start, rows - n)
    return slice(begin, begin + n), slice(run.start - begin, run.stop - begin)


def _product_into(y: Tensor, run: slice, x: Tensor, weight: Tensor, backend: str) -> None:
    """y[run] = x[run] weightᵀ. It may write behind the run, where the next one writes its own rows."""
    more, here = wide(run, len(x))
    if here.start:
        y[run] = product(x[more], weight, backend=backend)[here]
    else:
        product(x[more], weight, out=y[more], backend=backend)


def runs(ends: Tensor) -> list[tuple[int, slice]]:
    """Number and rows of each map that has any."""
    last = ends.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *last[:-1]], last, strict=True)) if a < b]


class _Grouped(torch.autograd.Function):
    """Used on a CPU, where torch's gradient of the weights is transposed: a copy of it costs more than the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, backend: str) -> Tensor:
        low, ctx.backend = weight.to(x.dtype), backend
        ctx.save_for_backward(x, low, ends)
        ctx.dtype = weight.dtype
        return (_products_op if torch.compiler.is_compiling() else _products)(x, low, ends, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, low, ends = ctx.saved_tensors
        backward = _products_backward_op if torch.compiler.is_compiling() else _products_backward
        return *backward(x, low, ends, grad, ctx.dtype, ctx.backend), None, None


def _products(x: Tensor, weight: Tensor, ends: Tensor, backend: str) -> Tensor:
    if backend == "cpp":
        return ops.products(x, weight, ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, run in runs(ends):
        _product_into(y, run, x, weight[e], backend)
    return y


def _products_backward(
    x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        to_x, to_weight = ops.products_backward(x, weight, ends, grad, x.dtype if dtype == x.dtype else torch.float32)
        return to_x, to_weight.to(dtype)
    to_x, to_weight = torch.empty_like(x), torch.empty_like(weight, dtype=dtype)
    used = runs(ends)
    for e in set(range(len(weight))) - {e for e, _ in used}:
        to_weight[e] = 0.0
    with torch.autocast(x.device.type, enabled=False):
        for e, run in used:
            _product_into(to_x, run, grad, weight[e].mT, backend)
            more, here = wide(run, len(x))
            own = torch.zeros_like(x[more])
            own[here] = x[run]  # the neighbours have no part in this sum
            product(grad[more].mT, own.mT, out=to_weight[e], backend=backend)
    return to_x, to_weight


# A traced graph cannot loop over unknown numbers of rows: it takes these whole, as operators.
_products_op = torch.library.custom_op("qwen3next::grouped_products", _products, mutates_args=(), device_types="cpu")
_products_backward_op = torch.library.custom_op(
    "qwen3next::grouped_products_backward", _products_backward, mutates_args=(), device_types="cpu"
)


@_products_op.register_fake
def _(x: Tensor, weight: Tensor, _ends: Tensor, _backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_products_backward_op.register_fake
def _(x: Tensor, weight: Tensor, _ends: Tensor, _grad: Tensor, dtype: torch.dtype, _backend: str) -> tuple:
    return torch.empty_like(x), torch.empty_like(weight, dtype=dtype)
