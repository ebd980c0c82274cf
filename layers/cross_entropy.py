"""Cross-entropy of a linear head without all logits in memory: some rows at a time, gradients made with them."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from layers.dispatch.backends import choose
from layers.linear import linear, product, under_autocast
from layers.norm import at_least_fp32

ROWS = 256  # at least so many at a time, or the sum of the weight's gradients costs more than the products
LOGITS = 1 << 23  # at a time, where that is more


def linear_cross_entropy(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocab width"],
    target: Int[Tensor, "n"],
    *,
    backend: str = "auto",
    linear_backend: str = "auto",
) -> Float[Tensor, ""]:
    """Σ −ln softmax(hidden weightᵀ)[target], summed in fp32 or better; products in autocast's dtype under autocast.

    Its gradients are those of `F.cross_entropy(linear(hidden, weight), target, reduction="sum")`, made in the forward
    pass where they will be asked for, while a part's logits are there. They cannot be differentiated again.

    Args:
        backend: "torch", or "fla" (CUDA; where gradients are taken), whose gradient of the weight is rounded to the
            products' dtype before it reaches a weight of more; "auto" picks.
        linear_backend: of the products where "torch" runs, as in `linear`.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    dtype, linear_backend = hidden.dtype, under_autocast(hidden, linear_backend)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(dtype)
        if choose("cross_entropy", backend, hidden) == "fla" and torch.is_grad_enabled() and len(hidden):
            from fla.modules import FusedLinearCrossEntropyLoss

            return FusedLinearCrossEntropyLoss(reduction="sum")(hidden, target, weight.to(dtype))
        return _Summed.apply(hidden, weight, target, linear_backend)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
        # Under autograd's Function gradients are always off: what is asked for is in needs_input_grad.
        wanted = any(ctx.needs_input_grad)
        summed = _summed_op if torch.compiler.is_compiling() else _summed
        loss, *gradients = summed(hidden, weight, target, backend, wanted)
        ctx.save_for_backward(*(gradients if wanted else ()))
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * grad.to(to_hidden.dtype), (to_weight * grad).to(ctx.dtype), None, None


def _summed(
    hidden: Tensor, weight: Tensor, target: Tensor, backend: str, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients if `wanted`."""
    low = weight.to(hidden.dtype)
    loss = at_least_fp32(hidden.new_zeros(()))
    to_hidden, to_weight = _gradients(hidden, weight, wanted)
    rows = max(ROWS, LOGITS // len(weight))
    for i in range(0, len(hidden), rows):
        part, labels = hidden[i : i + rows], target[i : i + rows, None]
        logs = F.log_softmax(at_least_fp32(linear(part, low, backend=backend)), dim=-1)
        loss = loss - logs.gather(1, labels).sum()
        if wanted:
            to_logits = logs.exp_().scatter_add_(1, labels, -torch.ones_like(logs[:, :1])).to(hidden.dtype)
            to_hidden[i : i + rows] = product(to_logits, low.mT, backend=backend)
            to_weight += product(to_logits.mT, part.mT, backend=backend)
    return loss, to_hidden, to_weight


# A traced graph has no number of rows to loop over: it takes this as an operator, whole.
_summed_op = torch.library.custom_op("qwen3next::summed_cross_entropy", _summed, mutates_args=())


@_summed_op.register_fake
def _(hidden: Tensor, weight: Tensor, _target: Tensor, _backend: str, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    return at_least_fp32(hidden.new_zeros(())), *_gradients(hidden, weight, wanted)


def _gradients(hidden: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Where gradients go: nothing where they are not wanted."""
    exact = at_least_fp32(weight).dtype
    if not wanted:
        return hidden.new_empty(0), weight.new_empty(0, dtype=exact)
    return torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact)
