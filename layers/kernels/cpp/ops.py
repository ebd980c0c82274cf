"""The C++ kernels as functions of tensors, and as torch operators, so that torch.compile leaves them whole.

Each checks its arguments: tensors of the dtypes and shapes that its docstring names, on the CPU, or a ValueError.
Where a kernel wants contiguous numbers, it gets a contiguous copy. Gradients are in functions.py.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layers.kernels.cpp.build import library
from layers.kernels.cpp.operands import address, operand

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = {FP32: "fp32", BF16: "bf16"}


def _call(name: str, *arguments: Tensor | tuple[int, ...] | int | float | None) -> int | None:
    """Call a kernel: tensors by address, tuples as arrays of int64. Its answer, where it gives one.

    Nothing happens where torch traces with tensors that have no memory: there only the outputs' shapes count.
    """
    if any(isinstance(x, FakeTensor) for x in arguments):
        return 1
    kernels = library()
    if isinstance(kernels, str):
        raise RuntimeError(f"The compiled kernels cannot run here: {kernels}.")
    converted: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            converted.append(address(x))
        elif isinstance(x, tuple):
            converted.append((ctypes.c_int64 * len(x))(*x))
        else:
            converted.append(x)
    return getattr(kernels, name)(*converted)


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an operator of torch."""

    def make(run: Callable[..., Any]) -> Callable[..., Any]:
        name = f"qwen3next::{run.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "CPU")(run)
        torch.library.register_fake(name)(run)
        return getattr(torch.ops.qwen3next, run.__name__).default

    return make


PIECE = 256  # tokens from one kept memory to the next: delta_rule.h


def _in_rows(v: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """v (b t h v), which may lie in rows that hold more, and the kernels' first numbers about it."""
    b, t, h, width = v.shape
    if v.stride()[2:] != (width, 1) or v.stride(0) != t * v.stride(1):
        v = v.contiguous()
    return v, (b, t, h, width, v.stride(1))


@_operator(
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? starts, Tensor state, bool keep) -> Tensor[]"
)
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None, state: Tensor, keep: bool
) -> list[Tensor]:
    """q, k (b t kh k), log_decay, beta (b t h), state (b h k v) in fp32; v (b t h v); starts (b t) bool or None.

    Returns output, state, and the memories (b h pieces k v) before each PIECE tokens if `keep`.
    """
    (q, k, v, log_decay, beta, starts), shape = _rule_operands("delta_rule", q, k, v, log_decay, beta, starts)
    b, t, _, h, key_width, width, _ = shape
    state = operand("delta_rule: state", state, (b, h, key_width, width), FP32)
    out, after = v.new_empty(v.shape), torch.empty_like(state)
    kept = state.new_empty(b, h, -(-t // PIECE) if keep else 0, key_width, width)
    tensors = (q, k, v, log_decay, beta, starts, state, out, after, kept if keep else None)
    _call(f"delta_rule_{NAMES[v.dtype]}", shape, *tensors)
    return [out, after, kept]


@_operator(
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? starts, Tensor kept, Tensor to_out,"
    " Tensor to_after) -> Tensor[]"
)
def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    kept: Tensor,
    to_out: Tensor,
    to_after: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, beta and state from those of output and last state."""
    name = "delta_rule_backward"
    (q, k, v, log_decay, beta, starts), shape = _rule_operands(name, q, k, v, log_decay, beta, starts)
    b, t, _, h, key_width, width, _ = shape
    kept = operand(f"{name}: kept", kept, (b, h, -(-t // PIECE), key_width, width), FP32)
    to_out = operand(f"{name}: to_out", to_out, tuple(v.shape), v.dtype)
    to_after = operand(f"{name}: to_after", to_after, (b, h, key_width, width), FP32)
    grads = [x.new_empty(x.shape) for x in (q, k, v, log_decay, beta, to_after)]
    name = f"{name}_{NAMES[v.dtype]}"
    _call(name, shape, q, k, v, log_decay, beta, starts, kept, to_out, to_after, *grads)
    return grads


def _rule_operands(
    name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None
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
    starts = None if starts is None else operand(f"{name}: starts", starts, (b, t), torch.bool)
    v, (*_, width, row) = _in_rows(v)
    return (q, k, v, log_decay, beta, starts), (b, t, q.shape[2], h, q.shape[3], width, row)


@_operator("(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor[]")
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
    _call(
        f"attend_{NAMES[q.dtype]}", (b, h, k.shape[1], t, k.shape[2], d, *strides, int(causal)), q, k, v, out, logsumexp
    )
    return [out, logsumexp]


@_operator(
    "(Tensor x, Tensor weight, Tensor? gate, bool mean, float eps, bool before, bool after, bool exact) -> Tensor"
)
def normalise(
    x: Tensor, weight: Tensor, gate: Tensor | None, mean: bool, eps: float, before: bool, after: bool, exact: bool
) -> Tensor:
    """x / √(Σx² + eps) · weight (· silu(gate)) over the last axis, weight in fp32; into fp32 if `exact`.

    x: (b t h d) may lie in rows that hold more.
    mean: of the squares instead of their sum.
    before, after: whether it is rounded to x's dtype before and after the weight.
    """
    x, weight, gate = _norm_operands("normalise", x, weight, gate)
    y = x.new_empty(x.shape, dtype=FP32 if exact else x.dtype)
    x, numbers = _heads_in_rows(x)
    _call(f"normalise_{_names(x, y)}", x, weight, gate, y, *numbers, _count(x, mean), eps, before, after)
    return y


@_operator("(Tensor x, Tensor weight, Tensor? gate, Tensor to_y, bool mean, float eps) -> Tensor[]")
def normalise_backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, to_y: Tensor, mean: bool, eps: float
) -> list[Tensor]:
    """Gradients of x, weight (in fp32) and, where there is one, gate."""
    x, weight, gate = _norm_operands("normalise_backward", x, weight, gate)
    to_y = operand("normalise_backward: to_y", to_y, tuple(x.shape), FP32, x.dtype)
    to_x, to_weight = x.new_empty(x.shape), torch.empty_like(weight)
    to_gate = to_x.new_empty(0) if gate is None else torch.empty_like(gate)
    x, numbers = _heads_in_rows(x)
    tensors = (x, weight, gate, to_y, to_x, to_weight, None if gate is None else to_gate)
    _call(f"normalise_backward_{_names(x, to_y)}", *tensors, *numbers, _count(x, mean), eps)
    return [to_x, to_weight, to_gate]


def _norm_operands(name: str, x: Tensor, weight: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{name}: x must have a last axis of at least one number, it is {tuple(x.shape)}.")
    x = operand(f"{name}: x", x, tuple(x.shape), FP32, BF16, contiguous=False)
    weight = operand(f"{name}: weight", weight, tuple(x.shape[-1:]), FP32)
    return x, weight, None if gate is None else operand(f"{name}: gate", gate, tuple(x.shape), x.dtype)


def _heads_in_rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x, and its rows, rows that are neighbours, elements from one such group to the next, columns."""
    width, heads = x.shape[-1], 1
    if x.ndim == 4 and x.stride()[2:] == (width, 1) and x.stride(0) == x.shape[1] * x.stride(1):
        heads, stride = x.shape[2], x.stride(1)  # heads that are a part of longer rows
    else:
        x, stride = x.contiguous(), width
    return x, (x.numel() // width, heads, stride, width)


def _count(x: Tensor, mean: bool) -> float:
    """What the sum of squares is divided by."""
    return float(x.shape[-1] if mean else 1)


def _names(x: Tensor, y: Tensor) -> str:
    return NAMES[x.dtype] if x.dtype == y.dtype else f"{NAMES[x.dtype]}_{NAMES[y.dtype]}"


@_operator("(Tensor x, Tensor weight, Tensor state) -> Tensor")
def convolve(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """silu of each channel's filter over x (b t d) after state (b taps−1 d); weight (taps d) in fp32."""
    x, weight, state = _filter_operands("convolve", x, weight, state)
    y = torch.empty_like(x)
    _call(f"convolve_{NAMES[x.dtype]}", x, weight, state, y, *x.shape, weight.shape[0])
    return y


@_operator("(Tensor x, Tensor weight, Tensor state, Tensor to_y) -> Tensor[]")
def convolve_backward(x: Tensor, weight: Tensor, state: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of x, weight (in fp32) and state."""
    x, weight, state = _filter_operands("convolve_backward", x, weight, state)
    to_y = operand("convolve_backward: to_y", to_y, tuple(x.shape), x.dtype)
    grads = [torch.empty_like(tensor) for tensor in (x, weight, state)]
    _call(f"convolve_backward_{NAMES[x.dtype]}", x, weight, state, to_y, *grads, *x.shape, weight.shape[0])
    return grads


def _filter_operands(name: str, x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 3 or weight.ndim != 2 or not len(weight):
        raise ValueError(
            f"{name}: x must be (b, t, d) and weight (taps, d) with at least one tap; "
            f"they are {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    b, _, d = x.shape
    x = operand(f"{name}: x", x, tuple(x.shape), FP32, BF16)
    weight = operand(f"{name}: weight", weight, (len(weight), d), FP32)
    return x, weight, operand(f"{name}: state", state, (b, len(weight) - 1, d), x.dtype)


@_operator("(Tensor x) -> Tensor")
def silu_fp32(x: Tensor) -> Tensor:
    """silu(x) in fp32, to the bit what `normalise` multiplies by."""
    x = operand("silu_fp32: x", x, tuple(x.shape), FP32, BF16)
    y = x.new_empty(x.shape, dtype=FP32)
    _call(f"silu_{NAMES[x.dtype]}", x, y, x.numel())
    return y


@_operator("(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up for matrices (n d)."""
    gate, up = _pair("swiglu", gate, up)
    y = gate.new_empty(gate.shape)
    _call(f"swiglu_{NAMES[gate.dtype]}", gate, up, y, *gate.shape, gate.stride(0), up.stride(0))
    return y


def _pair(name: str, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if gate.ndim != 2:
        raise ValueError(f"{name}: gate must be a matrix (n, d), it is {tuple(gate.shape)}.")
    gate = operand(f"{name}: gate", gate, tuple(gate.shape), FP32, BF16, rows=True)
    return gate, operand(f"{name}: up", up, tuple(gate.shape), gate.dtype, rows=True)


@_operator("(Tensor gate, Tensor up, Tensor to_y) -> Tensor[]")
def swiglu_backward(gate: Tensor, up: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of gate and up, side by side in one matrix (n 2d) where gate and up are so."""
    gate, up = _pair("swiglu_backward", gate, up)
    to_y = operand("swiglu_backward: to_y", to_y, tuple(gate.shape), gate.dtype)
    width = gate.shape[1]
    both = gate.new_empty(gate.shape[0], 2 * width)
    to_gate, to_up = both[:, :width], both[:, width:]
    if gate.stride(0) != 2 * width or up.stride(0) != 2 * width:
        gate, up, to_gate, to_up = (
            gate.contiguous(),
            up.contiguous(),
            gate.new_empty(gate.shape),
            up.new_empty(up.shape),
        )
    strides = (to_gate.stride(0), to_up.stride(0))
    _call(f"swiglu_backward_{NAMES[gate.dtype]}", gate, up, to_y, to_gate, to_up, *gate.shape, *strides)
    return [to_gate, to_up]


@_operator("(Tensor out, Tensor weights, Tensor places, bool exact) -> Tensor")
def combine(out: Tensor, weights: Tensor, places: Tensor, exact: bool) -> Tensor:
    """Σ_j weights[i, j] · out[places[i, j]] for each token i, added in fp32 in the order of places; left so if `exact`.

    weights (n k) are fp32; places (n k) name each row of out (n · k, d) once, as those of `route` do.
    """
    out, weights, places = _combine_operands("combine", out, weights, places)
    y = out.new_empty(places.shape[0], out.shape[1], dtype=FP32 if exact else out.dtype)
    _call(f"combine_{_names(out, y)}", out, weights, places, y, *places.shape, out.shape[1])
    return y


@_operator("(Tensor out, Tensor weights, Tensor places, Tensor to_y) -> Tensor[]")
def spread(out: Tensor, weights: Tensor, places: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of `combine`'s out and weights."""
    out, weights, places = _combine_operands("spread", out, weights, places)
    to_y = operand("spread: to_y", to_y, (places.shape[0], out.shape[1]), FP32, out.dtype)
    grads = [torch.empty_like(out), torch.empty_like(weights)]
    _call(f"spread_{_names(out, to_y)}", out, weights, places, to_y, *grads, *places.shape, out.shape[1])
    return grads


def _combine_operands(name: str, out: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if out.ndim != 2 or places.ndim != 2:
        raise ValueError(
            f"{name}: out must be (n · k, d) and places (n, k); they are {tuple(out.shape)} and {tuple(places.shape)}."
        )
    out = operand(f"{name}: out", out, tuple(out.shape), FP32, BF16)
    weights = operand(f"{name}: weights", weights, tuple(places.shape), FP32)
    places = operand(f"{name}: places", places, tuple(places.shape), torch.int64)
    if not _call("each_once", places, places.numel(), out.shape[0]):
        raise ValueError(f"{name}: places must name each of the {out.shape[0]} rows of out once.")
    return out, weights, places


@_operator("(Tensor indices, int experts) -> Tensor[]")
def route(indices: Tensor, experts: int) -> list[Tensor]:
    """Sort the choices (n k) by expert: the token of each place, the place of each choice, where each expert ends.

    Raises: ValueError for an index that names no expert.
    """
    if indices.ndim != 2 or experts < 1 or indices.numel() >= 2**31:
        raise ValueError(f"route: indices must be (n, k) for at least one expert, they are {tuple(indices.shape)}.")
    indices = operand("route: indices", indices, tuple(indices.shape), torch.int64)
    token, places = indices.new_empty(indices.numel()), torch.empty_like(indices)
    ends = indices.new_empty(experts, dtype=torch.int32)
    if not _call("route", indices, token, places, ends, indices.numel(), indices.shape[1], experts):
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"Tokens are routed to the experts {low} to {high}, and there are 0 to {experts - 1}.")
    return [token, places, ends]
