"""Norms, gates and activations in one pass over memory: C++ on the CPU, one Triton kernel on CUDA."""

import torch
from torch import Tensor

from layers.cpp import functions as native
from layers.dispatch.registry import implements
from layers.hook_point import HookPoint
from layers.mlp import swiglu
from layers.norm import gated_rms_norm, rms_norm, scaled


@implements("elementwise.l2_normalise", "cpp")
def l2_normalise_cpp(x: Tensor, *, eps: float, scale: float | int) -> Tensor:
    weight = torch.full((x.shape[-1],), float(scale), dtype=torch.float32)
    return native.normalise(x, weight, mean=False, eps=eps, exact=True)


@implements("elementwise.rms_norm", "cpp")
def rms_norm_cpp(x: Tensor, weight: Tensor, *, eps: float, zero_centred: bool, hook: HookPoint | None = None) -> Tensor:
    """In torch where a scale that is not zero-centred has another dtype than x."""
    if not zero_centred and weight.dtype != x.dtype:
        return rms_norm(x, weight, eps=eps, zero_centred=zero_centred, hook=hook)
    exact = 1.0 * zero_centred + weight.float()
    if hook is None or not hook.active:
        return native.normalise(x, exact, mean=True, eps=eps, before=not zero_centred)
    # The kernel without its scale gives the bits that it has inside: a hook that changes nothing leaves no trace.
    normed = native.normalise(x, torch.ones_like(exact), mean=True, eps=eps, exact=True)
    return scaled(hook(normed), weight, x.dtype, zero_centred=zero_centred)


@implements("elementwise.gated_rms_norm", "cpp")
def gated_rms_norm_cpp(
    x: Tensor, weight: Tensor, gate: Tensor, *, eps: float, activation: str = "silu", hook: HookPoint | None = None
) -> Tensor:
    """In torch for other activations than silu, and where x and gate have two dtypes."""
    if activation != "silu" or x.dtype != gate.dtype:
        return gated_rms_norm(x, weight, gate, eps=eps, activation=activation, hook=hook)
    same = weight.dtype == x.dtype  # else the product is fp32, and nothing is rounded after it
    exact, gate = weight.float(), gate.contiguous()
    if hook is None or not hook.active:
        return native.normalise(x, exact, gate, mean=True, eps=eps, before=True, after=same)
    normed = native.normalise(x, exact, mean=True, eps=eps, before=True, after=same, exact=not same)
    return (normed * hook(native.silu_fp32(gate))).to(x.dtype)


@implements("elementwise.gated_rms_norm", "fla")
def gated_rms_norm_fla(
    x: Tensor, weight: Tensor, gate: Tensor, *, eps: float, activation: str = "silu", hook: HookPoint | None = None
) -> Tensor:
    """In torch for other activations than silu, and where a hook reads the gate."""
    if activation != "silu" or (hook is not None and hook.active):
        return gated_rms_norm(x, weight, gate, eps=eps, activation=activation, hook=hook)
    from fla.modules.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(x, gate, weight, None, activation="silu", eps=eps)


@implements("elementwise.swiglu", "cpp")
def swiglu_cpp(gate: Tensor, up: Tensor) -> Tensor:
    """In torch for gate and up of two dtypes or shapes."""
    if (gate.dtype, gate.shape) != (up.dtype, up.shape):
        return swiglu(gate, up)
    width = gate.shape[-1]
    return native.swiglu(gate.reshape(-1, width), up.reshape(-1, width)).view(gate.shape)
