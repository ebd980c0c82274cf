"""Norms, gates and activations of rows, with their gradients: one pass over memory each.

A program takes a tile of whole rows. Where a definition rounds to the dtype of x between two steps, the kernel rounds
there too. Sums over rows, which are the gradients of weights, are in fp32: a program adds up its rows, and torch adds
up the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.triton.arithmetic import rounded, silu
from layers.triton.launch import launch

TILE = 2048  # numbers in a program's tile, at least one row
PROGRAMS = 528  # that share the rows where they also sum over them: four for each of 132 multiprocessors


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    gate,
    y,
    rate,
    rows,
    EPS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """ROUNDS: the product with the weight is rounded before the gate, as weight and x have one dtype."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    dtype: tl.constexpr = v.dtype
    v = v.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, axis=1) / WIDTH + EPS)
    tl.store(rate + row, r, mask=row < rows)
    unit = v * r[:, None]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if ZERO_CENTRED:
        out = unit * (1.0 + w)
    else:
        out = w * rounded(unit, dtype)
    if GATED:
        if ROUNDS:
            out = rounded(out, dtype)
        out = out * silu(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(y + at, out.to(dtype), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    grad,
    x,
    weight,
    gate,
    rate,
    to_x,
    to_gate,
    to_weight,
    rows,
    ZERO_CENTRED: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """to_weight: (programs, WIDTH) fp32, one sum a program."""
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.num_programs(0)):
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        v = tl.load(x + at, mask=inside, other=0.0)
        dtype: tl.constexpr = v.dtype
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rate + row, mask=row < rows, other=0.0)[:, None]
        unit = v.to(tl.float32) * r
        if ZERO_CENTRED:
            total += tl.sum(dy * unit, axis=0)
            to_unit = dy * (1.0 + w)
        else:
            low = rounded(unit, dtype)
            if GATED:
                product = w * low
                if ROUNDS:
                    product = rounded(product, dtype)
                g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
                sigmoid = 1.0 / (1.0 + tl.exp(-g))
                to_g = dy * product * sigmoid * (1.0 + g * (1.0 - sigmoid))
                tl.store(to_gate + at, to_g.to(dtype), mask=inside)
                dy = dy * g * sigmoid
                if ROUNDS:
                    dy = rounded(dy, dtype)
            total += tl.sum(dy * low, axis=0)
            to_unit = rounded(dy * w, dtype)
        mean = tl.sum(to_unit * unit, axis=1)[:, None] / WIDTH
        tl.store(to_x + at, (r * (to_unit - unit * mean)).to(dtype), mask=inside)
    tl.store(to_weight + tl.program_id(0) * WIDTH + column, total, mask=column < WIDTH)


@triton.jit
def l2_normalise_kernel(
    x, y, rate, rows, scale, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr
):
    """y is fp32."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, axis=1) + EPS)
    tl.store(rate + row, r, mask=row < rows)
    tl.store(y + at, v * r[:, None] * scale, mask=inside)


@triton.jit
def l2_normalise_backward_kernel(
    grad, x, rate, to_x, rows, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    dy = tl.load(grad + at, mask=inside, other=0.0) * scale
    r = tl.load(rate + row, mask=row < rows, other=0.0)[:, None]
    unit = v.to(tl.float32) * r
    inner = tl.sum(dy * unit, axis=1)[:, None]
    tl.store(to_x + at, (r * (dy - unit * inner)).to(v.dtype), mask=inside)


@triton.jit
def swiglu_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, (rounded(silu(g.to(tl.float32)), g.dtype) * u).to(g.dtype), mask=at < count)


@triton.jit
def swiglu_backward_kernel(grad, gate, up, to_gate, to_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(gate + at, mask=at < count, other=0.0)
    g = low.to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    dy = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(to_up + at, (dy * rounded(g * sigmoid, low.dtype)).to(low.dtype), mask=at < count)
    to_silu = rounded(dy * u, low.dtype)
    tl.store(to_gate + at, (to_silu * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(low.dtype), mask=at < count)


def rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor | None, *, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """The norm (rows, width) in x's dtype, times silu(gate) where there is one, and 1 / root of each row, fp32."""
    (rows, width), y = x.shape, torch.empty_like(x)
    rate, sizes = x.new_empty(rows, dtype=torch.float32), _sizes(width)
    options = {"ZERO_CENTRED": zero_centred, "GATED": gate is not None, "ROUNDS": weight.dtype == x.dtype}
    tensors = x, weight, x if gate is None else gate, y, rate, rows
    grid = (triton.cdiv(rows, sizes["TILE_ROWS"]),)
    launch(rms_norm_kernel, grid, x, *tensors, EPS=eps, WIDTH=width, warps=_warps(sizes), **options, **sizes)
    return y, rate


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, rate: Tensor, *, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the weight (fp32) and of the gate."""
    (rows, width), sizes = x.shape, _sizes(x.shape[1])
    programs = min(triton.cdiv(rows, sizes["TILE_ROWS"]), PROGRAMS)
    to_x, sums = torch.empty_like(x), x.new_empty(programs, width, dtype=torch.float32)
    to_gate = None if gate is None else torch.empty_like(gate)
    options = {"ZERO_CENTRED": zero_centred, "GATED": gate is not None, "ROUNDS": weight.dtype == x.dtype}
    tensors = grad, x, weight, x if gate is None else gate, rate, to_x, to_x if to_gate is None else to_gate, sums, rows
    launch(rms_norm_backward_kernel, (programs,), x, *tensors, WIDTH=width, warps=_warps(sizes), **options, **sizes)
    return to_x, sums.sum(0), to_gate


def l2_normalise(x: Tensor, *, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """scale · x / ‖x‖ (rows, width) in fp32, and 1 / root of each row."""
    (rows, width), sizes = x.shape, _sizes(x.shape[1])
    y, rate = x.new_empty(x.shape, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    grid = (triton.cdiv(rows, sizes["TILE_ROWS"]),)
    tensors = x, y, rate, rows, float(scale)
    launch(l2_normalise_kernel, grid, x, *tensors, EPS=eps, WIDTH=width, warps=_warps(sizes), **sizes)
    return y, rate


def l2_normalise_backward(grad: Tensor, x: Tensor, rate: Tensor, *, scale: float) -> Tensor:
    (rows, width), sizes, to_x = x.shape, _sizes(x.shape[1]), torch.empty_like(x)
    grid = (triton.cdiv(rows, sizes["TILE_ROWS"]),)
    tensors = grad, x, rate, to_x, rows, float(scale)
    launch(l2_normalise_backward_kernel, grid, x, *tensors, WIDTH=width, warps=_warps(sizes), **sizes)
    return to_x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape and dtype."""
    y, count = torch.empty_like(gate), gate.numel()
    launch(swiglu_kernel, (triton.cdiv(count, 1024),), gate, gate, up, y, count, BLOCK=1024)
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    to_gate, to_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    tensors = grad, gate, up, to_gate, to_up, count
    launch(swiglu_backward_kernel, (triton.cdiv(count, 1024),), gate, *tensors, BLOCK=1024)
    return to_gate, to_up


def _sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "TILE_ROWS": max(TILE // block, 1)}


def _warps(sizes: dict[str, int]) -> int:
    return min(max(sizes["BLOCK"] * sizes["TILE_ROWS"] // 512, 1), 16)
