"""Linear maps, in fp32 through whichever library the processor is faster with.

In bf16 torch multiplies through oneDNN. In fp32 it does through MKL, which uses AVX-512 on Intel's processors alone; on
others oneDNN is more than twice as fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.backends import choose, choose_for

FEW = 16  # rows below which a call costs more than the faster product saves


def linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, "n"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "*batch n"]:
    """x weightᵀ + bias.

    Args:
        backend: "torch" (F.linear) or "onednn" (fp32 on a CPU; under autocast F.linear, which multiplies in bf16);
            "auto" picks, and leaves a few rows to F.linear.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    exact, backend = x.dtype == weight.dtype == torch.float32, under_autocast(x, backend)
    if backend != "auto":
        through_onednn = choose("linear", backend, x) == "onednn" and exact and x.numel() > 0
    else:
        few = not torch.compiler.is_exporting() and x.numel() < FEW * x.shape[-1]  # what is exported serves any length
        through_onednn = exact and not few and choose("linear", "auto", x) == "onednn"
    if not through_onednn:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _TimesTransposed.apply(rows, weight) if torch.is_grad_enabled() else _through_onednn(rows, weight)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def spans(count: int, size: int, least: int = FEW) -> list[tuple[int, int]]:
    """Where parts of `size` rows of `count` begin and end.

    A rest of fewer than `least` rows joins the part before it: products, attention and the delta rule of so few take
    other ways, whose last bits are their own.
    """
    if count < size + least:  # said apart: a graph that is traced must not depend on more than this
        return [(0, count)]
    begins = list(range(0, count - least + 1, size))
    return list(zip(begins, [*begins[1:], count], strict=True))


class Linear(nn.Linear):
    """torch's, through `linear`."""

    backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)


def product(
    a: Float[Tensor, "m k"],
    b: Float[Tensor, "n k"],
    *,
    out: Float[Tensor, "m n"] | None = None,
    backend: str = "auto",
) -> Tensor:
    """a bᵀ without gradients, for matrices in any order of rows and columns, by a backend of `linear`.

    `out`, where given, takes the result.
    """
    if choose("linear", backend, a) == "onednn":
        y = _through_onednn(a, b)
        return y if out is None else out.copy_(y)
    if out is None or out.dtype == a.dtype:
        return torch.mm(a, b.mT, out=out)
    return out.copy_(a @ b.mT)


def under_autocast(x: Tensor, backend: str) -> str:
    """The backend of products that autocast makes of x: torch's, in another dtype, whatever was named for its own.

    Raises: as `linear`.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return backend
    choose_for("linear", backend, x.device, torch.float32)  # the weights'; x is often of a product before
    return "torch"


def _through_onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _TimesTransposed(torch.autograd.Function):
    """a bᵀ whose gradients are of the same kind, so that they too go through oneDNN and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _through_onednn(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        to_a = _TimesTransposed.apply(grad, b.mT) if ctx.needs_input_grad[0] else None
        to_b = _TimesTransposed.apply(grad.mT, a.mT) if ctx.needs_input_grad[1] else None
        return to_a, to_b
