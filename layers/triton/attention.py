"""Softmax attention for one token a row, over keys and values at positions that a tensor holds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.triton.arithmetic import rounded, scaled
from layers.triton.launch import launch

SPLITS = 64  # of the context, whatever its length: a row's result does not depend on buffers or other rows
LOG2_E = 1.4426950408889634


@triton.jit
def _turned(x, weight, cos, sin, EPS: tl.constexpr, NORM: tl.constexpr, ZERO_CENTRED: tl.constexpr,
            DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A head of q or k after its norm and RoPE; (BLOCK,) in x's dtype."""
    HALF: tl.constexpr = ROTARY // 2
    at = tl.arange(0, BLOCK)
    # The other number of the pair that is turned together: read again, as registers cannot be permuted cheaply.
    partner = tl.where(at < HALF, at + HALF, tl.where(at < ROTARY, at - HALF, at))
    inside = at < DIM
    own = tl.load(x + at, mask=inside, other=0.0)
    other = tl.load(x + partner, mask=inside, other=0.0)
    dtype: tl.constexpr = own.dtype
    if NORM:
        own32 = own.to(tl.float32)
        rms = tl.rsqrt(tl.sum(own32 * own32, axis=0) / DIM + EPS)
        w, w_other = (tl.load(weight + at, mask=inside, other=0.0), tl.load(weight + partner, mask=inside, other=0.0))
        own = scaled(own32 * rms, w, dtype, ZERO_CENTRED)
        other = scaled(other.to(tl.float32) * rms, w_other, dtype, ZERO_CENTRED)
    c = tl.load(cos + at, mask=at < ROTARY, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=at < ROTARY, other=0.0).to(tl.float32)
    s = tl.where(at < HALF, -s, s)
    turned = rounded(own.to(tl.float32) * c, dtype) + rounded(other.to(tl.float32) * s, dtype)
    return tl.where(at < ROTARY, turned.to(dtype), own)


@triton.jit
def rotate_and_store_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    position,
    q_out,
    keys,
    values,
    row_stride,
    head_stride,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and head, of q, then of k, then of v."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(position + row)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    turn = place * ROTARY
    if head < HEADS:
        here = (row * HEADS + head) * DIM
        y = _turned(q + here, q_weight, cos + turn, sin + turn, EPS, NORM, ZERO_CENTRED, DIM, ROTARY, BLOCK)
        tl.store(q_out + here + at, y, mask=inside)
    elif head < HEADS + KV_HEADS:
        kv = head - HEADS
        here = (row * KV_HEADS + kv) * DIM
        y = _turned(k + here, k_weight, cos + turn, sin + turn, EPS, NORM, ZERO_CENTRED, DIM, ROTARY, BLOCK)
        to = row.to(tl.int64) * row_stride + kv * head_stride + place * DIM
        tl.store(keys + to + at, y.to(keys.dtype.element_ty), mask=inside)
    else:
        kv = head - HEADS - KV_HEADS
        y = tl.load(v + (row * KV_HEADS + kv) * DIM + at, mask=inside)
        to = row.to(tl.int64) * row_stride + kv * head_stride + place * DIM
        tl.store(values + to + at, y.to(values.dtype.element_ty), mask=inside)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    eps: float,
    zero_centred: bool,
) -> Tensor:
    """See `layers.kernels.one_token.rotate_and_store`."""
    rows, heads, dim = q.shape
    out, norms = torch.empty_like(q), q_weight is not None and k_weight is not None
    launch(
        rotate_and_store_kernel,
        (rows, heads + 2 * k.shape[1]),
        q,
        *(q, k, v, q_weight if norms else q, k_weight if norms else q, cos, sin, position, out),
        *(keys, values, keys.stride(0), keys.stride(1)),
        EPS=eps,
        NORM=norms,
        ZERO_CENTRED=zero_centred,
        HEADS=heads,
        KV_HEADS=k.shape[1],
        DIM=dim,
        ROTARY=cos.shape[1],
        BLOCK=triton.next_power_of_2(dim),
        warps=1,
    )
    return out


@triton.jit
def attend_kernel(
    q,
    keys,
    values,
    position,
    part,
    largest,
    total,
    row_stride,
    head_stride,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a row, key head and split: the sum of values of its places, weighted by 2^(score − largest score).

    Only places up to the row's own token are read, and only splits that have some write.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(position + row) + 1
    blocks = tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(blocks, SPLITS)
    first = split * each * BLOCK_N
    stop = tl.minimum(first + each * BLOCK_N, length)
    if first < length:
        query, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
        here = (row * KV_HEADS + head) * SHARE + query
        rows, in_d = query < SHARE, d < DIM
        x = tl.load(q + here[:, None] * DIM + d[None, :], mask=rows[:, None] & in_d[None, :], other=0.0)
        start = row.to(tl.int64) * row_stride + head * head_stride
        most = tl.full([BLOCK_Q], -float("inf"), tl.float32)
        count = tl.zeros([BLOCK_Q], tl.float32)
        y = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for n in range(first, stop, BLOCK_N):
            place = n + tl.arange(0, BLOCK_N)
            held = place < stop
            at = start + place * DIM
            k = tl.load(keys + at[None, :] + d[:, None], mask=in_d[:, None] & held[None, :], other=0.0).to(x.dtype)
            score = tl.dot(x, k, input_precision="ieee") * SCALE
            score = tl.where(held[None, :], score, -float("inf"))
            now = tl.maximum(most, tl.max(score, axis=1))
            share, kept = tl.exp2(score - now[:, None]), tl.exp2(most - now)
            v = tl.load(values + at[:, None] + d[None, :], mask=held[:, None] & in_d[None, :], other=0.0).to(x.dtype)
            count = count * kept + tl.sum(share, axis=1)
            y = y * kept[:, None] + tl.dot(share.to(x.dtype), v, input_precision="ieee")
            most = now
        to = here * SPLITS + split
        tl.store(part + to[:, None] * DIM + d[None, :], y, mask=rows[:, None] & in_d[None, :])
        tl.store(largest + to, most, mask=rows)
        tl.store(total + to, count, mask=rows)


@triton.jit
def combine_kernel(
    part,
    largest,
    total,
    position,
    gate,
    out,
    GATE_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a row and query head: the splits together, then the gate."""
    row, head = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(tl.load(position + row) + 1, BLOCK_N)
    used = tl.cdiv(blocks, tl.cdiv(blocks, SPLITS))
    here, d = row * HEADS + head, tl.arange(0, BLOCK_D)
    in_d = d < DIM
    split = tl.arange(0, SPLITS)
    at = here * SPLITS
    m = tl.load(largest + at + split, mask=split < used, other=-float("inf"))
    most = tl.max(m, axis=0)
    count = tl.sum(tl.exp2(m - most) * tl.load(total + at + split, mask=split < used, other=0.0), axis=0)
    y = tl.zeros([BLOCK_D], tl.float32)
    for n in range(0, used, CHUNK):
        some = n + tl.arange(0, CHUNK)
        w = tl.exp2(tl.load(largest + at + some, mask=some < used, other=-float("inf")) - most)
        inside = (some < used)[:, None] & in_d[None, :]
        x = tl.load(part + (at + some)[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        y += tl.sum(w[:, None] * x, axis=0)
    dtype: tl.constexpr = out.dtype.element_ty
    y = rounded(y / count, dtype)
    if GATE_ROWS > 0:
        g = tl.load(gate + here * GATE_ROWS + (d if GATE_ROWS > 1 else d * 0), mask=in_d, other=0.0).to(tl.float32)
        y = y * rounded(1.0 / (1.0 + tl.exp(-g)), dtype)
    tl.store(out + here * DIM + d, y.to(dtype), mask=in_d)


def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, gate: Tensor | None) -> Tensor:
    """See `layers.kernels.one_token.attend`. Scores stay fp32, and shares are rounded before they are divided by
    their sum, as in every fused attention; the definition rounds the shares themselves."""
    (rows, heads, dim), kv_heads = q.shape, keys.shape[1]
    share = heads // kv_heads
    part = q.new_empty(rows, heads, SPLITS, dim, dtype=torch.float32)
    largest, total = (q.new_empty(rows, heads, SPLITS, dtype=torch.float32) for _ in range(2))
    # Two tiles of keys and two of values are in flight: 64 KiB at head width 256, which every GPU has on chip.
    block_d, block_n = max(triton.next_power_of_2(dim), 16), 64 // q.itemsize
    launch(
        attend_kernel,
        (rows, kv_heads, SPLITS),
        q,
        *(q, keys, values, position, part, largest, total, keys.stride(0), keys.stride(1)),
        SCALE=dim**-0.5 * LOG2_E,
        KV_HEADS=kv_heads,
        SHARE=share,
        DIM=dim,
        SPLITS=SPLITS,
        BLOCK_Q=max(triton.next_power_of_2(share), 16),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        warps=4 if q.itemsize == 2 else 8,
    )
    out = torch.empty_like(q)
    launch(
        combine_kernel,
        (rows, heads),
        q,
        *(part, largest, total, position, out if gate is None else gate, out),
        GATE_ROWS=0 if gate is None else gate.shape[1] // heads,
        HEADS=heads,
        DIM=dim,
        SPLITS=SPLITS,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        CHUNK=16,
    )
    return out
