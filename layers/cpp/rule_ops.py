"""The delta rule in C++. See ops.py."""

from typing import Any

import torch
from torch import Tensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, NAMES, call, operator

PIECE = 256  # tokens from one kept memory to the next: delta_rule.h


def _in_rows(v: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """v (b t h v), which may lie in rows that hold more, and the kernels' first numbers about it."""
    b, t, h, width = v.shape
    if v.stride()[2:] != (width, 1) or v.stride(0) != t * v.stride(1):
        v = v.contiguous()
    return v, (b, t, h, width, v.stride(1))


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? resets, Tensor state, bool keep) -> Tensor[]"
)
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, resets: Tensor | None, state: Tensor, keep: bool
) -> list[Tensor]:
    """q, k (b t kh k), log_decay, beta (b t h), state (b h k v) in fp32; v (b t h v); resets (b t) bool or None.

    Returns output, state, and the memories (b h pieces k v) before each PIECE tokens if `keep`.
    """
    (q, k, v, log_decay, beta, resets), shape = _rule_operands("delta_rule", q, k, v, log_decay, beta, resets)
    b, t, _, h, key_width, width, _ = shape
    state = operand("delta_rule: state", state, (b, h, key_width, width), FP32)
    out, after = v.new_empty(v.shape), torch.empty_like(state)
    kept = state.new_empty(b, h, -(-t // PIECE) if keep else 0, key_width, width)
    tensors = (q, k, v, log_decay, beta, resets, state, out, after, kept if keep else None)
    call(f"delta_rule_{NAMES[v.dtype]}", shape, *tensors)
    return [out, after, kept]


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? resets, Tensor kept, Tensor to_out,"
    " Tensor to_after) -> Tensor[]"
)
def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    kept: Tensor,
    to_out: Tensor,
    to_after: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, beta and state from those of output and last state."""
    name = "delta_rule_backward"
    (q, k, v, log_decay, beta, resets), shape = _rule_operands(name, q, k, v, log_decay, beta, resets)
    b, t, _, h, key_width, width, _ = shape
    kept = operand(f"{name}: kept", kept, (b, h, -(-t // PIECE), key_width, width), FP32)
    to_out = operand(f"{name}: to_out", to_out, tuple(v.shape), v.dtype)
    to_after = operand(f"{name}: to_after", to_after, (b, h, key_width, width), FP32)
    grads = [x.new_empty(x.shape) for x in (q, k, v, log_decay, beta, to_after)]
    name = f"{name}_{NAMES[v.dtype]}"
    call(name, shape, q, k, v, log_decay, beta, resets, kept, to_out, to_after, *grads)
    return grads


def _rule_operands(
    name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, resets: Tensor | None
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The delta rule's checked inputs, and the kernels' numbers about them."""
    if q.ndim != 4 or v.ndim != 4 or not all(q.shape[2:]) or not all(v.shape[2:]) or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"{name}: q must be (b, t, kh, k) and v (b, t, h, v), h a multiple of kh and no width 0; "
            f"they are {tuple(q.shape)} and {tuple(v.shape)}."
        )
    b, t, h, _ = v.shape
    keys, gates = (b, t, *q.shape[2:]), (b, t, h)
    q, k = operand(f"{name}: q", q, keys, FP32), operand(f"{name}: k", k, keys, FP32)
    v = operand(f"{name}: v", v, tuple(v.shape), FP32, BF16, contiguous=False)
    log_decay = operand(f"{name}: log_decay", log_decay, gates, FP32)
    beta = operand(f"{name}: beta", beta, gates, FP32)
    resets = None if resets is None else operand(f"{name}: resets", resets, (b, t), torch.bool)
    v, (*_, width, row) = _in_rows(v)
    return (q, k, v, log_decay, beta, resets), (b, t, q.shape[2], h, q.shape[3], width, row)
