"""Attention in C++. See ops.py."""

import torch
from torch import Tensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, NAMES, call, operator


@operator("(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor[]")
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Tensor]:
    """q (b h t d), k, v (b kvh s d). Returns answer and logsumexp (b h t) in fp32."""
    fits = q.ndim == k.ndim == 4 and all(k.shape[1:]) and q.shape[1] % k.shape[1] == 0
    if not fits or (causal and k.shape[2] < q.shape[2]):
        raise ValueError(
            "attend: q must be (b, h, t, d) and k (b, kvh, s, d), h a multiple of kvh, no width 0, and t at most s "
            f"where causal; they are {tuple(q.shape)} and {tuple(k.shape)}."
        )
    b, h, t, d = q.shape
    keys = (b, *k.shape[1:3], d)
    q = operand("attend: q", q, tuple(q.shape), FP32, BF16, rows=True)
    k, v = operand("attend: k", k, keys, q.dtype, rows=True), operand("attend: v", v, keys, q.dtype, rows=True)
    out, logsumexp = q.new_empty(q.shape), q.new_empty(b, h, t, dtype=torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    call(
        f"attend_{NAMES[q.dtype]}", (b, h, k.shape[1], t, k.shape[2], d, *strides, int(causal)), q, k, v, out, logsumexp
    )
    return [out, logsumexp]
