"""Cross-entropy without all logits in memory: some rows at a time, their gradients made with them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.dispatch.registry import implements
from layers.kernels.linear import product
from layers.linear import linear
from layers.norm import at_least_fp32

ROWS = 256  # at least so many at a time, or adding up the weight's gradients costs more than the products
LOGITS = 1 << 23  # at a time, where that is more: on a CPU they stay near its caches
SHARE = 64  # on a GPU logits in fp32 take one part in so many of its memory: each part reads all of the weight


@implements("cross_entropy", "torch")
def rows_at_a_time(hidden: Tensor, weight: Tensor, target: Tensor, *, linear_backend: str = "auto") -> Tensor:
    return _Summed.apply(hidden, weight, target, linear_backend, 0.0)[0]


@implements("cross_entropy.z", "torch")
def rows_and_z(
    hidden: Tensor, weight: Tensor, target: Tensor, *, z_loss: float, linear_backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return _Summed.apply(hidden, weight, target, linear_backend, z_loss)


@implements("cross_entropy", "fla")
def fla(hidden: Tensor, weight: Tensor, target: Tensor, *, linear_backend: str = "auto") -> Tensor:
    """As "torch" where no gradients are taken, or there are no rows."""
    if not torch.is_grad_enabled() or not len(hidden):
        return rows_at_a_time(hidden, weight, target, linear_backend=linear_backend)
    from fla.modules import FusedLinearCrossEntropyLoss

    return FusedLinearCrossEntropyLoss(reduction="sum")(hidden, target, weight.to(hidden.dtype))


@implements("cross_entropy.z", "fla")
def fla_and_z(_hidden: Tensor, _weight: Tensor, _target: Tensor, **_options: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError('The "fla" backend of cross_entropy has no z loss: choose "torch", or logit_z_loss_coef 0.')


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, backend: str, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        # Inside a Function gradients are always off: whether they are wanted is in needs_input_grad.
        wanted = any(ctx.needs_input_grad)
        summed = _summed_op if torch.compiler.is_compiling() else _summed
        loss, squared, *gradients = summed(hidden, weight, target, backend, z_loss, wanted)
        ctx.save_for_backward(*(gradients if wanted else ()))
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(squared)
        return loss, squared

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * grad.to(to_hidden.dtype), (to_weight * grad).to(ctx.dtype), None, None, None


def _summed(
    hidden: Tensor, weight: Tensor, target: Tensor, backend: str, z_loss: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, Σ logsumexp² (zero without z_loss), and the loss's gradients if `wanted`."""
    low = weight.to(hidden.dtype)
    loss, squared = at_least_fp32(hidden.new_zeros(())), at_least_fp32(hidden.new_zeros(()))
    to_hidden, to_weight = _gradients(hidden, weight, wanted)
    rows = max(ROWS, _logits_at_once(hidden.device) // len(weight))
    for i in range(0, len(hidden), rows):
        part, labels = hidden[i : i + rows], target[i : i + rows, None]
        logits = at_least_fp32(linear(part, low, backend=backend))
        total = logits.logsumexp(-1, keepdim=True) if z_loss else None
        logs = F.log_softmax(logits, dim=-1)
        loss = loss - logs.gather(1, labels).sum()
        if total is not None:
            squared = squared + total.square().sum()
        if wanted:
            to_logits = logs.exp_()
            if total is not None:  # d logsumexp² = 2 logsumexp · softmax
                to_logits *= 1 + 2 * z_loss * total
            to_logits = to_logits.scatter_add_(1, labels, -torch.ones_like(logs[:, :1])).to(hidden.dtype)
            to_hidden[i : i + rows] = product(to_logits, low.mT, backend=backend)
            to_weight += product(to_logits.mT, part.mT, backend=backend)
    return loss + z_loss * squared, squared, to_hidden, to_weight


def _logits_at_once(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return LOGITS
    return torch.cuda.get_device_properties(device).total_memory // (4 * SHARE)


# A traced graph cannot loop over an unknown number of rows: it takes this whole, as an operator.
_summed_op = torch.library.custom_op("qwen3next::summed_cross_entropy", _summed, mutates_args=())


@_summed_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, _target: Tensor, _backend: str, _z_loss: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = at_least_fp32(hidden.new_zeros(())), at_least_fp32(hidden.new_zeros(()))
    return *sums, *_gradients(hidden, weight, wanted)


def _gradients(hidden: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Where gradients are added up: empty where they are not wanted."""
    exact = at_least_fp32(weight).dtype
    if not wanted:
        return hidden.new_empty(0), weight.new_empty(0, dtype=exact)
    return torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact)
