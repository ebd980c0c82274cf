"""The C++ kernels as functions of tensors, and as torch operators, so that torch.compile leaves them whole.

Tensors are float32 or bfloat16 on the CPU, contiguous where nothing else is said: callers see to that. No gradients.
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


@_operator("(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? starts, Tensor state) -> Tensor[]")
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None, state: Tensor
) -> list[Tensor]:
    """q, k (b t kh k), log_decay, beta (b t h), state (b h k v) in fp32; v (b t h v); starts (b t) bool or None.

    v may lie in rows that hold more. Returns output and state.
    """
    b, t, h, width = v.shape
    if v.stride()[2:] != (width, 1) or v.stride(0) != t * v.stride(1):
        v = v.contiguous()
    out, after = v.new_empty(v.shape), torch.empty_like(state)
    shape = (b, t, k.shape[2], h, k.shape[3], width, v.stride(1))
    _call(f"delta_rule_{NAMES[v.dtype]}", shape, q, k, v, log_decay, beta, starts, state, out, after)
    return [out, after]


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
    "(Tensor x, Tensor weight, Tensor? gate, float count, float eps, bool before, bool after, bool exact) -> Tensor"
)
def normalise(
    x: Tensor, weight: Tensor, gate: Tensor | None, count: float, eps: float, before: bool, after: bool, exact: bool
) -> Tensor:
    """x / √(Σx² / count + eps) · weight (· silu(gate)) over the last axis, weight in fp32; into fp32 if `exact`.

    x: (b t h d) may lie in rows that hold more.
    before, after: whether it is rounded to x's dtype before and after the weight.
    """
    y = x.new_empty(x.shape, dtype=torch.float32 if exact else x.dtype)
    width, heads = x.shape[-1], 1
    if x.ndim == 4 and x.stride()[2:] == (width, 1) and x.stride(0) == x.shape[1] * x.stride(1):
        heads, stride = x.shape[2], x.stride(1)  # heads that are a part of longer rows
    else:
        x, stride = x.contiguous(), width
    name = "bf16_fp32" if exact and x.dtype == torch.bfloat16 else NAMES[x.dtype]
    rows = x.numel() // width
    _call(f"normalise_{name}", x, weight, gate, y, rows, heads, stride, width, float(count), float(eps), before, after)
    return y


@_operator("(Tensor x, Tensor weight, Tensor state) -> Tensor")
def convolve(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """silu of each channel's filter over x (b t d) after state (b taps−1 d); weight (taps d) in fp32."""
    y = torch.empty_like(x)
    _call(f"convolve_{NAMES[x.dtype]}", x, weight, state, y, *x.shape, weight.shape[0])
    return y


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


@_operator("(Tensor out, Tensor weights, Tensor places) -> Tensor")
def combine(out: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Σ_j weights[i, j] · out[places[i, j]] for each token i, added in fp32 in the order of places."""
    y = out.new_empty(places.shape[0], out.shape[1])
    _call(f"combine_{NAMES[out.dtype]}", out, weights, places, y, *places.shape, out.shape[1])
    return y


@_operator("(Tensor indices, int experts) -> Tensor[]")
def route(indices: Tensor, experts: int) -> list[Tensor]:
    """Sort the choices (n k) by expert: the token of each place, the place of each choice, where each expert ends."""
    token, places = indices.new_empty(indices.numel()), torch.empty_like(indices)
    ends = indices.new_empty(experts, dtype=torch.int32)
    _call("route", indices, token, places, ends, indices.numel(), indices.shape[1], experts)
    return [token, places, ends]
