"""A matrix of whole numbers in groups: the definition.

w[o, i] = (code[o, i] − zero[o, g]) · scale[o, g], g = i // group_size, computed in fp32.

Codes of 8 bits are int8. Codes of 4 bits are numbers from 0 to 15, two in a byte along the inputs, the first in the low
half. Scales are fp32, bf16 or fp16; zero points are int8. Without zero points, zero is 0 for 8 bits and 8 for 4 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int8, Shaped, UInt8
from torch import Tensor

BITS = (8, 4)
GROUP_SIZES = {8: 0, 4: 32}  # by bits, if none is asked for; 0: the whole row
SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GroupWeight:
    """A weight (…, out, in) in groups of neighbouring inputs.

    Attributes:
        codes: (…, out, in) int8, or (…, out, in / 2) uint8 for 4 bits.
        scale: (…, out, groups).
        zero: (…, out, groups), or None.
    """

    codes: Shaped[Tensor, "*e out bytes"]
    scale: Float[Tensor, "*e out groups"]
    zero: Int8[Tensor, "*e out groups"] | None = None

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits)

    @property
    def group_size(self) -> int:
        """Raises: ValueError for a scale without groups."""
        if not self.scale.numel():
            raise ValueError(f"The scale of a weight {self.shape} must have groups, it has {tuple(self.scale.shape)}.")
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.codes, self.scale, self.zero

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.itemsize for part in self.tensors if part is not None)

    def dequantise(self) -> Float32[Tensor, "*e out in"]:
        codes = unpack(self.codes) if self.bits == 4 else self.codes
        groups = codes.float().unflatten(-1, (self.scale.shape[-1], -1))
        if self.zero is not None:
            groups -= self.zero[..., None]
        elif self.bits == 4:
            groups -= 8
        return (groups * self.scale.float()[..., None]).flatten(-2)

    def each(self, change: Callable[[Tensor], Tensor]) -> "GroupWeight":
        """The weight with each of its tensors changed, such as by a choice of rows."""
        zero = None if self.zero is None else change(self.zero)
        return GroupWeight(change(self.codes), change(self.scale), zero)

    def at(self, index: Any) -> "GroupWeight":
        """Rows of it, or some of several matrices."""
        return self.each(lambda part: part[index])


def pack(codes: UInt8[Tensor, "*e in"]) -> UInt8[Tensor, "*e half"]:
    """Two numbers from 0 to 15 in a byte, the first in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(codes: UInt8[Tensor, "*e half"]) -> UInt8[Tensor, "*e in"]:
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def group_size_for(columns: int, bits: int, wanted: int | None = None) -> int:
    """Inputs of a group for rows of `columns`: `wanted`, or the usual number of these bits.

    Raises: ValueError if rows do not consist of whole groups.
    """
    size = (GROUP_SIZES[bits] if wanted is None else wanted) or columns
    if bits not in BITS or size < 1 or columns % size or columns % 2:
        raise ValueError(f"Rows of {columns} weights do not consist of groups of {size}: choose another group size.")
    return size


def quantise(
    weight: Float[Tensor, "*e out in"],
    bits: int,
    group_size: int | None = None,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> GroupWeight:
    """Round to the nearest code, with the scale of each group that gives the least squared error of those tried.

    Codes are symmetric: −127 to 127, or −7 to 7 plus 8. A group of zeros has scale 1.

    Args:
        group_size: inputs that share a scale; 0 is a whole row, None the usual number (8 bits: a row, 4 bits: 32).
    Raises: ValueError for weights that are infinite or not a number, and for rows that are no whole groups.
    """
    size = group_size_for(weight.shape[-1], bits, group_size)
    groups = weight.detach().float().unflatten(-1, (-1, size))
    scale = best_scale(groups, bits, scale_dtype)
    return coded((groups / scale.float()[..., None]).round_().flatten(-2), scale, bits)


def best_scale(
    groups: Float32[Tensor, "*e out groups size"], bits: int, scale_dtype: torch.dtype
) -> Float[Tensor, "*e out groups"]:
    """The scale of each group for symmetric codes, in `scale_dtype`.

    Raises: ValueError for weights that are infinite or not a number.
    """
    most = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError("Cannot quantise infinite or NaN weights: check the checkpoint.")
    best, least = torch.ones_like(largest, dtype=scale_dtype), torch.full_like(largest, torch.inf)
    for share in SHARES[bits]:
        scale = (largest * (share / most)).to(scale_dtype)
        scale = torch.where(scale > 0, scale, 1.0).to(scale_dtype)
        step = scale.float()[..., None]
        wrong = (groups / step).round_().clamp_(-most, most).mul_(step).sub_(groups).square_().sum(-1)
        best, least = torch.where(wrong < least, scale, best), torch.minimum(wrong, least)
    return best


# Shares of a group's largest weight that the largest code may stand for: with 4 bits, finer steps for the others are
# worth the error of the largest.
SHARES = {8: (1.0,), 4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)}


def coded(codes: Float32[Tensor, "*e out in"], scale: Float[Tensor, "*e out groups"], bits: int) -> GroupWeight:
    """Whole numbers that may be too large, clamped to symmetric codes, with their scales."""
    most = 2 ** (bits - 1) - 1
    codes = codes.clamp(-most, most)
    return GroupWeight(pack((codes + 8).to(torch.uint8)) if bits == 4 else codes.to(torch.int8), scale)
