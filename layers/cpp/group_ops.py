"""Weights in groups (layers/quantised/group_weight.py): multiplied as they are, and dequantised, in C++. See ops.py."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, call, operator
from layers.cpp.step import DTYPES, SCALES, mat

LEAST = 8  # columns of a group, unless the row is one group


def knows_groups(columns: int, group: int) -> bool:
    """Whether the kernels multiply rows in groups of this size: a power of two from 8 on, or the whole row."""
    return columns % 2 == 0 and (group == columns or (group >= LEAST and group & (group - 1) == 0))


@operator("(Tensor x, Tensor codes, Tensor scale, Tensor? zero) -> Tensor")
def group_linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """x (n, in) times the transpose of a weight (out, in) in groups, summed in fp32. For a few rows."""
    codes, scale, zero, columns = _weight("group_linear", codes, scale, zero)
    if not knows_groups(columns, columns // scale.shape[1]):
        raise ValueError(f"group_linear: groups of {columns // scale.shape[1]} are no power of two from {LEAST} on.")
    x = operand("group_linear: x", x, (len(x) if x.ndim else 0, columns), FP32, BF16)
    y = x.new_empty(len(x), len(codes))
    if y.numel() and not isinstance(x, FakeTensor):
        call(
            "linear",
            mat(codes, scale, zero),
            len(codes),
            columns,
            len(x),
            x,
            y,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
    return y


@operator("(Tensor codes, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor")
def dequantise_groups(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in fp32 or bf16: the definition's numbers, to the bit."""
    codes, scale, zero, columns = _weight("dequantise_groups", codes, scale, zero)
    if dtype not in (FP32, BF16):
        raise ValueError(f"dequantise_groups: dtype must be float32 or bfloat16, it is {dtype}.")
    w = codes.new_empty(len(codes), columns, dtype=dtype)
    if w.numel() and not isinstance(codes, FakeTensor):
        call("dequantise", mat(codes, scale, zero), len(codes), columns, w, DTYPES[dtype])
    return w


def dequantise_into(out: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """`dequantise_groups` into a contiguous tensor (out, in), which it returns: its memory is there already."""
    codes, scale, zero, columns = _weight("dequantise_into", codes, scale, zero)
    held = operand("dequantise_into: out", out, (len(codes), columns), FP32, BF16)
    if held is not out:
        raise ValueError("dequantise_into: out must be contiguous.")
    if out.numel():
        call("dequantise", mat(codes, scale, zero), len(codes), columns, out, DTYPES[out.dtype])
    return out


def _weight(name: str, codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The tensors of a weight, contiguous, and its number of columns."""
    if codes.ndim != 2 or scale.ndim != 2:
        raise ValueError(f"{name}: codes and scale must be matrices, they are {codes.shape} and {scale.shape}.")
    columns, groups = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1), scale.shape[1]
    if not groups or columns % groups:
        raise ValueError(f"{name}: {columns} columns do not consist of {groups} groups.")
    codes = operand(f"{name}: codes", codes, tuple(codes.shape), torch.int8, torch.uint8)
    scale = operand(f"{name}: scale", scale, (len(codes), groups), *SCALES)
    if zero is not None:
        zero = operand(f"{name}: zero", zero, (len(codes), groups), torch.int8)
    return codes, scale, zero, columns
