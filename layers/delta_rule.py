"""The gated delta rule: a linear-attention memory that forgets, and that corrects what it recalls before it writes.

Per token, with state S (k v): S ← e^g S, u = β (v − Sᵀk), S ← S + k uᵀ, o = Sᵀq.
Sources: arXiv:2412.06464 eq. 8 to 10 (signs and ratios checked in fp64 against the token loop).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from layers.autocast import backward_without_autocast
from layers.backends import choose
from layers.chunk_decay import bounded, decays
from layers.hook_point import HookPoint
from layers.native import functions as native
from layers.norm import at_least_fp32
from layers.piecewise_delta_rule import CHUNK, piecewise
from layers.segments import Segments
from layers.wild import GradientsApart, one_by_one, wild

Keys = Float[Tensor, "b t kh k"]
Values = Float[Tensor, "b t h v"]
Gates = Float[Tensor, "b t h"]
State = Float[Tensor, "b h k v"]


@dataclass(frozen=True)
class Watch:
    """Points that see each token's update before the next one runs, so that a patch acts on all that follows.

    Attributes:
        erased: gets what the decayed memory recalls for the key, e^g Sᵀk, (b 1 h v); the share β of it is erased.
        written: gets u, (b 1 h v).
        positions: of each token of the call, for the points' ctx.
    """

    erased: HookPoint
    written: HookPoint
    positions: Sequence[int | tuple[int, ...]]


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
    watch: Watch | None = None,
) -> tuple[Values, State]:
    """Write each (key, value) into a decaying memory, then read it with the query.

    Args:
        q, k: already L2-normalised, q already scaled; this function does neither. Key head i serves the h / kh value
            heads i · h / kh and following.
        v: values.
        log_decay: natural log of the share of memory kept, so <= 0.
        beta: write strength in [0, 1]; 1 replaces what k recalls.
        state: memory before the first token; None means zeros. Not modified.
        segments: where sequences begin and end; None means every row is one sequence.
        backend: "recurrent" (token loop, the definition), "chunked" (torch, the algebra to read), "piecewise" (the same
            a few chunks at a time), "cpp" (CPU), "fla" (Triton, CUDA); "auto" picks. The last three
            multiply in bf16 where v is bf16.
        watch: points to pass inside the token loop; other backends refuse those that are armed.
    Returns: output (b t h v) in v's dtype and the memory after each row's last token (b h k v), fp32 or better.
    Raises: ValueError for an unknown backend or head counts that do not divide; RuntimeError where a named backend
        cannot run here, or a hook waits at a point of `watch` and no token loop runs.
    """
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"{v.shape[2]} value heads cannot share {k.shape[2]} key heads: make it a multiple.")
    choice = choose("delta_rule", backend, v)
    segments = None if segments is None or segments.plain else segments
    if segments is not None:  # at padding nothing is forgotten and nothing is written
        q, k, v, log_decay, beta = (segments.real(x) for x in (q, k, v, log_decay, beta))
    # One token is the definition itself: the chunk algebra would only add work.
    looped = choice == "recurrent" or (choice != "fla" and v.shape[1] == 1)
    if watch is not None and not looped:
        watch.erased.refuse()
        watch.written.refuse()
    if not looped:
        log_decay = bounded(log_decay)
    if choice == "fla":  # whose chunks end with the sequence
        return _fla(q, k, v, log_decay, beta, state, segments)
    if not looped and segments is not None and _wild(q, k, v, log_decay, beta, segments):

        def alone(before: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return gated_delta_rule(*parts, state=before, backend=backend)

        return one_by_one(segments, state, alone, q, k, v, log_decay, beta)  # type: ignore[return-value]
    apart = GradientsApart(None if looped else segments)
    q, k, v, log_decay, beta = apart.inputs(q, k, v, log_decay, beta)
    dtype = v.dtype
    exact = torch.promote_types(dtype, torch.float32)
    log_decay, beta = log_decay.to(exact), beta.to(exact)
    if state is None:
        state = beta.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = state.to(exact)
    starts = None if segments is None else segments.starts
    with torch.autocast(v.device.type, enabled=False):  # each backend says in which precision it multiplies
        if choice == "cpp" and not looped:
            q, k, log_decay, beta, state = (x.float().contiguous() for x in (q, k, log_decay, beta, state))
            o, state = native.delta_rule(q, k, v, log_decay, beta, starts, state)
            return apart.output(o), state
        if choice == "piecewise" and not looped:
            products = dtype if dtype == torch.bfloat16 else exact
            o, state = piecewise(q.to(products), k.to(products), v.to(products), log_decay, beta, state, starts)
            return apart.output(o.to(dtype)), state
        q, k, v = (at_least_fp32(x) for x in (q, k, v))
        before = state
        if looped:
            o, state = _recurrent(q, k, v, log_decay, beta, before, starts, watch)
        else:
            o, state = _chunked(q, k, v, log_decay, beta, before, starts)
    backward_without_autocast((o, state), (q, k, v, log_decay, beta, before))
    return apart.output(o.to(dtype)), state


def _wild(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments) -> bool:
    """Whether chunks that several sequences share would mix them: see layers/wild.py.

    Keys longer than 1 are among the causes: what a chunk of them writes may grow from token to token without bound.
    """
    if wild(segments, q, v) or wild(segments, log_decay.exp(), beta, largest=3.0):
        return True
    return segments.packed and wild(segments, torch.linalg.vector_norm(k.detach(), dim=-1), largest=1.01)


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    starts: Tensor | None,
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    share = v.shape[2] // k.shape[2]
    decay = log_decay.exp()
    clear = None if starts is None else starts.repeat_interleave(v.shape[2], dim=0)[..., None, None]  # (b · h, t, 1, 1)

    def heads_first(x: Tensor) -> Tensor:  # (b t h d) → (b · h, t, d)
        return x.transpose(1, 2).flatten(0, 1)

    q, k = (heads_first(x.repeat_interleave(share, dim=2)) for x in (q, k))
    v, beta, decay = heads_first(v), heads_first(beta[..., None]), heads_first(decay[..., None])
    b, h = state.shape[:2]
    state, outputs = state.flatten(0, 1), []

    def see(point: HookPoint, x: Tensor, t: int) -> Tensor:  # x (b · h, 1, v)
        assert watch is not None
        x = point(x.unflatten(0, (b, h)).transpose(1, 2), position=watch.positions[t])
        return x.transpose(1, 2).flatten(0, 1)

    for t in range(v.shape[1]):
        q_t, k_t, v_t, beta_t, decay_t = (x[:, t : t + 1] for x in (q, k, v, beta, decay))
        state = decay_t * (state if clear is None else state.masked_fill(clear[:, t], 0.0))
        erased = k_t @ state
        erased = erased if watch is None else see(watch.erased, erased, t)
        written = beta_t * (v_t - erased)
        written = written if watch is None else see(watch.written, written, t)
        state = torch.baddbmm(state, k_t.mT, written)
        outputs.append(q_t @ state)
    return torch.cat(outputs, dim=1).unflatten(0, (b, h)).transpose(1, 2), state.unflatten(0, (b, h))


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in matrix products over chunks of C tokens; only two of them a chunk are sequential.

    Within a chunk, Γ_ij is the decay between tokens j and i, γ_i from the chunk's start to i. The writes of a chunk
    solve a unit lower-triangular system: V* = T diag(β) V − T diag(βγ) K S, T = (I + tril(diag(β) (Γ ⊙ KKᵀ), −1))⁻¹;
    then O = diag(γ) Q S + (Γ ⊙ QKᵀ) V* and S ← γ_C S + (diag(γ_C / γ) K)ᵀ V*.
    A sequence that begins inside a chunk cuts Γ and γ there: entries across the cut are zero, all others unchanged.
    """
    b, t, heads, _ = v.shape
    key_heads, share, pad = k.shape[2], heads // k.shape[2], -t % CHUNK

    def chunks(x: Tensor, groups: int) -> Tensor:  # (b t h …) → (b, key heads, groups, n, C, …)
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (-1, CHUNK)).unflatten(3, (key_heads, groups))
        return x.movedim((3, 4), (1, 2)).contiguous()

    q, k, v = chunks(q, 1), chunks(k, 1), chunks(v, share)
    beta, log_decay = chunks(beta, share), chunks(log_decay, share)  # (b, kh, share, n, C)
    if starts is not None:
        starts = F.pad(starts, (0, pad)).unflatten(1, (-1, CHUNK))[:, None, None]  # (b 1 1 n C)
    gamma, to_end, pairwise = decays(log_decay, starts)

    system = beta[..., None] * pairwise * (k @ k.mT)  # key products are made once a key head and shared
    solved = _UnitLowerInverse.apply(system)
    values = (solved * beta[..., None, :]) @ v
    recall = (solved * (beta * gamma)[..., None, :]) @ k
    n = v.shape[3]
    values, recall = (x.flatten(0, 2).unbind(1) for x in (values, recall))  # n of (b · h, C, ·)
    writers = (k * to_end[..., None]).mT.flatten(0, 2).unbind(1)
    kept = gamma[..., -1].flatten(0, 2)[..., None, None].unbind(1)
    state = state.flatten(0, 1)
    before, written = [], []
    for i in range(n):
        before.append(state)
        written.append(torch.baddbmm(values[i], recall[i], state, alpha=-1))
        state = torch.baddbmm(kept[i] * state, writers[i], written[i])
    before, written = (torch.stack(x, dim=1).unflatten(0, (b, key_heads, share)) for x in (before, written))

    o = gamma[..., None] * (q @ before) + (pairwise * (q @ k.mT)) @ written  # (b, kh, share, n, C, v)
    o = o.flatten(3, 4)[..., :t, :].flatten(1, 2).transpose(1, 2)
    return o, state.unflatten(0, (b, heads))


class _UnitLowerInverse(torch.autograd.Function):
    """(I + tril(A, −1))⁻¹. Its gradient, −tril(Tᵀ G Tᵀ, −1), is two products instead of two more solves."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor) -> Tensor:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        with torch.autocast(grad.device.type, enabled=False):
            return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    b, h, dtype, cu_seqlens = v.shape[0], v.shape[2], v.dtype, None
    q, k = q.to(dtype), k.to(dtype)
    # The fused kernel has no backward; the chunked one is built for many tokens.
    single = v.shape[1] == 1 and not torch.is_grad_enabled()
    if segments is not None:
        cu_seqlens = segments.cu_seqlens.long()
        q, k, v, log_decay, beta = (x.flatten(0, 1)[None] for x in (q, k, v, log_decay, beta))
        rows = segments.starts.sum(1) + 1  # segments of each row
        last = rows.cumsum(0) - 1
        if state is not None:
            spread = state.new_zeros(int(last[-1]) + 1, *state.shape[1:])
            state = spread.index_copy(0, last - rows + 1, state)
    kernel = fused_recurrent_gated_delta_rule if single else chunk_gated_delta_rule
    o, final = kernel(
        q,
        k,
        v,
        g=log_decay.float(),
        beta=beta.float(),
        scale=1.0,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    if segments is not None:
        o, final = o.unflatten(1, (b, -1))[0], final[last]
    assert final.shape[:2] == (b, h)
    return o, final
