"""The causal convolution in C++. See ops.py."""

import torch
from torch import Tensor

from layers.cpp.operands import operand
from layers.cpp.operators import BF16, FP32, NAMES, call, operator


@operator("(Tensor x, Tensor weight, Tensor state) -> Tensor")
def convolve(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """silu of each channel's filter over x (b t d) after state (b kernel_size−1 d); weight (kernel_size d) in fp32."""
    x, weight, state = _filter_operands("convolve", x, weight, state)
    y = torch.empty_like(x)
    call(f"convolve_{NAMES[x.dtype]}", x, weight, state, y, *x.shape, weight.shape[0])
    return y


@operator("(Tensor x, Tensor weight, Tensor state, Tensor to_y) -> Tensor[]")
def convolve_backward(x: Tensor, weight: Tensor, state: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of x, weight (in fp32) and state."""
    x, weight, state = _filter_operands("convolve_backward", x, weight, state)
    to_y = operand("convolve_backward: to_y", to_y, tuple(x.shape), x.dtype)
    grads = [torch.empty_like(tensor) for tensor in (x, weight, state)]
    call(f"convolve_backward_{NAMES[x.dtype]}", x, weight, state, to_y, *grads, *x.shape, weight.shape[0])
    return grads


def _filter_operands(name: str, x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 3 or weight.ndim != 2 or not len(weight):
        raise ValueError(
            f"{name}: x must be (b, t, d) and weight (kernel_size, d) with at least one tap; "
            f"they are {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    b, _, d = x.shape
    x = operand(f"{name}: x", x, tuple(x.shape), FP32, BF16)
    weight = operand(f"{name}: weight", weight, (len(weight), d), FP32)
    return x, weight, operand(f"{name}: state", state, (b, len(weight) - 1, d), x.dtype)
