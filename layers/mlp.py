"""The dense feed-forward."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases. Source: arXiv:2002.05202."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
