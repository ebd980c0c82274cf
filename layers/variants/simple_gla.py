"""Linear attention with a gate and without the delta: a decaying state that adds and never corrects what it holds.

Per token, with state S (k v): S ← e^g S + β k vᵀ, o = Sᵀq. With decays it is Mamba-2's recurrence (arXiv:2405.21060,
section 3, with β for its time step at the input), without them linear attention without normaliser (arXiv:2006.16236).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.chunk_decay import CHUNK, bounded, decays
from layers.delta_rule import Gates, Keys, State, Values, apply_rule
from layers.dispatch.backends import run
from layers.dispatch.registry import implements
from layers.kernels.isolation import over_chunks, wild
from layers.norm import at_least_fp32
from layers.segments import Segments


def simple_gla(
    q: Keys,
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    *,
    state: State | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Values, State]:
    """Write each (key, value) into a decaying state, then read it with the query; nothing is erased.

    Arguments and results are those of `gated_delta_rule`; the backends are "chunked" and "recurrent".
    Raises: ValueError for an unknown backend or head counts that do not divide.
    """
    rule = partial(run, "simple_gla", backend, v)
    return apply_rule(rule, q, k, v, log_decay, beta, state=state, segments=segments)


@implements("simple_gla", "recurrent", definition=True)
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    dtype = v.dtype
    q, k, added, log_decay, state = _prepared(q, k, v, log_decay, beta, state)
    decay = log_decay.exp()
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None:
            state = state.masked_fill(segments.resets[:, t, None, None, None], 0.0)
        state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * added[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(dtype), state


def _mixes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments) -> bool:
    """Whether chunks that several sequences share would mix them: see layers/kernels/isolation.py."""
    return wild(segments, q, k, v, beta, log_decay.exp())


@implements("simple_gla", "chunked")
@over_chunks("simple_gla", _mixes)
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The same in matrix products over chunks: O = diag(γ) Q S + (Γ ⊙ QKᵀ) U, S ← γ_C S + (diag(γ_C / γ) K)ᵀ U.

    γ, Γ and what the beginning of a sequence cuts are those of `delta_rule.chunked`. U is β V: nothing is corrected, so
    there is no system to solve.
    """
    dtype, t, pad = v.dtype, q.shape[1], -q.shape[1] % CHUNK
    q, k, added, log_decay, state = _prepared(q, k, v, log_decay, beta, state)

    def chunks(x: Tensor) -> Tensor:  # (b t h …) → (b, h, n, C, …)
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (-1, CHUNK)).movedim(3, 1)

    q, k, added, log_decay = (chunks(x) for x in (q, k, added, log_decay))
    resets = None  # (b 1 n C)
    if segments is not None:
        resets = F.pad(segments.resets, (0, pad)).unflatten(1, (-1, CHUNK))[:, None]
    gamma, to_end, pairwise = decays(bounded(log_decay), resets)
    by_chunk = (k * to_end[..., None]).mT @ added  # (b, h, n, k, v): what each chunk adds to the state
    before = []
    for i in range(by_chunk.shape[2]):
        before.append(state)
        state = gamma[:, :, i, -1, None, None] * state + by_chunk[:, :, i]
    o = gamma[..., None] * (q @ torch.stack(before, dim=2)) + (pairwise * (q @ k.mT)) @ added
    return o.movedim(1, 3).flatten(1, 2)[:, :t].to(dtype), state


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q and k for each value head, β v, log_decay, and the state or zeros, all in fp32 or better."""
    q, k, v, log_decay, beta = (at_least_fp32(x) for x in (q, k, v, log_decay, beta))
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
    return q, k, beta[..., None] * v, log_decay, state.to(v.dtype)
