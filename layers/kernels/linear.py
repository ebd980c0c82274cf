"""Products through oneDNN and in fp32, and how long calls are cut into parts.

In bf16 torch multiplies through oneDNN, which is slow on processors without bf16 instructions: there "widened" makes
the product in fp32. In fp32 torch multiplies through MKL, which uses AVX-512 on Intel's processors alone; on others
oneDNN is more than twice as fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layers.dispatch.backends import choose, choose_for
from layers.dispatch.registry import implements, on_auto

FEW = 16  # rows below which a call to oneDNN costs more than its faster product saves
TILE = 2**22  # weights that are widened at a time


def _multiplied(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype in which x and weight are multiplied, autocast's where it is on; None where they differ."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == weight.dtype else None


def _exact(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an fp32 product of fp32 numbers."""
    return x.dtype == weight.dtype == torch.float32 == _multiplied(x, weight)


def _for_torch(x: Tensor, weight: Tensor, _bias: Tensor | None = None) -> bool:
    # An exported graph serves any number of rows, so it must not depend on this one.
    few = not torch.compiler.is_exporting() and x.numel() < FEW * x.shape[-1]
    if few or x.device.type != "cpu" or _of_its_own_kind(weight):
        return True
    dtype = _multiplied(x, weight)
    if dtype == torch.bfloat16:
        return choose_for("linear", "auto", x.device, dtype) != "widened"
    return not _exact(x, weight)


def _of_its_own_kind(weight: Tensor) -> bool:
    """Whether the weight stands for another, as quantised and sharded tensors do: F.linear asks it what to do."""
    return type(weight) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(weight)


@on_auto("linear", where=_for_torch)
def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@on_auto("linear", where=lambda x, weight, _bias=None: _multiplied(x, weight) == torch.bfloat16)
@implements("linear", "widened")
def widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product of bf16 numbers, made in fp32 and rounded once. Other products are torch's."""
    if _multiplied(x, weight) != torch.bfloat16 or x.numel() == 0:
        return F.linear(x, weight, bias)
    rows, low = x.reshape(-1, x.shape[-1]), torch.bfloat16
    y = _Widened.apply(rows, weight, low) if torch.is_grad_enabled() else _wide(rows, weight, low)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(low)


def _wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a bᵀ of numbers rounded to bf16, made in fp32, in `dtype`. A few rows of b are widened at a time."""
    with torch.autocast(a.device.type, enabled=False):
        a, step = a.to(torch.bfloat16).float(), max(TILE // max(b.shape[1], 1), 1)
        parts = [b[begin : begin + step].to(torch.bfloat16).float() for begin in range(0, len(b), step)]
        found = [product(a, part).to(dtype) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class _Widened(torch.autograd.Function):
    """`_wide` whose gradients are products of the same kind, in the dtype of what they belong to."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a, b)
        return _wide(a, b, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        to_a = _Widened.apply(grad, b.mT, a.dtype) if ctx.needs_input_grad[0] else None
        to_b = _Widened.apply(grad.mT, a.mT, b.dtype) if ctx.needs_input_grad[1] else None
        return to_a, to_b, None


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
    chosen = choose("linear", backend, a)
    if chosen != "torch":
        y = _through_onednn(a, b) if chosen == "onednn" else _wide(a, b, a.dtype if out is None else out.dtype)
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
