"""What each token recalls from the recurrent state and what it writes, without a token loop."""

import torch
from torch import Tensor

from layers.delta_rule import Gates, Keys, Rule, State, Values, gated_delta_rule
from layers.norm import at_least_fp32
from layers.segments import Segments

PIECE = 1024  # tokens at a time: bounds the working memory


def recalled(
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    *,
    state: State | None = None,
    segments: Segments | None = None,
    rule: Rule = gated_delta_rule,
) -> Values:
    """What the state holds for each key when its token arrives: α_t S_{t−1}ᵀ k_t. The share β_t of it is erased.

    Each token becomes two: one that decays and reads with its key, one that writes. Working memory does not grow
    with t. Zero at padding. Arguments as in `gated_delta_rule`; the result is fp32 or better.
    """
    k, v, log_decay, beta = (masked(at_least_fp32(x), segments) for x in (k, v, log_decay, beta))
    number = numbers(segments)
    if number is not None:
        number = number.repeat_interleave(2, dim=1)
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    pieces = []
    for begin in range(0, v.shape[1], PIECE):
        piece = slice(begin, begin + PIECE)
        keys, values = (x[:, piece].repeat_interleave(2, dim=1) for x in (k, v))
        state, within = enter(state, number, slice(2 * begin, 2 * (begin + PIECE)))
        o, state = rule(
            keys,
            keys,
            values,
            _alternate(log_decay[:, piece], torch.zeros_like(log_decay[:, piece])),
            _alternate(torch.zeros_like(beta[:, piece]), beta[:, piece]),
            state=state,
            segments=within,
            backend="chunked",
        )
        pieces.append(o[:, ::2])
    answer = torch.cat(pieces, dim=1)
    return answer if segments is None else answer.masked_fill(~segments.mask[..., None, None], 0.0)


def written(
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    *,
    state: State | None = None,
    segments: Segments | None = None,
) -> Values:
    """What each token writes under its key: u_t = β_t (v_t − α_t S_{t−1}ᵀ k_t). Zero at padding.

    With it the state is a plain decaying sum, S_t = Σ_s exp(G_t − G_s) k_s u_sᵀ (+ exp(G_t) S₀): any state follows
    from (k, u, log_decay) in one product. Arguments as in `recalled`.
    """
    v, beta = masked(at_least_fp32(v), segments), masked(beta, segments)
    u = beta[..., None] * (v - recalled(k, v, log_decay, beta, state=state, segments=segments))
    return u if segments is None else u.masked_fill(~segments.mask[..., None, None], 0.0)


def masked(x: Tensor, segments: Segments | None) -> Tensor:
    """At padding nothing is forgotten, written or read, as in the delta rule."""
    return x if segments is None else segments.real(x)


def numbers(segments: Segments | None) -> Tensor | None:
    """(b, t) each token's sequence, counted by row; None where every row is one.

    Padding counts to the sequence before it: a piece that begins with padding still sees where the next one resets.
    """
    return None if segments is None or segments.unpadded else segments.resets.long().cumsum(1)


def enter(state: Tensor, number: Tensor | None, piece: slice) -> tuple[Tensor, Segments | None]:
    """The state that a piece's first tokens find, cleared where a sequence begins there; and the piece's segments."""
    if number is None:
        return state, None
    if piece.start:
        begins = number[:, piece.start] != number[:, piece.start - 1]
        state = state.masked_fill(begins[:, None, None, None], 0.0)
    return state, Segments.from_document_ids(number[:, piece])


def _alternate(even: Tensor, odd: Tensor) -> Tensor:
    """even₀, odd₀, even₁, odd₁, … along time."""
    return torch.stack((even, odd), dim=2).flatten(1, 2)
