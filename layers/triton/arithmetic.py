"""Formulas that several kernels share, in fp32 and with the casts of the definitions."""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x · σ(x), fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as `dtype` holds it, in fp32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def unit_rms(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """x / sqrt(mean(x²) + eps) over WIDTH numbers in fp32, those behind them being 0."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + EPS)


@triton.jit
def scaled(unit, weight, dtype: tl.constexpr, ZERO_CENTRED: tl.constexpr):
    """`layers.norm.scaled`: the product with 1 + weight before the cast, with weight after it."""
    if ZERO_CENTRED:
        y = (unit * (1.0 + weight.to(tl.float32))).to(dtype)
    else:
        y = (weight.to(tl.float32) * rounded(unit, dtype)).to(dtype)
    return y
