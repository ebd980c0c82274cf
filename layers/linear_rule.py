"""The gated delta rule without the delta: a decaying memory that adds to what it holds and never corrects it.

Per token, with state S (k v): S ← e^g S + β k vᵀ, o = Sᵀq. With decays it is Mamba-2's recurrence (arXiv:2405.21060,
section 3, with β for its time step at the input), without them linear attention without normaliser (arXiv:2006.16236).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.autocast import backward_without_autocast
from layers.backends import choose
from layers.chunk_decay import bounded, decays
from layers.delta_rule import Gates, Keys, State, Values, Watch
from layers.norm import at_least_fp32
from layers.piecewise_delta_rule import CHUNK
from layers.segments import Segments
from layers.wild import GradientsApart, one_by_one, wild

# `gated_delta_rule`, or the one below: what both take and give is the same.
Rule = Callable[..., tuple[Tensor, Tensor]]


def gated_linear_rule(
    q: Keys,
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    *,
    state: State | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
    watch: Watch | None = None,
) -> tuple[Values, State]:
    """Write each (key, value) into a decaying memory, then read it with the query; nothing is erased.

    Arguments and results are those of `gated_delta_rule`; there is no "fla" backend.
    Raises: ValueError for an unknown backend or head counts that do not divide; RuntimeError where a hook waits at a
        point of `watch`: nothing is recalled, and what is written is β v.
    """
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"{v.shape[2]} value heads cannot share {k.shape[2]} key heads: make it a multiple.")
    choice = choose("linear_rule", backend, v)
    if watch is not None:
        watch.erased.refuse()
        watch.written.refuse()
    segments = None if segments is None or segments.plain else segments
    starts = None
    if segments is not None:  # at padding nothing is forgotten and nothing is written
        q, k, v, log_decay, beta = (segments.real(x) for x in (q, k, v, log_decay, beta))
        starts = segments.starts
    looped = choice == "recurrent" or v.shape[1] == 1
    if not looped and segments is not None and wild(segments, q, k, v, beta, log_decay.exp()):

        def alone(before: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return gated_linear_rule(*parts, state=before, backend=backend)

        return one_by_one(segments, state, alone, q, k, v, log_decay, beta)  # type: ignore[return-value]
    apart = GradientsApart(None if looped else segments)
    q, k, v, log_decay, beta = apart.inputs(q, k, v, log_decay, beta)
    dtype, share = v.dtype, v.shape[2] // k.shape[2]
    q, k, v, log_decay, beta = (at_least_fp32(x) for x in (q, k, v, log_decay, beta))
    q, k = (x.repeat_interleave(share, dim=2) for x in (q, k))
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    with torch.autocast(v.device.type, enabled=False):
        run = _recurrent if looped else _chunked
        written, before = beta[..., None] * v, state.to(v.dtype)
        o, state = run(q, k, written, log_decay, before, starts)
    backward_without_autocast((o, state), (q, k, written, log_decay, before))
    return apart.output(o.to(dtype)), state


def _recurrent(
    q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    decay = log_decay.exp()
    outputs = []
    for t in range(q.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * written[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def _chunked(
    q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in matrix products over chunks: O = diag(γ) Q S + (Γ ⊙ QKᵀ) U, S ← γ_C S + (diag(γ_C / γ) K)ᵀ U.

    γ, Γ and what a sequence's beginning cuts are those of `gated_delta_rule`; with nothing to correct, U is β V and no
    system is to be solved.
    """
    t, pad = q.shape[1], -q.shape[1] % CHUNK

    def chunks(x: Tensor) -> Tensor:  # (b t h …) → (b, h, n, C, …)
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (-1, CHUNK)).movedim(3, 1)

    q, k, written, log_decay = (chunks(x) for x in (q, k, written, log_decay))
    if starts is not None:
        starts = F.pad(starts, (0, pad)).unflatten(1, (-1, CHUNK))[:, None]  # (b 1 n C)
    gamma, to_end, pairwise = decays(bounded(log_decay), starts)
    added = (k * to_end[..., None]).mT @ written  # (b, h, n, k, v): what each chunk adds to the memory
    before = []
    for i in range(added.shape[2]):
        before.append(state)
        state = gamma[:, :, i, -1, None, None] * state + added[:, :, i]
    o = gamma[..., None] * (q @ torch.stack(before, dim=2)) + (pairwise * (q @ k.mT)) @ written
    return o.movedim(1, 3).flatten(1, 2)[:, :t], state
