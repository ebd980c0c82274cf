"""Depthwise causal convolution with carried state, then SiLU."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.dispatch.backends import choose
from layers.kernels.cpp import functions as native
from layers.norm import at_least_fp32
from layers.segments import Segments

State = Float[Tensor, "b carried d"]


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d taps"],
    *,
    state: State | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], State]:
    """silu(Σ_j weight[:, taps − 1 − j] · x[t − j]) over the tokens of the same sequence.

    Args:
        x: inputs; outputs at padding are meaningless but finite.
        weight: one filter a channel, the last tap meets the present token (torch's conv1d order).
        state: the taps − 1 inputs before the first token, oldest first; None means zeros. Not modified.
        segments: where sequences begin and end; None means every row is one sequence.
        backend: "torch", "cpp" (CPU) or "fla" (CUDA); "auto" picks.
    Returns: output (b t d) and the state after each row's last real token (b taps−1 d).
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    choice = choose("causal_conv", backend, x)
    segments = None if segments is None or segments.plain else segments
    x = x if segments is None else segments.real(x)
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    carried = weight.shape[1] - 1
    if choice == "cpp" and segments is None and x.shape[1] > 1:
        taps, before = weight.mT.float().contiguous(), state.to(x.dtype).contiguous()
        y = native.convolve(x.contiguous(), taps, before)
        # A traced graph serves any length, also one that is shorter than what is carried.
        recent = x if torch.compiler.is_compiling() else x[:, max(x.shape[1] - carried, 0) :]
        last = torch.cat((before, recent), dim=1)
        return y, last[:, last.shape[1] - carried :].clone()
    history = torch.cat((state.to(x.dtype), x), dim=1)  # (b, taps - 1 + t, d)
    if segments is not None:
        history = _state_beside_first_token(history, state, segments)
    if choice == "fla" and segments is None:
        y = _fla(x, weight, state)
    elif x.shape[1] == 1:
        y = F.silu((history * weight.mT.to(x.dtype)).sum(1, keepdim=True))
    else:
        y = _FilterTaps.apply(at_least_fp32(history), at_least_fp32(weight)).to(x.dtype)
        y = F.silu(y if segments is None else _without_leaks(y, history, weight, segments))
    return y, _last_inputs(history, carried, segments)


class _FilterTaps(torch.autograd.Function):
    """y_t = Σ_j weight[:, j] · history[t + j], one pass a tap over memory as it lies, (b, t, d).

    torch's conv1d wants (b, d, t): with the transposition there and back it takes over twice the time on a CPU, forward
    and backward, and leaves the delta rule a layout that it must copy again.
    """

    @staticmethod
    def forward(ctx: Any, history: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(history, weight)
        carried = weight.shape[1] - 1
        t = history.shape[1] - carried
        y = history[:, carried:] * weight[:, carried]
        for j in range(carried):
            y.addcmul_(history[:, j : j + t], weight[:, j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        history, weight = ctx.saved_tensors
        t = grad.shape[1]
        to_history = torch.zeros_like(history)
        to_weight = torch.empty_like(weight)
        for j in range(weight.shape[1]):
            to_history[:, j : j + t].addcmul_(grad, weight[:, j])
            to_weight[:, j] = (grad * history[:, j : j + t]).sum((0, 1))
        return to_history, to_weight


def _state_beside_first_token(history: Tensor, state: Tensor, segments: Segments) -> Tensor:
    """Move the carried inputs over left padding, so that they stand directly before each row's first token."""
    carried = state.shape[1]
    place = segments.first[:, None] + torch.arange(carried, device=state.device)
    return history.scatter(1, place[..., None].expand(-1, -1, state.shape[2]), state.to(history.dtype))


def _without_leaks(y: Tensor, history: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """Recompute the few tokens, the first taps − 1 of each sequence, whose filter reached into the sequence before."""
    taps = weight.shape[1]
    row, column = ((segments.number > 0) & (segments.positions < taps - 1)).nonzero(as_tuple=True)
    tap = torch.arange(taps, device=y.device)
    window = history[row[:, None], column[:, None] + tap]  # (n, taps, d)
    own = tap >= taps - 1 - segments.positions[row, column, None]
    return y.index_put((row, column), (window.masked_fill(~own[..., None], 0.0) * weight.mT.to(y.dtype)).sum(1))


def _last_inputs(history: Tensor, carried: int, segments: Segments | None) -> Tensor:
    """The inputs that the token after each row's last one will need."""
    if segments is None:
        return history[:, history.shape[1] - carried :].clone()  # a view would keep all inputs of a long prompt alive
    place = segments.end[:, None] + torch.arange(carried, device=history.device)  # history lags x by `carried`
    last = history.gather(1, place[..., None].expand(-1, -1, history.shape[2]))
    # A short last sequence must not hand on the inputs of the one before it.
    final = segments.end.clamp(min=1)[:, None] - 1
    position, number = segments.positions.gather(1, final), segments.number.gather(1, final)
    own = (number <= 0) | (torch.arange(carried, device=history.device) >= carried - 1 - position)
    return last.masked_fill(~own[..., None], 0.0)


def _fla(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    from fla.modules.convolution import causal_conv1d

    # FLA carries as many inputs as there are taps, (b, d, taps); the oldest is never read.
    initial = F.pad(state.to(x.dtype).mT, (1, 0)).contiguous()
    return causal_conv1d(x, weight.to(x.dtype), initial_state=initial, activation="silu", backend="triton")[0]
