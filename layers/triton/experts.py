"""A sparse mixture of experts for a few tokens: every choice of a token is a program's, and reads its expert once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.triton.arithmetic import rounded, silu
from layers.triton.launch import launch


@triton.jit
def route_kernel(
    logits,
    x,
    gate_weight,
    weights,
    numbers,
    gates,
    RENORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program a row: shares of all experts, the TOP_K largest, and the shared expert's gate."""
    row, e, slot = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = e < EXPERTS
    logit = tl.load(logits + row * EXPERTS + e, mask=inside, other=-float("inf")).to(tl.float32)
    most = tl.max(logit, axis=0)
    total = tl.sum(tl.exp(logit - most), axis=0)

    # One integer a logit, in the order of `layers.expert_choices.top_experts`: the float's bits, then the lower number
    # first. All differ, so that no expert is chosen twice, whatever the logits are; logit and number can be read back.
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    least: tl.constexpr = -0x8000000000000000
    key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (BLOCK_E - 1 - e).to(tl.int64)
    key = tl.where(inside, key, least)
    chosen = tl.zeros([BLOCK_K], tl.int64)
    for j in tl.static_range(TOP_K):
        best = tl.max(key, axis=0)
        chosen = tl.where(slot == j, best, chosen)
        key = tl.where(key == best, least, key)
    number = BLOCK_E - 1 - (chosen & 0xFFFFFFFF).to(tl.int32)
    bits = (chosen >> 32).to(tl.int32)
    logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    weight = tl.where(slot < TOP_K, tl.exp(logit - most) / total, 0.0)
    if RENORMALISE:
        weight = weight / tl.sum(weight, axis=0)
    tl.store(weights + row * TOP_K + slot, weight.to(weights.dtype.element_ty), mask=slot < TOP_K)
    tl.store(numbers + row * TOP_K + slot, number, mask=slot < TOP_K)

    dtype: tl.constexpr = gates.dtype.element_ty
    column = tl.arange(0, BLOCK_W)
    xs = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    ws = tl.load(gate_weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    gate = rounded(tl.sum(xs * ws, axis=0), dtype)
    tl.store(gates + row, (1.0 / (1.0 + tl.exp(-gate))).to(dtype))


def route(
    logits: Tensor, x: Tensor, gate_weight: Tensor, *, top_k: int, norm_topk_prob: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `layers.kernels.one_token.route`."""
    (rows, experts), width = logits.shape, x.shape[1]
    weights, numbers = x.new_empty(rows, top_k), x.new_empty(rows, top_k, dtype=torch.int32)
    gates = x.new_empty(rows, 1)
    launch(
        route_kernel,
        (rows,),
        x,
        *(logits, x, gate_weight, weights, numbers, gates),
        RENORMALISE=norm_topk_prob,
        EXPERTS=experts,
        TOP_K=top_k,
        WIDTH=width,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_W=triton.next_power_of_2(width),
        warps=1,  # the choices follow each other: within a warp none of them waits at a barrier
    )
    return weights, numbers, gates


@triton.jit
def gate_up_kernel(
    x,
    numbers,
    gate_up,
    shared_gate,
    shared_up,
    inner,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row, choice and BLOCK_N inner units: silu(gate) · up. Choice TOP_K is the shared expert."""
    pair, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, choice = pair // (TOP_K + 1), pair % (TOP_K + 1)
    if choice < TOP_K:
        expert = tl.load(numbers + row * TOP_K + choice).to(tl.int64)
        gates = gate_up + expert * 2 * INNER * WIDTH
        ups = gates + INNER * WIDTH
        units = INNER
    else:
        gates = shared_gate + tl.zeros([], tl.int64)
        ups = shared_up + tl.zeros([], tl.int64)
        units = SHARED
    dtype: tl.constexpr = inner.dtype.element_ty
    # Sums of columns wait until the end: inside the loop they would hold up the next loads.
    gate, up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        inside = (n < units)[:, None] & (column < WIDTH)[None, :]
        at = n[:, None] * WIDTH + column[None, :]
        xs = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        gate += tl.load(gates + at, mask=inside, other=0.0).to(tl.float32) * xs[None, :]
        up += tl.load(ups + at, mask=inside, other=0.0).to(tl.float32) * xs[None, :]
    act = rounded(silu(rounded(tl.sum(gate, axis=1), dtype)), dtype) * rounded(tl.sum(up, axis=1), dtype)
    tl.store(inner + pair * ROOM + n, act.to(dtype), mask=n < units)


@triton.jit
def down_kernel(
    inner,
    numbers,
    weights,
    gates,
    down,
    shared_down,
    out,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row and BLOCK_N outputs: all choices side by side, weighted and summed, and the shared expert."""
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_E)
    used, in_n = slot < TOP_K, n < WIDTH
    expert = tl.load(numbers + row * TOP_K + slot, mask=used, other=0).to(tl.int64)
    weight = tl.load(weights + row * TOP_K + slot, mask=used, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    first = inner + row * (TOP_K + 1) * ROOM
    y = tl.zeros([BLOCK_E, BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, INNER, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        in_k = column < INNER
        h = tl.load(first + slot[:, None] * ROOM + column[None, :], mask=used[:, None] & in_k[None, :], other=0.0)
        at = (expert[:, None, None] * WIDTH + n[None, :, None]) * INNER + column[None, None, :]
        inside = used[:, None, None] & in_n[None, :, None] & in_k[None, None, :]
        y += tl.load(down + at, mask=inside, other=0.0).to(tl.float32) * h.to(tl.float32)[:, None, :]
    routed = tl.sum(rounded(tl.sum(y, axis=2), dtype) * weight[:, None], axis=0)

    y = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, SHARED, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        in_k = column < SHARED
        h = tl.load(first + TOP_K * ROOM + column, mask=in_k, other=0.0).to(tl.float32)
        at = n[:, None] * SHARED + column[None, :]
        w = tl.load(shared_down + at, mask=in_n[:, None] & in_k[None, :], other=0.0)
        y += w.to(tl.float32) * h[None, :]
    shared = rounded(tl.sum(y, axis=1), dtype) * tl.load(gates + row).to(tl.float32)
    tl.store(out + row * WIDTH + n, (rounded(routed, dtype) + rounded(shared, dtype)).to(dtype), mask=in_n)


def experts(
    x: Tensor,
    weights: Tensor,
    numbers: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """See `layers.kernels.one_token.experts`. The choices are summed in fp32 in another order than the definition's."""
    (rows, width), top_k, units = x.shape, numbers.shape[1], down.shape[2]
    own = len(shared[0])
    room = max(units, own)
    inner, out = x.new_empty(rows, top_k + 1, room), torch.empty_like(x)
    sizes = {"TOP_K": top_k, "WIDTH": width, "INNER": units, "SHARED": own, "ROOM": room}
    launch(
        gate_up_kernel,
        (rows * (top_k + 1), triton.cdiv(room, 8)),
        x,
        *(x, numbers, gate_up, *shared[:2], inner),
        **sizes,
        BLOCK_N=8,
        BLOCK_K=min(triton.next_power_of_2(width), 512),
    )
    launch(
        down_kernel,
        (rows, triton.cdiv(width, 4)),
        x,
        *(inner, numbers, weights, gates, down, shared[2], out),
        **sizes,
        BLOCK_E=triton.next_power_of_2(top_k),
        BLOCK_N=4,
        BLOCK_K=min(triton.next_power_of_2(room), 128),
    )
    return out
