"""The C++ kernels as functions of tensors, and as torch operators, so that torch.compile leaves them whole.

Tensors are float32 or bfloat16 on the CPU, contiguous where nothing else is said: callers see to that. Gradients are in
functions.py.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layers.native.build import library

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _call(name: str, *arguments: Tensor | tuple[int, ...] | int | float | None) -> None:
    """Call a kernel: tensors by address, tuples as arrays of int64, whole numbers as int64, others as float.

    Nothing happens where torch traces with tensors that have no memory: there only the outputs' shapes count.
    """
    if any(isinstance(x, FakeTensor) for x in arguments):
        return
    kernels = library()
    assert isinstance(kernels, ctypes.CDLL)
    converted: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            converted.append(ctypes.c_void_p(x.data_ptr()))
        elif isinstance(x, tuple):
            converted.append((ctypes.c_int64 * len(x))(*x))
        elif isinstance(x, float):
            converted.append(ctypes.c_float(x))
        else:
            converted.append(x if x is None else ctypes.c_int64(x))
    getattr(kernels, name)(*converted)


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
    v, (b, t, h, width, row) = _in_rows(v)
    out, after, key_width = v.new_empty(v.shape), torch.empty_like(state), k.shape[3]
    kept = state.new_empty(b, h, -(-t // PIECE) if keep else 0, key_width, width)
    shape = (b, t, k.shape[2], h, key_width, width, row)
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
    v, (b, t, h, width, row) = _in_rows(v)
    grads = [x.new_empty(x.shape) for x in (q, k, v, log_decay, beta, to_after)]
    shape = (b, t, k.shape[2], h, k.shape[3], width, row)
    name = f"delta_rule_backward_{NAMES[v.dtype]}"
    _call(name, shape, q, k, v, log_decay, beta, starts, kept, to_out, to_after, *grads)
    return grads


@_operator("(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor[]")
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Tensor]:
    """q (b h t d), k, v (b kvh s d), the last axis contiguous. Returns answer and logsumexp (b h t) in fp32."""
    b, h, t, d = q.shape
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
    y = x.new_empty(x.shape, dtype=torch.float32 if exact else x.dtype)
    x, numbers = _heads_in_rows(x)
    _call(f"normalise_{_names(x, y)}", x, weight, gate, y, *numbers, _count(x, mean), eps, before, after)
    return y


@_operator("(Tensor x, Tensor weight, Tensor? gate, Tensor to_y, bool mean, float eps) -> Tensor[]")
def normalise_backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, to_y: Tensor, mean: bool, eps: float
) -> list[Tensor]:
    """Gradients of x, weight (in fp32) and, where there is one, gate."""
    to_x, to_weight = x.new_empty(x.shape), torch.empty_like(weight)
    to_gate = to_x.new_empty(0) if gate is None else torch.empty_like(gate)
    x, numbers = _heads_in_rows(x)
    tensors = (x, weight, gate, to_y, to_x, to_weight, None if gate is None else to_gate)
    _call(f"normalise_backward_{_names(x, to_y)}", *tensors, *numbers, _count(x, mean), eps)
    return [to_x, to_weight, to_gate]


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
    y = torch.empty_like(x)
    _call(f"convolve_{NAMES[x.dtype]}", x, weight, state, y, *x.shape, weight.shape[0])
    return y


@_operator("(Tensor x, Tensor weight, Tensor state, Tensor to_y) -> Tensor[]")
def convolve_backward(x: Tensor, weight: Tensor, state: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of x, weight (in fp32) and state."""
    grads = [torch.empty_like(tensor) for tensor in (x, weight, state)]
    _call(f"convolve_backward_{NAMES[x.dtype]}", x, weight, state, to_y, *grads, *x.shape, weight.shape[0])
    return grads


@_operator("(Tensor x) -> Tensor")
def silu_fp32(x: Tensor) -> Tensor:
    """silu(x) in fp32, to the bit what `normalise` multiplies by."""
    y = x.new_empty(x.shape, dtype=torch.float32)
    _call(f"silu_{NAMES[x.dtype]}", x, y, x.numel())
    return y


@_operator("(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up for matrices (n d), each row contiguous."""
    y = gate.new_empty(gate.shape)
    _call(f"swiglu_{NAMES[gate.dtype]}", gate, up, y, *gate.shape, gate.stride(0), up.stride(0))
    return y


@_operator("(Tensor gate, Tensor up, Tensor to_y) -> Tensor[]")
def swiglu_backward(gate: Tensor, up: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of gate and up, side by side in one matrix (n 2d) where gate and up are so."""
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

    weights (n k) are fp32.
    """
    y = out.new_empty(places.shape[0], out.shape[1], dtype=torch.float32 if exact else out.dtype)
    _call(f"combine_{_names(out, y)}", out, weights, places, y, *places.shape, out.shape[1])
    return y


@_operator("(Tensor out, Tensor weights, Tensor places, Tensor to_y) -> Tensor[]")
def spread(out: Tensor, weights: Tensor, places: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of `combine`'s out and weights."""
    grads = [torch.empty_like(out), torch.empty_like(weights)]
    _call(f"spread_{_names(out, to_y)}", out, weights, places, to_y, *grads, *places.shape, out.shape[1])
    return grads


@_operator("(Tensor indices, int experts) -> Tensor[]")
def route(indices: Tensor, experts: int) -> list[Tensor]:
    """Sort the choices (n k) by expert: the token of each place, the place of each choice, where each expert ends."""
    token, places = indices.new_empty(indices.numel()), torch.empty_like(indices)
    ends = indices.new_empty(experts, dtype=torch.int32)
    _call("route", indices, token, places, ends, indices.numel(), indices.shape[1], experts)
    return [token, places, ends]
