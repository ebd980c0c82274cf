"""The MTP layer's hidden states over several depths, as speculative decoding uses it: each depth feeds the next.

Decoding drafts several tokens behind the last token t. The layer takes the main model's hidden state of t and the token
t + 1, then its own result and the token t + 2, and so on. At each depth its attention sees the pairs with the main
model's hidden states up to t, which its cache holds, and the drafts of this round. Training does the same from every t
at once: the query of t at depth d sees the keys of depth 1 up to t, and those of t alone at depths 2 to d.
"""

from typing import Any

from torch import Tensor

from layers.moe import RouterStats
from layers.segments import Segments
from layers.state.draft_keys import DraftKeys

MOST_DEPTHS = 64  # tokens that a step of drafts can bring


def drafted_states(
    model: Any, hidden: Tensor, input_ids: Tensor, segments: Segments, depths: int
) -> tuple[list[Tensor], list[RouterStats]]:
    """The layer's hidden states (b, t, width) at depths 1, 2, …, and the router statistics of its blocks over all.

    At depth d, the row of token t predicts the token t + d + 1. Rows whose token t + d is not of the same sequence are
    not used and not counted.

    Raises: ValueError for fewer than one depth or more than MOST_DEPTHS, or where a backend of attention is named,
        which reads a cache its way.
    """
    mtp = model.mtp
    if depths < 1:
        raise ValueError(f"mtp_depths is {depths}: the MTP layer predicts at 1 depth or more.")
    if depths > MOST_DEPTHS:
        raise ValueError(f"mtp_depths is {depths}: choose at most {MOST_DEPTHS}.")
    if any(block.self_attn.backend != "auto" or block.self_attn.materialized_pattern for block in mtp.blocks):
        raise ValueError('MTP losses at several depths need attention\'s backend "auto": choose it, or mtp_depths=1.')
    keys, found = [DraftKeys(segments) for _ in mtp.blocks], list[Tensor]()
    totals: list[RouterStats | None] = [None] * len(mtp.blocks)
    for depth in range(1, depths + 1):
        counted = segments.next_is_same(depth)
        embedding = model.embed_tokens(input_ids.roll(-depth, dims=1)).masked_fill(~counted[..., None], 0.0)
        rope = model._rotation(segments.positions + depth - 1, hidden.dtype)
        x = mtp._pairs(hidden, embedding)
        for i, block in enumerate(mtp.blocks):
            x, stats = block(x, rope, segments=segments, state=keys[i], counted=counted, stats=True)
            before = totals[i]
            totals[i] = stats if before is None else RouterStats(*(a + b for a, b in zip(before, stats, strict=True)))
        hidden = mtp.hook_final_norm(mtp.norm(x))
        found.append(hidden)
    return found, [stats for stats in totals if stats is not None]
