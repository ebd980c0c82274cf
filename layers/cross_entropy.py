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


@implements("cross_entropy", "whole", definition=True)
def whole(hidden: Tensor, weight: Tensor, target: Tensor, *, linear_backend: str = "auto") -> Tensor:
    """The definition, with all logits in memory. No model uses it: tests compare the backends with it."""
    logits = linear(hidden, weight.to(hidden.dtype), backend=linear_backend)
    return F.cross_entropy(at_least_fp32(logits), target, reduction="sum")
