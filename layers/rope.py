"""Rotary position embedding on the first dimensions of a head (rotate-half form)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Context extension: slow frequencies are stretched, fast ones kept, a ramp between; cos and sin scaled.

    Source: arXiv:2309.00071 section 3.2 and 3.3.

    Attributes:
        factor: how many times longer the context becomes.
        original_max_position_embeddings: the longest context in training.
        beta_fast, beta_slow: turns within that context above which a frequency is kept, below which it is stretched.
        attention_factor: on cos and sin; None is 0.1 ln(factor) + 1.
        truncate: whether the ramp begins and ends at whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise ValueError(f"YaRN's factor ({self.factor}) and original length must be at least 1.")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"YaRN's beta_slow ({self.beta_slow}) must lie between 0 and its beta_fast.")

    @property
    def magnitude(self) -> float:
        """The factor on cos and sin: scores grow by its square on the rotated dimensions."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def stretched(self, rotary_dim: int, theta: float) -> Tensor:
        """Share of each frequency that is stretched, 0 to 1: (rotary_dim / 2,)."""

        def dimension(turns: float) -> float:  # whose frequency makes so many turns in the original context
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        high += 0.001 if low == high else 0
        return ((torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def inverse_frequencies(
    rotary_dim: int, theta: float, device: torch.device | None = None, *, yarn: Yarn | None = None
) -> Tensor:
    """theta^(-2i / rotary_dim) for i < rotary_dim / 2, in fp64: (rotary_dim / 2,); slow ones lower with YaRN."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    plain = 1.0 / theta**exponents
    if yarn is None:
        return plain
    share = yarn.stretched(rotary_dim, theta).to(plain.device)
    return plain / yarn.factor * share + plain * (1 - share)


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


def rotation(
    positions: Int[Tensor, "b t"], *, rotary_dim: int, theta: float, dtype: torch.dtype, yarn: Yarn | None = None
) -> Rotation:
    """The rotation of tokens at `positions`, rounded once, at the end.

    Angles are fp64: of one of 10⁶ fp32 keeps steps of 0.06, and it knows no odd positions beyond 2²⁴.
    """
    angles = positions[..., None, None].double() * inverse_frequencies(rotary_dim, theta, positions.device, yarn=yarn)
    magnitude = 1.0 if yarn is None else yarn.magnitude
    cos, sin = ((turn * magnitude).to(dtype) for turn in (angles.cos(), angles.sin()))
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))
