"""Residual sum and RMSNorm in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.triton.arithmetic import scaled, unit_rms
from layers.triton.launch import launch


@triton.jit
def add_rms_norm_kernel(
    x,
    y,
    weight,
    total,
    normed,
    EPS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0) * WIDTH + column
    s = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        s = (s.to(tl.float32) + tl.load(y + at, mask=inside, other=0.0).to(tl.float32)).to(s.dtype)
        tl.store(total + at, s, mask=inside)
    w = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(normed + at, scaled(unit_rms(s.to(tl.float32), WIDTH, EPS), w, s.dtype, ZERO_CENTRED), mask=inside)


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, *, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """x + y and its norm, both (b, width) in x's dtype; x itself where y is None."""
    rows, width = x.shape
    total, normed = x if y is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    launch(
        add_rms_norm_kernel,
        (rows,),
        x,
        *(x, x if y is None else y, weight, total, normed),
        EPS=eps,
        ZERO_CENTRED=zero_centred,
        ADDS=y is not None,
        WIDTH=width,
        BLOCK=block,
        warps=min(max(block // 256, 1), 16),
    )
    return total, normed
