"""Fast implementations of the causal convolution. Padded and packed rows take the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.causal_conv import convolve, inputs_with_state, last_inputs
from layers.cpp import functions as native
from layers.dispatch.registry import implements
from layers.kernels import cases
from layers.segments import Segments


@implements("causal_conv", "cpp")
def cpp(x: Tensor, weight: Tensor, *, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """One pass over memory on the CPU. A token by itself takes the definition too."""
    if segments is not None or x.shape[1] == 1:
        return convolve(x, weight, state=state, segments=segments)
    taps, before = weight.mT.float().contiguous(), state.to(x.dtype).contiguous()
    y = native.convolve(x.contiguous(), taps, before)
    # A traced graph serves any length, also one that is shorter than what is carried.
    carried = state.shape[1]
    recent = x if torch.compiler.is_compiling() else x[:, max(x.shape[1] - carried, 0) :]
    return y, last_inputs(torch.cat((before, recent), dim=1), carried, None)


@implements("causal_conv", "fla", checked_by=cases.causal_conv)
def fla(x: Tensor, weight: Tensor, *, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel."""
    if segments is not None:
        return convolve(x, weight, state=state, segments=segments)
    from fla.modules.convolution import causal_conv1d

    # FLA carries as many inputs as there are taps, (b, d, taps); the oldest is never read.
    initial = F.pad(state.to(x.dtype).mT, (1, 0)).contiguous()
    y = causal_conv1d(x, weight.to(x.dtype), initial_state=initial, activation="silu", backend="triton")[0]
    return y, last_inputs(inputs_with_state(x, state, None), state.shape[1], None)
