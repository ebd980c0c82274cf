"""Norms, gates and activations in C++. See ops.py."""

import torch
from torch import Tensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, NAMES, call, names, operator


@operator(
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
    call(f"normalise_{names(x, y)}", x, weight, gate, y, *numbers, _count(x, mean), eps, before, after)
    return y


@operator("(Tensor x, Tensor weight, Tensor? gate, Tensor to_y, bool mean, float eps) -> Tensor[]")
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
    call(f"normalise_backward_{names(x, to_y)}", *tensors, *numbers, _count(x, mean), eps)
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


@operator("(Tensor x) -> Tensor")
def silu_fp32(x: Tensor) -> Tensor:
    """silu(x) in fp32, to the bit what `normalise` multiplies by."""
    x = operand("silu_fp32: x", x, tuple(x.shape), FP32, BF16)
    y = x.new_empty(x.shape, dtype=FP32)
    call(f"silu_{NAMES[x.dtype]}", x, y, x.numel())
    return y


@operator("(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up for matrices (n d)."""
    gate, up = _pair("swiglu", gate, up)
    y = gate.new_empty(gate.shape)
    call(f"swiglu_{NAMES[gate.dtype]}", gate, up, y, *gate.shape, gate.stride(0), up.stride(0))
    return y


def _pair(name: str, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if gate.ndim != 2:
        raise ValueError(f"{name}: gate must be a matrix (n, d), it is {tuple(gate.shape)}.")
    gate = operand(f"{name}: gate", gate, tuple(gate.shape), FP32, BF16, rows=True)
    return gate, operand(f"{name}: up", up, tuple(gate.shape), gate.dtype, rows=True)


@operator("(Tensor gate, Tensor up, Tensor to_y) -> Tensor[]")
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
    call(f"swiglu_backward_{NAMES[gate.dtype]}", gate, up, to_y, to_gate, to_up, *gate.shape, *strides)
    return [to_gate, to_up]
