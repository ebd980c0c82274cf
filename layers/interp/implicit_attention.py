"""Gated DeltaNet as attention: which token reads which, and the states between.

The delta rule is linear in its values and in its first state, o = A v + R S₀, with
A = ((QKᵀ) ⊙ D) (I + tril(diag(β) (KKᵀ ⊙ D), −1))⁻¹ diag(β), D_ts = exp(G_t − G_s) for s ≤ t, G the running sum of
log decays. A is the rule's output for one-hot values, and R its output for a one-hot state, so nothing here repeats
its algebra.
Sources: arXiv:2412.06464 eq. 8 to 10; arXiv:2403.01590 for reading such layers as attention (there without erasing).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from layers.delta_rule import Gates, Keys, Rule, State, Values, gated_delta_rule
from layers.norm import at_least_fp32
from layers.segments import Segments
from layers.state.written import PIECE, enter, masked, numbers, recalled, written

__all__ = ["carried", "implicit_attention", "recalled", "states_at", "written"]

COLUMNS = 256  # of A at a time: bounds the working memory beside the result
FEW = 16  # tokens for which the token loop is quicker than filling a chunk


def implicit_attention(
    q: Keys,
    k: Keys,
    log_decay: Gates,
    beta: Gates,
    *,
    segments: Segments | None = None,
    rule: Rule = gated_delta_rule,
) -> Float[Tensor, "b h t s"]:
    """The matrix A with o = A v for a state that resets at zero. Signed; rows do not sum to 1. Differentiable.

    Args:
        q, k, log_decay, beta: as `gated_delta_rule` takes them; key head i serves h / kh neighbouring value heads.
        segments: where sequences begin and end. Nothing reads across a boundary and nothing reads padding.
        rule: the layer's, `gated_delta_rule` or `simple_gla`; likewise in the other functions.
    Returns: A in fp32 or better, exactly zero above the diagonal. A[b, h, t, s] is what one unit of v_s adds to o_t.
    """
    q, k, log_decay, beta = (masked(at_least_fp32(x), segments) for x in (q, k, log_decay, beta))
    number = numbers(segments)
    b, t, h = beta.shape
    columns = []
    for begin in range(0, t, COLUMNS):  # v_s reaches no token before s, so a block of columns resets at its own tokens
        end = min(begin + COLUMNS, t)
        unit = torch.eye(t - begin, end - begin, dtype=beta.dtype, device=beta.device)
        o, _ = rule(
            q[:, begin:],
            k[:, begin:],
            unit[None, :, None].expand(b, -1, h, -1),
            log_decay[:, begin:],
            beta[:, begin:],
            segments=None if number is None else Segments.from_document_ids(number[:, begin:]),
            backend="chunked",
        )
        columns.append(F.pad(o.transpose(1, 2), (0, 0, begin, 0)))
    return torch.cat(columns, dim=-1)


def carried(
    q: Keys,
    k: Keys,
    log_decay: Gates,
    beta: Gates,
    *,
    segments: Segments | None = None,
    rule: Rule = gated_delta_rule,
) -> Float[Tensor, "b h t k"]:
    """The weights R with which the state before the first token enters the output: o = A v + R S₀."""
    q, k, log_decay, beta = (masked(at_least_fp32(x), segments) for x in (q, k, log_decay, beta))
    number = numbers(segments)
    b, t, h = beta.shape
    state = torch.eye(k.shape[3], dtype=k.dtype, device=k.device).expand(b, h, -1, -1)
    nothing = k.new_zeros(()).expand(b, t, h, k.shape[3])
    pieces = []
    for begin in range(0, t, PIECE):
        o, state = _run(rule, q, k, nothing, log_decay, beta, state, number, slice(begin, begin + PIECE))
        pieces.append(o.transpose(1, 2))
    return torch.cat(pieces, dim=2)


def states_at(
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    positions: Sequence[int],
    *,
    state: State | None = None,
    segments: Segments | None = None,
    rule: Rule = gated_delta_rule,
) -> Float[Tensor, "b p h k v"]:
    """The state after each of these tokens, in any order, from a few runs of the rule.

    The sequence is cut after each position and each part goes on from the state before it, so nothing is stored for the
    tokens between.
    Arguments as in `recalled`.
    Raises: ValueError for a place that is not there.
    """
    k, v, log_decay, beta = (masked(at_least_fp32(x), segments) for x in (k, v, log_decay, beta))
    if not positions or not all(0 <= p < v.shape[1] for p in positions):
        raise ValueError(f"States are there after tokens 0 to {v.shape[1] - 1}, and {list(positions)} were asked for.")
    number = numbers(segments)
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    found, done = {}, 0
    for position in sorted(set(positions)):
        for begin in range(done, position + 1, PIECE):
            piece = slice(begin, min(begin + PIECE, position + 1))
            _, state = _run(rule, k, k, v, log_decay, beta, state, number, piece)  # what is read with k is thrown away
        found[position], done = state, position + 1
    return torch.stack([found[p] for p in positions], dim=1)


def _run(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    number: Tensor | None,
    piece: slice,
) -> tuple[Tensor, Tensor]:
    """A piece of the sequence, from the state before it: output and the state after it."""
    state, within = enter(state, number, piece)
    q, k, v, log_decay, beta = (x[:, piece] for x in (q, k, v, log_decay, beta))
    backend = "recurrent" if v.shape[1] <= FEW else "chunked"
    return rule(q, k, v, log_decay, beta, state=state, segments=within, backend=backend)
