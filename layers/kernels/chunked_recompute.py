"""The chunked gated delta rule a few chunks at a time: bounded memory at any length, temporaries in a CPU's caches.

`chunked` in layers/delta_rule.py is the algebra to read. This is the same a piece at a time, with its gradient written
out.
Shapes: n chunks of C tokens; m = b · kh, p = n · b · h, g = n · b · kh; chunks come first, so that chunk i of all heads
is one batch of products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.chunk_decay import CHUNK, decays
from layers.norm import at_least_fp32

AT_ONCE = 64  # chunks times heads times batch: their temporaries, some 300 KiB each, stay near a CPU core


class _Piece(NamedTuple):
    """What a piece computes on its way; the backward pass needs all of it."""

    q: Tensor  # (g C k), the dtype of products
    k: Tensor
    v: Tensor  # (p C v)
    beta: Tensor  # (p C) fp32 or better, like all that follows but `before`, `read`, `recall`, `writers`, `written`
    gamma: Tensor  # (p C) decay from the chunk's start to each token
    to_end: Tensor  # (p C) decay from each token to the chunk's end
    pairwise: Tensor  # (p C C) decay between tokens
    qk: Tensor  # (g 1 C C)
    kk: Tensor
    solved: Tensor  # (p C C) T
    by_beta: Tensor  # (p C C) T diag(β)
    recall: Tensor  # (n, b · h, C, k) T diag(βγ) K
    read: Tensor  # (p C k) diag(γ) Q
    writers: Tensor  # (n, b · h, C, k) diag(γ_C / γ) K
    pattern: Tensor  # (p C C) Γ ⊙ QKᵀ
    before: Tensor  # (p k v) the memory that each chunk finds
    written: Tensor  # (p C v) V*
    after: Tensor  # (b · h, k, v) the memory after the piece


def chunked_recompute(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` from checked arguments: products in v's dtype, decays, solve and memory in fp32 or better.

    Args:
        q, k, v: in the dtype of products. log_decay, beta, state: fp32 or better.
        resets: (b t) True where a sequence begins and the memory must be clear; None where none does.
    Returns: output (b t h v) in v's dtype and the memory after the last token.
    """
    if torch.is_grad_enabled():
        return _Piecewise.apply(q, k, v, log_decay, beta, state, resets)
    out, after, _ = _run(q, k, v, log_decay, beta, state, resets, keep=False)
    return out, after


def _run(*inputs: Any, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs: Callable[..., Any] = _outputs_op if torch.compiler.is_compiling() else _outputs
    return outputs(*inputs, keep)


class _Piecewise(torch.autograd.Function):
    """Keeps its inputs and the memory before each piece; the backward pass makes the rest again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, after, found = _run(*inputs, keep=True)
        ctx.save_for_backward(*inputs[:5], found, inputs[6])
        return out, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor, to_state: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Callable[..., Any] = _gradients_op if torch.compiler.is_compiling() else _gradients
        return *gradients(*ctx.saved_tensors, to_out, to_state), None  # read once: recomputation allows no more


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, resets: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the memory after the last token, and if `keep` the memory (pieces, b · h, k, v) before each piece."""
    tensors = [q, k, v, log_decay, beta]
    recurrent, found = state.flatten(0, 1), []
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for piece in _pieces(v):
        found += [recurrent] if keep else []
        made = _make(_cut(tensors, resets, piece), recurrent)
        recurrent = made.after
        _back_to_tokens(_answer(made), out[:, piece])
    before = torch.stack(found) if keep else recurrent.new_empty(0, *recurrent.shape)
    return out, recurrent.clone().view_as(state), before  # a view would keep a piece's memories alive


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    found: Tensor,
    resets: Tensor | None,
    to_out: Tensor,
    to_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v, log_decay, beta and the state."""
    tensors = [q, k, v, log_decay, beta]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    recurrent = to_state.flatten(0, 1)
    with torch.autocast(v.device.type, enabled=False):
        for i, piece in reversed(list(enumerate(_pieces(v)))):
            cut = _cut([*tensors, to_out], resets, piece)
            made = _make([*cut[:5], cut[6]], found[i])
            *of_piece, recurrent = _backward(made, cut[5].flatten(0, 2), recurrent)
            for grad, whole in zip(of_piece, grads, strict=True):
                _back_to_tokens(grad, whole[:, piece])
    to_q, to_k, to_v, to_log_decay, to_beta = grads
    return to_q, to_k, to_v, to_log_decay, to_beta, recurrent.view_as(to_state).clone()


# A traced graph has no number of pieces to loop over: it takes these as operators, whole.
_outputs_op = torch.library.custom_op("qwen3next::piecewise_delta_rule", _outputs, mutates_args=())
_gradients_op = torch.library.custom_op("qwen3next::piecewise_delta_rule_backward", _gradients, mutates_args=())


@_outputs_op.register_fake
def _(
    _q: Tensor,
    _k: Tensor,
    v: Tensor,
    _log_decay: Tensor,
    _beta: Tensor,
    state: Tensor,
    _starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    pieces = -(-v.shape[1] // _tokens(v)) if keep else 0
    after = torch.empty_like(state, memory_format=torch.contiguous_format)
    return out, after, state.new_empty(pieces, v.shape[0] * v.shape[2], *state.shape[2:])


@_gradients_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    _found: Tensor,
    _starts: Tensor | None,
    _to_out: Tensor,
    to_state: Tensor,
) -> tuple[Tensor, ...]:
    shapes = (q, k, v, log_decay, beta, to_state)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in shapes)


def _tokens(v: Tensor) -> int:
    """Of a piece: whole chunks that together have some AT_ONCE memories."""
    return CHUNK * max(1, AT_ONCE // (v.shape[0] * v.shape[2]))


def _pieces(v: Tensor) -> list[slice]:
    """Pieces of the tokens; the last one may end inside a chunk."""
    size = _tokens(v)
    return [slice(i, min(i + size, v.shape[1])) for i in range(0, v.shape[1], size)]


def _cut(tensors: list[Tensor], resets: Tensor | None, piece: slice) -> list[Any]:
    """A piece of each (b t heads …), filled up to whole chunks, as (n, b, heads, C, …); and its resets as (n b 1 C)."""
    every = [*tensors, *([] if resets is None else [resets[..., None]])]
    cut: list[Any] = []
    for x in every:
        x = x[:, piece]
        if x.shape[1] % CHUNK:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % CHUNK))
        cut.append(x.unflatten(1, (-1, CHUNK)).movedim((1, 3), (0, 2)).contiguous())
    return cut if resets is not None else [*cut, None]


def _back_to_tokens(x: Tensor, into: Tensor) -> None:
    """Undo `_cut`: x of n · b · heads chunks into (b t heads …)."""
    b, t, heads = into.shape[:3]
    x = x.unflatten(0, (-1, b, heads)).movedim((0, 2), (1, 3)).flatten(1, 2)
    into.copy_(x[:, :t])


def _make(cut: list[Any], recurrent: Tensor) -> _Piece:
    """All of a piece but its output, from what `_cut` gives and the memory (b · h, k, v) before it."""
    q, k, v, log_decay, beta, resets = cut
    n, b, h = v.shape[:3]
    share, low = h // k.shape[2], v.dtype
    q, k, v = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
    beta, gamma, to_end, pairwise = (x.flatten(0, 2) for x in (beta, *decays(log_decay, resets)))

    def shared(x: Tensor) -> Tensor:  # (p …) → (g share …)
        return x.unflatten(0, (-1, share))

    kk, qk = (at_least_fp32(torch.bmm(x, k.mT))[:, None] for x in (k, q))
    solved = _unit_lower_inverse((shared(pairwise) * kk).flatten(0, 1).mul_(beta[..., None]))
    by_beta = solved * beta[:, None]
    written = torch.bmm(by_beta.to(low), v).unflatten(0, (n, -1))
    recall = torch.bmm((by_beta * gamma[:, None]).to(low).view(len(k), -1, CHUNK), k).view(n, b * h, CHUNK, -1)
    writers = (k[:, None] * shared(to_end)[..., None].to(low)).view_as(recall)
    read = (q[:, None] * shared(gamma)[..., None].to(low)).flatten(0, 1)
    pattern = (shared(pairwise) * qk).flatten(0, 1).to(low)
    kept = gamma.view(n, b * h, CHUNK)[..., -1, None, None]
    exact = torch.empty(n + 1, *recurrent.shape, dtype=recurrent.dtype, device=recurrent.device)
    before = exact[:-1] if low == recurrent.dtype else torch.empty_like(exact[:-1], dtype=low)
    exact[0] = recurrent
    for i in range(n):
        torch.mul(kept[i], exact[i], out=exact[i + 1])
        if low == recurrent.dtype:
            written[i].baddbmm_(recall[i], before[i], alpha=-1)
            exact[i + 1].baddbmm_(writers[i].mT, written[i])
        else:
            before[i] = exact[i]
            written[i].baddbmm_(recall[i], before[i], alpha=-1)
            exact[i + 1] += torch.bmm(writers[i].mT, written[i])
    made = (q, k, v, beta, gamma, to_end, pairwise, qk, kk, solved, by_beta, recall, read, writers, pattern)
    return _Piece(*made, before.flatten(0, 1), written.flatten(0, 1), exact[n])


def _answer(made: _Piece) -> Tensor:
    """The output (p C v)."""
    return torch.bmm(made.read, made.before).baddbmm_(made.pattern, made.written)


def _backward(made: _Piece, to_o: Tensor, to_memory: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay, beta, chunk by chunk, and of the memory before the piece."""
    q, k, v, beta, gamma, to_end, pairwise, qk, kk, solved, by_beta, recall, read, writers, pattern, *_ = made
    before, written, low = made.before, made.written, v.dtype
    n, memories = recall.shape[:2]
    heads_of = (len(k), -1, CHUNK)  # (g, share · C, …): the products below sum over the heads that share a key

    def product(a: Tensor, b: Tensor) -> Tensor:
        return at_least_fp32(torch.bmm(a.to(low), b.to(low)))

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(0, (len(k), -1))

    # Against time: what each chunk's memory and writes are worth to all that follows.
    to_written = product(pattern.mT, to_o).unflatten(0, (n, -1))
    to_before = product(read.mT, to_o).unflatten(0, (n, -1))
    to_after = torch.empty_like(to_before)
    kept = gamma.view(n, memories, CHUNK)[..., -1, None, None]
    for i in reversed(range(n)):
        to_after[i] = to_memory
        to_written[i] += product(writers[i], to_memory)
        to_memory = to_before[i].addcmul_(kept[i], to_memory).sub_(product(recall[i].mT, to_written[i]))
    to_written, to_after = to_written.flatten(0, 1), to_after.flatten(0, 1)

    to_read = product(to_o, before.mT)
    to_writers = product(written, to_after.mT)
    to_recall = product(to_written, before.mT).neg_().view(*heads_of[:2], k.shape[-1])
    to_kept = (before * to_after).sum((-2, -1))
    to_pattern = product(to_o, written.mT)

    to_v = product(by_beta.mT, to_written)
    to_k = product((by_beta * gamma[:, None]).view(heads_of).mT, to_recall)
    to_k += (shared(to_writers) * shared(to_end)[..., None]).sum(1)
    to_q = (shared(to_read) * shared(gamma)[..., None]).sum(1)

    # T diag(β) served V, T diag(βγ) served K.
    through_k = product(to_recall, k.mT).view_as(pairwise)
    to_by_beta = product(to_written, v.mT).addcmul_(through_k, gamma[:, None])
    to_beta = (to_by_beta * solved).sum(-2)
    to_system = product(product(solved.mT, to_by_beta.mul_(beta[:, None])), solved.mT).tril_(-1).neg_()

    to_system.mul_(pairwise)
    to_beta += (shared(to_system) * kk).sum(-1).view_as(beta)
    to_kk = shared(to_system.mul_(beta[..., None]))
    to_qk = shared(to_pattern.mul_(pairwise))
    to_pairwise = (to_kk * kk).addcmul_(to_qk, qk).view_as(pairwise)  # times the decay: of its exponent
    to_kk, to_qk = to_kk.sum(1), to_qk.sum(1)
    to_q += product(to_qk, k)
    to_k += product(to_kk + to_kk.mT, k).add_(product(to_qk.mT, q))

    to_gamma = (shared(to_read) * q[:, None]).sum(-1).view_as(gamma)
    to_gamma += (through_k * by_beta).sum(-2)
    to_gamma[:, -1] += to_kept
    to_end_exponent = (shared(to_writers) * k[:, None]).sum(-1).view_as(gamma) * to_end
    # In fp64, as all that passes a token by is in these sums once more and once less.
    to_since_start = to_pairwise.sum(-1, dtype=torch.float64) - to_pairwise.sum(-2, dtype=torch.float64)
    to_since_start += to_gamma * gamma - to_end_exponent.double()
    to_since_start[:, -1] += to_end_exponent.sum(-1, dtype=torch.float64)
    to_log_decay = to_since_start.flip(-1).cumsum(-1).flip(-1).to(gamma.dtype)
    return to_q, to_k, to_v, to_log_decay, to_beta, to_memory


def _unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + tril(a, −1))⁻¹; transposed and from the right, which spares two copies into LAPACK's order."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    return torch.linalg.solve_triangular(a.mT, eye, upper=True, left=False, unitriangular=True).mT
