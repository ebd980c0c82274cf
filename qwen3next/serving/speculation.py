"""Speculative decoding of many texts: how many tokens to guess for each, measured for each number of texts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.drafts import DraftLength
from qwen3next.generation.generate import drafting
from qwen3next.generation.rounds import Row

STATES = 3  # recurrent states that a cache keeps beside its own while drafts are checked, at most


@dataclass
class Turn:
    """A step with drafts.

    Attributes:
        drafts: of each text, possibly none.
        accepted: of each text's drafts, filled in by the caller.
    """

    drafts: list[list[int]]
    accepted: list[int] = field(default_factory=list)


class Speculation:
    """Drafts from the MTP layer for every text.

    With "auto" the number of drafts is the one that promises the most tokens a second. What pays depends on how many
    texts share a step, so it is measured for each number of them.

    Attributes:
        most: tokens drafted at most.
        kept_states: recurrent states that the check of a draft needs beside the cache's own.
        mtp: whether caches must hold the MTP layer's keys and values.
    Raises: ValueError, as `Generation`, for a number that cannot be, or a model without an MTP layer.
    """

    def __init__(self, model: Qwen3Next, draft_tokens: int | str):
        length, drafter = drafting(model, draft_tokens, "mtp")
        self.most = 0 if length is None else length.most
        self.kept_states, self.mtp = (STATES if self.most else 0), drafter is not None
        self._drafter, self._adapt = drafter, draft_tokens == "auto"
        self._lengths: dict[int, DraftLength] = {}

    @contextmanager
    def round(self, rows: Sequence[Row], caches: Sequence[HybridCache]) -> Iterator[Turn]:
        """Around a step of these texts, which it times; the caches can take back what the step brings."""
        if self._drafter is None:
            yield Turn([[] for _ in rows])
            return
        length = self._lengths.setdefault(len(rows), DraftLength(self.most, adapt=self._adapt))
        count = min(length.begin(), max(row.most - row.new for row in rows) - 1)
        turn = Turn([self._drafted(row, cache, count) for row, cache in zip(rows, caches, strict=True)])
        with ExitStack() as stack:
            for cache, guesses in zip(caches, turn.drafts, strict=True):
                if guesses:
                    stack.enter_context(cache.revocable(1 + len(guesses)))
            yield turn
        length.end(max(map(len, turn.drafts)), turn.accepted)

    def _drafted(self, row: Row, cache: HybridCache, count: int) -> list[int]:
        assert self._drafter is not None
        count = min(count, row.most - row.new - 1)
        return self._drafter.draft(cache, [row.text], count)[0] if count > 0 else []
