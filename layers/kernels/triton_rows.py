"""Norms, gates and activations on CUDA: one Triton kernel each, forward and backward, with the checkpoints' rounding.

What the kernels do not cover runs by the definition: active hooks, fp64, other gates, and traced graphs, whose compiler
fuses the definition itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.dispatch.registry import Results, implements
from layers.hook_point import HookPoint
from layers.kernels.cases import random, with_gradients
from layers.mlp import activate
from layers.mlp import swiglu as swiglu_in_torch
from layers.norm import GatedRMSNorm, RMSNorm, l2_normalise
from layers.norm import _l2_normalise as l2_in_torch
from layers.norm import gated_rms_norm as gated_in_torch
from layers.norm import rms_norm as rms_in_torch


def _norm_case(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Results:
    width = head_dim or 200
    norm = RMSNorm(width).to(device, dtype)
    norm.backend = backend
    x, weight = inputs = random(((3, 7, width), (width,)), device, dtype)
    y = torch.func.functional_call(norm, {"weight": weight}, (x,))
    return with_gradients((y,), inputs)


def _gated_case(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Results:
    width = head_dim or 128
    norm = GatedRMSNorm(width).to(device, dtype)
    norm.backend = backend
    x, gate, weight = inputs = random(((3, 7, width), (3, 7, width), (width,)), device, dtype)
    y = torch.func.functional_call(norm, {"weight": weight}, (x, gate))
    return with_gradients((y,), inputs)


def _l2_case(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Results:
    inputs = random(((3, 7, head_dim or 128),), device, dtype)
    y = l2_normalise(inputs[0], scale=0.5, backend=backend)
    # The squares of unit rows always add up to the same: their gradient is zero.
    return with_gradients((y * torch.arange(y.shape[-1], device=device) / y.shape[-1],), inputs)


def _swiglu_case(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    gate, up = inputs = random(((3, 500), (3, 500)), device, dtype)
    return with_gradients((activate(gate, up, backend=backend),), inputs)


def _takes(x: Tensor, *others: Tensor, hook: HookPoint | None = None) -> bool:
    if torch.compiler.is_compiling() or (hook is not None and hook.active) or not x.numel():
        return False
    return all(y.dtype in (torch.float32, torch.bfloat16, torch.float16) for y in (x, *others))


@implements("elementwise.rms_norm", "triton", checked_by=_norm_case)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centred: bool, hook: HookPoint | None = None) -> Tensor:
    # With a weight of more precision the definition gives x's dtype, and rounds before the product.
    if not _takes(x, weight, hook=hook):
        return rms_in_torch(x, weight, eps=eps, zero_centred=zero_centred, hook=hook)
    return _RMSNorm.apply(x, weight, None, eps, zero_centred)


@implements("elementwise.gated_rms_norm", "triton", checked_by=_gated_case)
def gated_rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor, *, eps: float, activation: str = "silu", hook: HookPoint | None = None
) -> Tensor:
    if activation != "silu" or x.dtype != gate.dtype or not _takes(x, weight, hook=hook):
        return gated_in_torch(x, weight, gate, eps=eps, activation=activation, hook=hook)
    return _RMSNorm.apply(x, weight, gate, eps, False)


@implements("elementwise.l2_normalise", "triton", checked_by=_l2_case)
def l2(x: Tensor, *, eps: float, scale: float | int) -> Tensor:
    return _L2.apply(x, eps, scale) if _takes(x) else l2_in_torch(x, eps=eps, scale=scale)


@implements("elementwise.swiglu", "triton", checked_by=_swiglu_case)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    same = (gate.dtype, gate.shape) == (up.dtype, up.shape)
    return _SwiGLU.apply(gate, up) if same and _takes(gate) else swiglu_in_torch(gate, up)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, zero_centred: bool) -> Tensor:
        from layers.triton.rows import rms_norm

        rows, gates = _rows(x), None if gate is None else _rows(gate)
        y, rate = rms_norm(rows, weight, gates, eps=eps, zero_centred=zero_centred)
        ctx.save_for_backward(rows, weight, gates, rate)
        ctx.zero_centred, ctx.shape = zero_centred, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        from layers.triton.rows import rms_norm_backward

        x, weight, gate, rate = ctx.saved_tensors
        to_x, to_weight, to_gate = rms_norm_backward(_rows(grad), x, weight, gate, rate, zero_centred=ctx.zero_centred)
        to_gate = None if to_gate is None else to_gate.view(ctx.shape)
        return to_x.view(ctx.shape), to_weight.to(weight.dtype), to_gate, None, None


class _L2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, scale: float) -> Tensor:
        from layers.triton.rows import l2_normalise

        rows = _rows(x)
        y, rate = l2_normalise(rows, eps=eps, scale=scale)
        ctx.save_for_backward(rows, rate)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from layers.triton.rows import l2_normalise_backward

        x, rate = ctx.saved_tensors
        return l2_normalise_backward(_rows(grad), x, rate, scale=ctx.scale).view(ctx.shape), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from layers.triton.rows import swiglu

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        from layers.triton.rows import swiglu_backward

        gate, up = ctx.saved_tensors
        return swiglu_backward(grad.contiguous(), gate, up)
