"""Launch a kernel. One place, so that a test can count launches."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *tensors: Any, warps: int = 4, **constants: Any) -> None:
    """Run `kernel` on the device of `like`, which need not be the current one.

    Args:
        grid: programs along each axis.
        warps: of 32 threads, a program.
        constants: compile-time constants, by name.
    """
    if not like.is_cuda:  # Triton's interpreter
        kernel[grid](*tensors, **constants)
        return
    with torch.cuda.device_of(like):
        kernel[grid](*tensors, **constants, num_warps=warps)
