"""Blocks of quantised numbers in GGUF files, dequantised in fp32 with the order of operations of ggml's own code.

A row is a sequence of blocks. Letters: d, m are fp16 scale and minimum of a block, q the integers.

| type | numbers | bytes | w |
|---|--:|--:|---|
| Q8_0 | 32 | 34 | q · d |
| Q4_0, Q5_0 | 32 | 18, 22 | d · (q − 8), d · (q − 16) |
| Q4_1, Q5_1 | 32 | 20, 24 | d · q + m |
| Q4_K, Q5_K | 256 | 144, 176 | (d · s) · q − (m · t), with 6-bit s and t for each 32 numbers |
| Q6_K | 256 | 210 | (d · s) · (q − 32), with int8 s for each 16 numbers |
| MXFP4 | 32 | 17 | 2^(e − 128) · twice E2M1 |

Source: ggml/src/ggml-quants.c; held to the gguf package 0.19 to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 2**22  # numbers dequantised at a time
TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Kind:
    """A type of GGUF tensors: `numbers` in a block of `nbytes`; dtype is uint8 for blocks, else that of the numbers.

    `codes` gives those of blocks (n, nbytes) as (n, numbers) in uint8, where a block is its fp16 scale and codes that
    are int8, or 4 bits with zero point 8.
    """

    name: str
    numbers: int
    nbytes: int
    dtype: torch.dtype = torch.uint8
    dequantise: Callable[[Tensor], Tensor] | None = None  # blocks (n, nbytes) to (n, numbers)
    codes: Callable[[Tensor], Tensor] | None = None


def dequantised(kind: Kind, stored: Tensor) -> Tensor:
    """The numbers in fp32, of the shape whose last axis are numbers."""
    if kind.dequantise is None:
        return stored.float()
    blocks = stored.reshape(-1, kind.nbytes)
    out = torch.empty(len(blocks), kind.numbers)
    step = max(PIECE // kind.numbers, 1)
    for begin in range(0, len(blocks), step):
        out[begin : begin + step] = kind.dequantise(blocks[begin : begin + step])
    return out.view(*stored.shape[:-1], -1)


def _half(b: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as (n, 1) in fp32."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(b: Tensor, run: int) -> Tensor:
    """4-bit numbers: of each run of bytes first the low halves, then the high ones."""
    runs = b.unflatten(1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1)


def _fifth_bits(b: Tensor) -> Tensor:
    """The 32 bits of 4 bytes (n, 4), lowest first."""
    return ((b[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:], 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:], 16).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6]) << 4).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8]) << 4).float() + _half(b, 2)


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima (n, 8, 1) of 12 bytes: low six bits, then four bits each with two high bits."""
    low, mins, rest = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 2) & 48)), dim=1)
    return scales.float()[..., None], torch.cat((mins & 63, (rest >> 4) | ((mins >> 2) & 48)), dim=1).float()[..., None]


def _k_block(b: Tensor, q: Tensor) -> Tensor:
    """(d · s) · q − (m · t)."""
    s, t = _six_bits(b[:, 4:16])
    scaled = (_half(b, 0)[..., None] * s) * q.float().unflatten(1, (8, 32))
    return (scaled - _half(b, 2)[..., None] * t).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _k_block(b, _nibbles(b[:, 16:], 32))


def _q5_k(b: Tensor) -> Tensor:
    fifth = (b[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # (n, 8, 32)
    return _k_block(b, _nibbles(b[:, 48:], 32) | fifth.flatten(1) << 4)


def _q6_k(b: Tensor) -> Tensor:
    high = b[:, 128:192].unflatten(1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    q = _nibbles(b[:, :128], 64) | high.flatten(1) << 4
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return ((_half(b, 208) * scales)[..., None] * (q.float() - 32).unflatten(1, (16, 16))).flatten(1)


def _mxfp4(b: Tensor) -> Tensor:
    e = b[:, :1].int()
    bits = torch.where(e < 2, 0x00200000 << e, (e - 1) << 23)  # 2^(e - 128); subnormal for 0 and 1
    values = torch.tensor(TWICE_E2M1, dtype=torch.float32)
    return bits.view(torch.float32) * values[_nibbles(b[:, 1:], 16).int()]


def q8_0_blocks(x: Tensor) -> Tensor:
    """The blocks (n, 34) of numbers whose last axis is a multiple of 32; rounds halves away from zero, as ggml does."""
    x = x.reshape(-1, 32)
    d = x.abs().amax(dim=1, keepdim=True) / 127
    scaled = x * torch.where(d == 0, 0.0, 1 / d)
    size = scaled.abs()
    whole = size.floor()
    q = scaled.sign() * (whole + (2 * (size - whole)).floor())
    return torch.cat((d.half().view(torch.uint8), q.to(torch.int8).view(torch.uint8)), dim=1)


# By the number that stands in the file.
KINDS = {
    0: Kind("F32", 1, 4, torch.float32),
    1: Kind("F16", 1, 2, torch.float16),
    2: Kind("Q4_0", 32, 18, dequantise=_q4_0, codes=lambda b: _nibbles(b[:, 2:], 16)),
    3: Kind("Q4_1", 32, 20, dequantise=_q4_1),
    6: Kind("Q5_0", 32, 22, dequantise=_q5_0),
    7: Kind("Q5_1", 32, 24, dequantise=_q5_1),
    8: Kind("Q8_0", 32, 34, dequantise=_q8_0, codes=lambda b: b[:, 2:].contiguous()),
    12: Kind("Q4_K", 256, 144, dequantise=_q4_k),
    13: Kind("Q5_K", 256, 176, dequantise=_q5_k),
    14: Kind("Q6_K", 256, 210, dequantise=_q6_k),
    30: Kind("BF16", 1, 2, torch.bfloat16),
    39: Kind("MXFP4", 32, 17, dequantise=_mxfp4),
}
