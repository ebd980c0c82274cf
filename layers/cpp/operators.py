"""Calls of compiled kernels, as operators of torch, so that torch.compile leaves them whole."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layers.cpp.build import library
from layers.cpp.operands import address

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = {FP32: "fp32", BF16: "bf16"}


def call(name: str, *arguments: Tensor | tuple[int, ...] | ctypes.Structure | int | float | None) -> int | None:
    """Call a kernel: tensors and structures by address, tuples as arrays of int64. Its answer, where it gives one.

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
        elif isinstance(x, ctypes.Structure):
            converted.append(ctypes.byref(x))
        else:
            converted.append(x)
    return getattr(kernels, name)(*converted)


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an operator of torch."""

    def make(run: Callable[..., Any]) -> Callable[..., Any]:
        name = f"qwen3next::{run.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "CPU")(run)
        torch.library.register_fake(name)(run)
        return getattr(torch.ops.qwen3next, run.__name__).default

    return make


def names(x: Tensor, y: Tensor) -> str:
    """The end of a kernel's name: the dtype of what it reads, and where it is another, of what it writes."""
    return NAMES[x.dtype] if x.dtype == y.dtype else f"{NAMES[x.dtype]}_{NAMES[y.dtype]}"
