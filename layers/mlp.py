"""The dense feed-forward."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.dispatch.backends import choose
from layers.kernels.cpp import functions as native
from layers.linear import Linear


def activate(
    gate: Float[Tensor, "*batch inner"], up: Float[Tensor, "*batch inner"], *, backend: str = "auto"
) -> Float[Tensor, "*batch inner"]:
    """silu(gate) · up."""
    if choose("elementwise", backend, gate) == "cpp" and (gate.dtype, gate.shape) == (up.dtype, up.shape):
        width = gate.shape[-1]
        return native.swiglu(gate.reshape(-1, width), up.reshape(-1, width)).view(gate.shape)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases. Source: arXiv:2002.05202."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.backend = "auto"
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.down_proj(activate(self.gate_proj(x), self.up_proj(x), backend=self.backend))
