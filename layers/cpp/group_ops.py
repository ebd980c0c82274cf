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
    codes, scale, zero, columns = groups_of("group_linear", codes, scale, zero)
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
    codes, scale, zero, columns = groups_of("dequantise_groups", codes, scale, zero)
    if dtype not in (FP32, BF16):
        raise ValueError(f"dequantise_groups: dtype must be float32 or bfloat16, it is {dtype}.")
    w = codes.new_empty(len(codes), columns, dtype=dtype)
    if w.numel() and not isinstance(codes, FakeTensor):
        call("dequantise", mat(codes, scale, zero), len(codes), columns, w, DTYPES[dtype])
    return w


def groups_of(
    name: str, codes: Tensor, scale: Tensor, zero: Tensor | None, *, experts: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The tensors of a weight, contiguous, and its number of columns; with `experts`, of the matrices of all experts.

    Raises: ValueError for tensors that make no weight.
    """
    if codes.ndim != 2 + experts or scale.ndim != codes.ndim:
        wanted = "(e, out, in) and (e, out, groups)" if experts else "matrices"
        raise ValueError(f"{name}: codes and scale must be {wanted}, they are {codes.shape} and {scale.shape}.")
    columns, groups = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1), scale.shape[-1]
    if not groups or columns % groups:
        raise ValueError(f"{name}: {columns} columns do not consist of {groups} groups.")
    shape = (*codes.shape[:-1], groups)
    codes = operand(f"{name}: codes", codes, tuple(codes.shape), torch.int8, torch.uint8)
    scale = operand(f"{name}: scale", scale, shape, *SCALES)
    if zero is not None:
        zero = operand(f"{name}: zero", zero, shape, torch.int8)
    return codes, scale, zero, columns
