"""Depthwise causal convolution with carried state, then SiLU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from layers.dispatch.backends import run
from layers.dispatch.registry import implements
from layers.gradients import filter_taps
from layers.norm import at_least_fp32
from layers.segments import Segments
from layers.sequence_spans import each_sequence

State = Float[Tensor, "n carried d"]  # n is b, or the number of packed sequences


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d kernel_size"],
    *,
    state: State | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], State]:
    """silu(Σ_j weight[:, kernel_size − 1 − j] · x[t − j]) over the tokens of the same sequence.

    Args:
        x: inputs; outputs at padding are meaningless but finite.
        weight: one filter a channel, the last tap meets the present token (torch's conv1d order).
        state: the kernel_size − 1 inputs before the first token of each row, oldest first; None means zeros. For packed
            rows it may hold those of each sequence instead. Not modified.
        segments: where sequences begin and end; None means every row is one sequence.
        backend: "torch", "cpp" (CPU) or "fla" (CUDA); "auto" picks.
    Returns: output (b t d) and the state after each row's last real token (b taps−1 d), or after each sequence's where
        `state` holds one for each.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    segments = None if segments is None or segments.unpadded else segments
    if state is not None and segments is not None and segments.has_state_each(state):
        return each_sequence(causal_conv, segments, state, x, x, weight=weight, backend=backend)
    x = x if segments is None else segments.real(x)
    state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if state is None else state
    return run("causal_conv", backend, x, x, weight, state=state, segments=segments)


@implements("causal_conv", "torch", definition=True)
def convolve(x: Tensor, weight: Tensor, *, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """The definition, one pass a tap: products and sums in fp32 at least, then one cast, for any number of tokens."""
    history = inputs_with_state(x, state, segments)
    y = filter_taps(at_least_fp32(history), at_least_fp32(weight)).to(x.dtype)
    y = y if segments is None else _without_leaks(y, history, weight, segments)
    return F.silu(y), last_inputs(x, state, segments)


def inputs_with_state(x: Tensor, state: Tensor, segments: Segments | None) -> Tensor:
    """(b, kernel_size − 1 + t, d): x behind the state, which is placed directly before each row's first real token."""
    history = torch.cat((state.to(x.dtype), x), dim=1)
    if segments is None:
        return history
    place = segments.first[:, None] + torch.arange(state.shape[1], device=state.device)
    return history.scatter(1, place[..., None].expand(-1, -1, state.shape[2]), state.to(history.dtype))


def _without_leaks(y: Tensor, history: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """Recompute the first kernel_size − 1 tokens of each sequence, whose filter reached into the sequence before."""
    tap = torch.arange(weight.shape[1], device=y.device)
    row, column = ((segments.segment_ids > 0) & (segments.positions < len(tap) - 1)).nonzero(as_tuple=True)
    window = history[row[:, None], column[:, None] + tap]  # (n, taps, d)
    own = tap >= len(tap) - 1 - segments.positions[row, column, None]
    window = at_least_fp32(window.masked_fill(~own[..., None], 0.0))
    return y.index_put((row, column), filter_taps(window, at_least_fp32(weight))[:, 0].to(y.dtype))


def last_inputs(x: Tensor, state: Tensor, segments: Segments | None) -> Tensor:
    """The inputs that the token after each row's last one will need: (b, kernel_size − 1, d), a copy."""
    carried = state.shape[1]
    if segments is None:
        return torch.cat((state.to(x.dtype), x), dim=1)[:, x.shape[1] :].clone()  # not a view, which keeps all inputs
    tap = torch.arange(carried, device=x.device)
    place = segments.end[:, None] - carried + tap  # a column of x; before the row's first real token, of the state
    before = place - segments.first[:, None] + carried
    of_x, of_state = _columns(x, place), _columns(state.to(x.dtype), before)
    last = torch.where((place < segments.first[:, None])[..., None], of_state, of_x)
    # A short last sequence must not hand on the inputs of the one before it.
    final = segments.end.clamp(min=1)[:, None] - 1
    position, number = segments.positions.gather(1, final), segments.segment_ids.gather(1, final)
    own = (number <= 0) | (tap >= carried - 1 - position)
    return last.masked_fill(~own[..., None], 0.0)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """(b, n, d): columns `index` (b, n) of each row of x (b, t, d); the nearest one where there is none."""
    return x.gather(1, index.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))
