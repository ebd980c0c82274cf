"""Products through oneDNN, and how long calls are cut into parts.

In bf16 torch multiplies through oneDNN. In fp32 it multiplies through MKL, which uses AVX-512 on Intel's processors
alone; on others oneDNN is more than twice as fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layers.dispatch.backends import choose
from layers.dispatch.registry import implements, on_auto

FEW = 16  # rows below which a call to oneDNN costs more than its faster product saves


def _exact(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an fp32 product: autocast makes it one in bf16, which torch multiplies through oneDNN itself."""
    return x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def _for_torch(x: Tensor, weight: Tensor, _bias: Tensor | None = None) -> bool:
    # An exported graph serves any number of rows, so it must not depend on this one.
    few = not torch.compiler.is_exporting() and x.numel() < FEW * x.shape[-1]
    return few or not _exact(x, weight) or _of_its_own_kind(weight)


def _of_its_own_kind(weight: Tensor) -> bool:
    """Whether the weight stands for another, as quantised and sharded tensors do: F.linear asks it what to do."""
    return type(weight) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(weight)


@on_auto("linear", where=_for_torch)
def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@implements("linear", "onednn")
def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _exact(x, weight) or x.numel() == 0:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _TimesTransposed.apply(rows, weight) if torch.is_grad_enabled() else _through_onednn(rows, weight)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _through_onednn(a: Tensor, b: Tensor) -> Tensor:
    return _product_op(a, b) if torch.compiler.is_compiling() else _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


# Inductor takes torch's operator for a fusion of its own making, with a constant weight, and fails on any other.
_product_op = torch.library.custom_op("qwen3next::onednn_product", _product, mutates_args=())


@_product_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


class _TimesTransposed(torch.autograd.Function):
    """a bᵀ whose gradients are products of the same kind: they use oneDNN too, and can be differentiated again."""

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


def product(
    a: Float[Tensor, "m k"],
    b: Float[Tensor, "n k"],
    *,
    out: Float[Tensor, "m n"] | None = None,
    backend: str = "auto",
) -> Tensor:
    """a bᵀ without gradients, for matrices in any order of rows and columns, by a backend of `linear`.

    Args:
        out: takes the result, where given.
    Raises: as `linear`.
    """
    if choose("linear", backend, a) == "onednn":
        y = _through_onednn(a, b)
        return y if out is None else out.copy_(y)
    if out is None or out.dtype == a.dtype:
        return torch.mm(a, b.mT, out=out)
    return out.copy_(a @ b.mT)


def spans(count: int, size: int, least: int = FEW) -> list[tuple[int, int]]:
    """Where parts of `size` rows of `count` begin and end.

    A rest of fewer than `least` rows joins the part before it: products, attention and the delta rule take other ways
    for so few rows, with other last bits.
    """
    if count < size + least:  # a case of its own: a traced graph must not depend on more than this comparison
        return [(0, count)]
    begins = list(range(0, count - least + 1, size))
    return list(zip(begins, [*begins[1:], count], strict=True))
