"""The C++ kernels with their gradients, which are kernels too and cannot be differentiated again."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.cpp import ops


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, resets: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and last state; arguments as `ops.delta_rule` takes them."""
    if torch.is_grad_enabled():
        return _DeltaRule.apply(q, k, v, log_decay, beta, resets, state)
    out, after, _ = ops.delta_rule(q, k, v, log_decay, beta, resets, state, False)
    return out, after


class _DeltaRule(torch.autograd.Function):
    """Keeps its inputs and the memory before each piece; the backward pass makes the rest again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, after, kept = ops.delta_rule(*inputs, True)
        ctx.save_for_backward(*inputs[:6], kept)
        return out, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor, to_after: Tensor) -> tuple[Tensor | None, ...]:
        grads = ops.delta_rule_backward(*ctx.saved_tensors, to_out.contiguous(), to_after.contiguous())
        return *grads[:5], None, grads[5]


def normalise(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    mean: bool,
    eps: float,
    before: bool = False,
    after: bool = False,
    exact: bool = False,
) -> Tensor:
    """See `ops.normalise`."""
    if torch.is_grad_enabled():
        return _Normalise.apply(x, weight, gate, mean, eps, before, after, exact)
    return ops.normalise(x, weight, gate, mean, eps, before, after, exact)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.options = options[:2]
        return ops.normalise(x, weight, gate, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        to_x, to_weight, to_gate = ops.normalise_backward(x, weight, gate, to_y.contiguous(), *ctx.options)
        return to_x, to_weight, None if gate is None else to_gate, None, None, None, None, None


def convolve(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """See `ops.convolve`."""
    return _Convolve.apply(x, weight, state) if torch.is_grad_enabled() else ops.convolve(x, weight, state)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, state)
        return ops.convolve(x, weight, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.convolve_backward(*ctx.saved_tensors, to_y.contiguous()))


def silu_fp32(x: Tensor) -> Tensor:
    """See `ops.silu_fp32`."""
    return _Silu.apply(x) if torch.is_grad_enabled() else ops.silu_fp32(x)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return ops.silu_fp32(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = x.float().sigmoid()
        return (to_y * share * (1 + x * (1 - share))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `ops.swiglu`."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else ops.swiglu(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return ops.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.swiglu_backward(*ctx.saved_tensors, to_y.contiguous()))


def gather(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """x[token], where token and inverse come from `ops.permute`."""
    return _Gather.apply(x, token, inverse) if torch.is_grad_enabled() else x.index_select(0, token)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_rows: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return ops.combine(to_rows.contiguous(), torch.ones(inverse.shape), inverse, False), None, None


def combine(out: Tensor, weights: Tensor, inverse: Tensor, *, exact: bool) -> Tensor:
    """See `ops.combine`."""
    if torch.is_grad_enabled():
        return _Combine.apply(out, weights, inverse, exact)
    return ops.combine(out, weights, inverse, exact)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, weights: Tensor, inverse: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(out, weights, inverse)
        return ops.combine(out, weights, inverse, exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, ...]:
        to_out, to_weights = ops.combine_backward(*ctx.saved_tensors, to_y.contiguous())
        return to_out, to_weights, None, None
