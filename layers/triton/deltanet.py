"""Gated DeltaNet for one token: the convolution with the norms of q and k, then the rule with its gates and norm.

States lie in two sides, (2, b, ...). A step reads the side whose number the tensor `side` (1,) holds and writes the
other: the state before the step stays whole until the next one, for no more bytes than an update in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.triton.arithmetic import rounded, scaled, silu, unit_rms
from layers.triton.launch import launch


@triton.jit
def convolve_kernel(
    x,
    weight,
    state,
    side,
    side_stride,
    q,
    k,
    v,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and head, of q, then of k, then of v."""
    KEYS: tl.constexpr = KEY_HEADS * KEY_DIM
    VALUES: tl.constexpr = VALUE_HEADS * VALUE_DIM
    CHANNELS: tl.constexpr = 2 * KEYS + VALUES
    row, head = tl.program_id(0), tl.program_id(1)
    is_value = head >= 2 * KEY_HEADS
    at = tl.arange(0, BLOCK)
    inside = at < tl.where(is_value, VALUE_DIM, KEY_DIM)
    channel = at + tl.where(is_value, 2 * KEYS + (head - 2 * KEY_HEADS) * VALUE_DIM, head * KEY_DIM)
    now = tl.load(side)
    before = state + now * side_stride + row * (TAPS - 1) * CHANNELS + channel
    after = state + (1 - now) * side_stride + row * (TAPS - 1) * CHANNELS + channel

    newest = tl.load(x + row * CHANNELS + channel, mask=inside, other=0.0)
    y = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(before + tap * CHANNELS, mask=inside, other=0.0).to(newest.dtype)
        y += old.to(tl.float32) * tl.load(weight + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(after + (tap - 1) * CHANNELS, old, mask=inside)
    if TAPS > 1:
        tl.store(after + (TAPS - 2) * CHANNELS, newest, mask=inside)
    y += newest.to(tl.float32) * tl.load(weight + channel * TAPS + TAPS - 1, mask=inside, other=0.0).to(tl.float32)
    y = silu(rounded(y, newest.dtype)).to(newest.dtype)

    if is_value:
        tl.store(v + row * VALUES + channel - 2 * KEYS, y, mask=inside)
    else:
        unit = y.to(tl.float32) * tl.rsqrt(tl.sum(y.to(tl.float32) * y.to(tl.float32), axis=0) + EPS)
        if head < KEY_HEADS:
            tl.store(q + row * KEYS + channel, unit * SCALE, mask=inside)
        else:
            tl.store(k + row * KEYS + channel - KEYS, unit, mask=inside)


def convolve(
    x: Tensor, weight: Tensor, state: Tensor, side: Tensor, *, key_heads: int, value_heads: int, key_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `layers.kernels.one_token.convolve`."""
    rows, value_dim = len(x), (x.shape[1] - 2 * key_heads * key_dim) // value_heads
    q, k = (x.new_empty(rows, key_heads, key_dim, dtype=torch.float32) for _ in "qk")
    v = x.new_empty(rows, value_heads, value_dim)
    launch(
        convolve_kernel,
        (rows, 2 * key_heads + value_heads),
        x,
        *(x, weight, state, side, state.stride(0), q, k, v),
        EPS=1e-6,
        SCALE=key_dim**-0.5,
        KEY_HEADS=key_heads,
        VALUE_HEADS=value_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        TAPS=weight.shape[1],
        BLOCK=triton.next_power_of_2(max(key_dim, value_dim)),
        warps=1,
    )
    return q, k, v


@triton.jit
def delta_rule_kernel(
    q,
    k,
    v,
    b,
    a,
    z,
    a_log,
    dt_bias,
    norm_weight,
    state,
    side,
    side_stride,
    out,
    EPS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row and value head: the norm of the output needs all of a head's values.

    A head's state of 128 x 128 is 64 numbers a thread, all loaded before the first is used.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    here, key_head = row * VALUE_HEADS + head, row * KEY_HEADS + head // (VALUE_HEADS // KEY_HEADS)
    key, value = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_key, in_value = key < KEY_DIM, value < VALUE_DIM
    now, inside = tl.load(side), in_key[:, None] & in_value[None, :]
    at = here.to(tl.int64) * KEY_DIM * VALUE_DIM + key[:, None] * VALUE_DIM + value[None, :]
    s = tl.load(state + now * side_stride + at, mask=inside, other=0.0).to(tl.float32)

    rate = tl.exp(tl.load(a_log + head).to(tl.float32))
    x = tl.load(a + here).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))  # torch's threshold
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + here).to(tl.float32)))
    q_t = tl.load(q + key_head * KEY_DIM + key, mask=in_key, other=0.0)
    k_t = tl.load(k + key_head * KEY_DIM + key, mask=in_key, other=0.0)
    v_t = tl.load(v + here * VALUE_DIM + value, mask=in_value, other=0.0)

    s *= tl.exp(-rate * softplus)
    delta = beta * (v_t.to(tl.float32) - tl.sum(k_t[:, None] * s, axis=0))
    s += k_t[:, None] * delta[None, :]
    tl.store(state + (1 - now) * side_stride + at, s.to(state.dtype.element_ty), mask=inside)
    o = rounded(tl.sum(q_t[:, None] * s, axis=0), v_t.dtype)

    w = tl.load(norm_weight + value, mask=in_value, other=0.0)
    gate = silu(tl.load(z + here * VALUE_DIM + value, mask=in_value, other=0.0).to(tl.float32))
    unit = unit_rms(o, VALUE_DIM, EPS)
    if w.dtype == v_t.dtype:
        y = scaled(unit, w, v_t.dtype, False).to(tl.float32)
    else:  # the product with a weight of another dtype is fp32
        y = w.to(tl.float32) * rounded(unit, v_t.dtype)
    tl.store(out + here * VALUE_DIM + value, (y * gate).to(v_t.dtype), mask=in_value)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    side: Tensor,
    *,
    eps: float,
) -> Tensor:
    """See `layers.kernels.one_token.delta_rule`."""
    rows, heads, value_dim = v.shape
    key_heads, key_dim = k.shape[1:]
    out = torch.empty_like(z)
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    launch(
        delta_rule_kernel,
        (rows, heads),
        v,
        *(q, k, v, b, a, z, a_log, dt_bias, norm_weight, state, side, state.stride(0), out),
        EPS=eps,
        KEY_HEADS=key_heads,
        VALUE_HEADS=heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        warps=min(max(block_k * block_v // 2048, 1), 16),
    )
    return out
