"""Linear maps: torch's, or another library's where the processor is faster with it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.dispatch.backends import run
from layers.dispatch.registry import implements


def linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, "n"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "*batch n"]:
    """x weightᵀ + bias.

    Args:
        backend: "torch" (F.linear), "onednn" (fp32 on a CPU) or "widened" (bf16 on a CPU, made in fp32); for another
            dtype, as autocast may choose, both call F.linear. "auto" picks, and leaves a few rows to F.linear.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    return run("linear", backend, weight, x, weight, bias)  # under autocast x may have another dtype


@implements("linear", "torch", definition=True)
def product_and_bias(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's, through `linear`."""

    backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)


def dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that a linear map computes in, wherever an adapter around it keeps its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return weight.dtype if weight is not None and weight.is_floating_point() else otherwise
