"""Rotary position embedding on the first dimensions of a head (rotate-half form)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def inverse_frequencies(rotary_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2i / rotary_dim) for i < rotary_dim / 2, in fp32: (rotary_dim / 2,).

    Context extension (YaRN) changes these frequencies and a factor on cos and sin, and nothing else: its place is here.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    return 1.0 / theta**exponents


class Rotation(NamedTuple):
    """cos and sin of every token's angles, made once a forward and shared by all layers."""

    cos: Float[Tensor, "b t 1 rotary"]
    sin: Float[Tensor, "b t 1 rotary"]

    def __call__(self, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """Rotate the first `rotary` dimensions of every head; the rest pass unchanged."""
        rotary = self.cos.shape[-1]
        turned, passed = x[..., :rotary], x[..., rotary:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * self.cos + torch.cat((-second, first), dim=-1) * self.sin
        return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def rotation(positions: Int[Tensor, "b t"], *, rotary_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The rotation of tokens at `positions`. Angles are computed in fp32: bf16 has no integers beyond 256."""
    frequencies = inverse_frequencies(rotary_dim, theta, positions.device)
    angles = positions[..., None, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
