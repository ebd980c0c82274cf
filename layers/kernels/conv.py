"""Fast implementations of the causal convolution: one pass over memory on the CPU, a Triton kernel on CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.causal_conv import convolve, last_inputs
from layers.cpp import functions as native
from layers.dispatch.registry import implements
from layers.kernels import cases
from layers.segments import Segments


@implements("causal_conv", "cpp")
def cpp(x: Tensor, weight: Tensor, *, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """One pass over memory. A token by itself takes the definition, as do padded and packed rows."""
    if segments is not None or x.shape[1] == 1:
        return convolve(x, weight, state=state, segments=segments)
    taps, before = weight.mT.float().contiguous(), state.to(x.dtype).contiguous()
    return native.convolve(x.contiguous(), taps, before), _carried(x, before, None)


@implements("causal_conv", "fla", checked_by=cases.causal_conv)
def fla(x: Tensor, weight: Tensor, *, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel: packed rows as one row with boundaries.

    A token by itself takes the definition, as do rows that begin with padding: their state is not before column 0.
    """
    single = x.shape[1] == 1 and not torch.is_grad_enabled()
    if single or (segments is not None and segments.starts_late):
        return convolve(x, weight, state=state, segments=segments)
    from fla.modules.convolution import causal_conv1d

    # FLA carries as many inputs as there are taps, (n, d, taps); the oldest is never read.
    initial, cu_seqlens, rows = F.pad(state.to(x.dtype).mT, (1, 0)), None, x
    if segments is not None:
        cu_seqlens, rows = segments.cu_seqlens, x.flatten(0, 1)[None]
        initial = segments.to_segments(initial)
    y = causal_conv1d(
        rows,
        weight.to(x.dtype),
        initial_state=initial.contiguous(),
        activation="silu",
        backend="triton",
        cu_seqlens=cu_seqlens,
    )[0]
    return y.view_as(x), _carried(x, state, segments)


def _carried(x: Tensor, state: Tensor, segments: Segments | None) -> Tensor:
    """`last_inputs`, without a copy of all inputs."""
    if segments is None and not torch.compiler.is_compiling():  # a traced graph serves any length, also a short one
        x = x[:, max(x.shape[1] - state.shape[1], 0) :]
    return last_inputs(x, state, segments)
