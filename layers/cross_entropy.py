"""Cross-entropy of a linear head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from layers.dispatch.autocast import product_dtype, under_autocast
from layers.dispatch.backends import run
from layers.dispatch.registry import implements
from layers.linear import linear
from layers.norm import at_least_fp32


def linear_cross_entropy(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocab width"],
    target: Int[Tensor, "n"],
    *,
    backend: str = "auto",
    linear_backend: str = "auto",
) -> Float[Tensor, ""]:
    """Σ −ln softmax(hidden weightᵀ)[target], summed in fp32 or better; products in autocast's dtype under autocast.

    All backends compute the gradients in the forward pass, some rows at a time, so that not all logits are in memory.
    The gradients cannot be differentiated again.

    Args:
        backend: "torch", or "fla" (CUDA; where gradients are taken), whose gradient of the weight is rounded to the
            products' dtype before it reaches a weight of more precision; "auto" picks.
        linear_backend: of the products where "torch" runs, as in `linear`.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    linear_backend, hidden = under_autocast(hidden, linear_backend), hidden.to(product_dtype(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        return run("cross_entropy", backend, hidden, hidden, weight, target, linear_backend=linear_backend)


def linear_cross_entropy_and_z(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocab width"],
    target: Int[Tensor, "n"],
    *,
    z_loss: float,
    backend: str = "auto",
    linear_backend: str = "auto",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Σ −ln p(target) + z_loss · logsumexp(logits)², and Σ logsumexp² without gradient; else as linear_cross_entropy.

    Raises: RuntimeError for the "fla" backend, which does not give the second sum.
    """
    linear_backend, hidden = under_autocast(hidden, linear_backend), hidden.to(product_dtype(hidden))
    options = {"z_loss": z_loss, "linear_backend": linear_backend}
    with torch.autocast(hidden.device.type, enabled=False):
        return run("cross_entropy.z", backend, hidden, hidden, weight, target, **options)


def summed(
    logits: Float[Tensor, "n vocab"], target: Int[Tensor, "n"], z_loss: float = 0.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Σ −ln softmax(logits)[target] + z_loss · logsumexp², and Σ logsumexp² without gradient (zero without z_loss)."""
    logits = at_least_fp32(logits)
    loss = F.cross_entropy(logits, target, reduction="sum")
    if not z_loss:
        return loss, torch.zeros_like(loss)
    squared = logits.logsumexp(-1).square().sum()
    return loss + z_loss * squared, squared.detach()


@implements("cross_entropy", "whole", definition=True)
def whole(hidden: Tensor, weight: Tensor, target: Tensor, *, linear_backend: str = "auto") -> Tensor:
    """The definition, with all logits in memory. No model uses it: tests compare the backends with it."""
    return whole_and_z(hidden, weight, target, z_loss=0.0, linear_backend=linear_backend)[0]


@implements("cross_entropy.z", "whole", definition=True)
def whole_and_z(
    hidden: Tensor, weight: Tensor, target: Tensor, *, z_loss: float, linear_backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return summed(linear(hidden, weight.to(hidden.dtype), backend=linear_backend), target, z_loss)
