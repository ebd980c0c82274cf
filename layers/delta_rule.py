"""The gated delta rule: linear attention whose recurrent state decays, and corrects what it recalls before it writes.

Per token, with state S (k v): S ← e^g S, u = β (v − Sᵀk), S ← S + k uᵀ, o = Sᵀq.
Sources: arXiv:2412.06464 eq. 8 to 10 (signs and ratios checked in fp64 against the token loop).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from layers.chunk_decay import CHUNK, bounded, decays
from layers.dispatch.backends import run
from layers.dispatch.backward_autocast import without_autocast
from layers.dispatch.registry import implements
from layers.gradients import unit_lower_inverse
from layers.norm import at_least_fp32
from layers.segments import Segments
from layers.sequence_spans import each_sequence

Keys = Float[Tensor, "b t kh k"]
Values = Float[Tensor, "b t h v"]
Gates = Float[Tensor, "b t h"]
State = Float[Tensor, "n h k v"]  # n is b, or the number of packed sequences
Rule = Callable[..., tuple[Tensor, Tensor]]  # `gated_delta_rule`, or another function of its arguments and results
# From t, and what the state recalls for key t, v and β of token t, (b · h, 1, ·) each: what token t writes.
Write = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def gated_delta_rule(
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
    """Write each (key, value) into a decaying state, then read it with the query.

    Args:
        q, k: already L2-normalised, q already scaled; this function does neither. Key head i serves the h / kh value
            heads i · h / kh and following.
        v: values.
        log_decay: natural log of the share of the state kept, so <= 0.
        beta: write strength in [0, 1]; 1 replaces what k recalls.
        state: before the first token of each row; None means zeros. Where rows are packed, it may hold one state for
            each sequence instead. Not modified.
        segments: where sequences begin and end; None means every row is one sequence.
        backend: "recurrent" (token loop, the definition), "chunked" (torch, the algebra to read), "chunked_recompute"
            (the same a few chunks at a time, which the backward pass computes again), "cpp" (CPU), "fla" (Triton,
            CUDA); "auto" picks. The last three multiply in bf16 where v is bf16.
    Returns: output (b t h v) in v's dtype and the state after each row's last token (b h k v), or after each
        sequence's where `state` holds one for each; fp32 or better.
    Raises: ValueError for an unknown backend or head counts that do not divide; RuntimeError where a named backend
        cannot run here.
    """
    rule = partial(run, "delta_rule", backend, v)
    return apply_rule(rule, q, k, v, log_decay, beta, state=state, segments=segments)


def apply_rule(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """`rule(q, …, state=…, segments=…)` for padded and packed rows, with autocast off: it chooses its own precision."""
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"{v.shape[2]} value heads cannot share {k.shape[2]} key heads: make it a multiple.")
    segments = None if segments is None or segments.unpadded else segments
    inputs: tuple[Tensor, ...] = (q, k, v, log_decay, beta)
    if segments is not None:
        if state is not None and segments.has_state_each(state):
            return each_sequence(partial(apply_rule, rule, segments=None), segments, state, v, *inputs)
        inputs = tuple(segments.real(x) for x in inputs)  # at padding nothing is forgotten and nothing is written
    o, after = without_autocast(rule, (*inputs, state), *inputs, state=state, segments=segments)
    return o, after


@implements("delta_rule", "recurrent", definition=True)
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
    write: Write | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. `write`, where given, makes what each token writes in place of β (v − Sᵀk)."""
    dtype, (b, t, h, _), share = v.dtype, v.shape, v.shape[2] // k.shape[2]
    q, k, v = (at_least_fp32(x) for x in (q, k, v))
    log_decay, beta, state = exact(k, v, log_decay, beta, state)

    def heads_first(x: Tensor) -> Tensor:  # (b t h d) → (b · h, t, d)
        return x.transpose(1, 2).flatten(0, 1)

    q, k = (heads_first(x.repeat_interleave(share, dim=2)) for x in (q, k))
    v, beta, decay = (heads_first(x) for x in (v, beta[..., None], log_decay.exp()[..., None]))
    resets = None if segments is None else segments.resets.repeat_interleave(h, dim=0)[..., None, None]
    state, outputs = state.flatten(0, 1), []
    for i in range(t):
        q_i, k_i, v_i, beta_i, decay_i = (x[:, i : i + 1] for x in (q, k, v, beta, decay))
        state = decay_i * (state if resets is None else state.masked_fill(resets[:, i], 0.0))
        recalled = k_i @ state
        delta = beta_i * (v_i - recalled) if write is None else write(i, recalled, v_i, beta_i)
        state = torch.baddbmm(state, k_i.mT, delta)
        outputs.append(q_i @ state)
    o = torch.cat(outputs, dim=1).unflatten(0, (b, h)).transpose(1, 2)
    return o.to(dtype), state.unflatten(0, (b, h))


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
    """The same in matrix products over chunks of C tokens; only two of them a chunk are sequential.

    Within a chunk, Γ_ij is the decay between tokens j and i, γ_i from the chunk's start to i. The writes of a chunk
    solve a unit lower-triangular system: U = T diag(β) V − T diag(βγ) K S, T = (I + tril(diag(β) (Γ ⊙ KKᵀ), −1))⁻¹;
    then O = diag(γ) Q S + (Γ ⊙ QKᵀ) U and S ← γ_C S + (diag(γ_C / γ) K)ᵀ U.
    A sequence that begins inside a chunk cuts Γ and γ there: entries across the cut are zero, all others unchanged.
    """
    dtype, (b, t, heads, _), key_heads = v.dtype, v.shape, k.shape[2]
    share, pad = heads // key_heads, -t % CHUNK
    q, k, v = (at_least_fp32(x) for x in (q, k, v))
    log_decay, beta, state = exact(k, v, bounded(log_decay), beta, state)

    def chunks(x: Tensor, groups: int) -> Tensor:  # (b t h …) → (b, key heads, groups, n, C, …)
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (-1, CHUNK)).unflatten(3, (key_heads, groups))
        return x.movedim((3, 4), (1, 2)).contiguous()

    q, k, v = chunks(q, 1), chunks(k, 1), chunks(v, share)
    beta, log_decay = chunks(beta, share), chunks(log_decay, share)  # (b, kh, share, n, C)
    resets = None if segments is None else F.pad(segments.resets, (0, pad)).unflatten(1, (-1, CHUNK))[:, None, None]
    gamma, to_end, pairwise = decays(log_decay, resets)

    solved = unit_lower_inverse(beta[..., None] * pairwise * (k @ k.mT))  # (k @ k.mT) once a key head and shared
    values = ((solved * beta[..., None, :]) @ v).flatten(0, 2).unbind(1)  # n of (b · h, C, ·)
    recall = ((solved * (beta * gamma)[..., None, :]) @ k).flatten(0, 2).unbind(1)
    writers = (k * to_end[..., None]).mT.flatten(0, 2).unbind(1)
    kept = gamma[..., -1].flatten(0, 2)[..., None, None].unbind(1)
    state = state.flatten(0, 1)
    before, written = [], []
    for i in range(len(values)):
        before.append(state)
        written.append(torch.baddbmm(values[i], recall[i], state, alpha=-1))
        state = torch.baddbmm(kept[i] * state, writers[i], written[i])
    found, u = (torch.stack(x, dim=1).unflatten(0, (b, key_heads, share)) for x in (before, written))

    o = gamma[..., None] * (q @ found) + (pairwise * (q @ k.mT)) @ u  # (b, kh, share, n, C, v)
    o = o.flatten(3, 4)[..., :t, :].flatten(1, 2).transpose(1, 2)
    return o.to(dtype), state.unflatten(0, (b, heads))


def exact(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """log_decay, beta and state in fp32, or in fp64 where v has it; zeros for no state."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    return log_decay.to(dtype), beta.to(dtype), state.to(dtype)
