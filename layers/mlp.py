"""The dense feed-forward."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.deprecation import renamed_arguments
from layers.dispatch.backends import run
from layers.dispatch.registry import implements
from layers.linear import Linear

Inner = Float[Tensor, "*batch inner"]


def activate(gate: Inner, up: Inner, *, backend: str = "auto") -> Inner:
    """silu(gate) · up.

    Args:
        backend: of "elementwise": "torch", "cpp" (CPU), "fla" (as "torch"); "auto" picks.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    return run("elementwise.swiglu", backend, gate, gate, up)


@implements("elementwise.swiglu", "fla")
@implements("elementwise.swiglu", "torch", definition=True)
def swiglu(gate: Inner, up: Inner) -> Inner:
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases. Source: arXiv:2002.05202."""

    @renamed_arguments(width="hidden_size", inner="intermediate_size")
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.backend = "auto"
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.down_proj(activate(self.gate_proj(x), self.up_proj(x), backend=self.backend))
