"""Guess the next tokens cheaply, for the model to check several in one call: speculative decoding's drafters.

A draft only ever saves time: a token is kept if it is the one that the model chooses there (rounds.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch

from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.prefill import Prefilling

DRAFTERS = ("mtp", "lookup", "both")


@runtime_checkable
class Drafter(Protocol):
    """Guesses tokens for every row of a cache."""

    def draft(self, cache: HybridCache, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Up to `count` tokens that may follow each text; the cache holds all of it but its last token."""


class MTPDrafts:
    """The most likely tokens of the model's MTP layer, which takes its own results as hidden states in turn."""

    def __init__(self, model: Prefilling):
        self.model = model

    def draft(self, cache: HybridCache, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        last = torch.tensor([text[-1] for text in texts], device=cache.tokens.device)
        return self.model.draft_tokens(cache, last, count).tolist()


class PromptLookup:
    """What followed the text's last tokens where they stood before: the longest match, and of these the last.

    Args:
        longest, shortest: tokens that must match.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2):
        self.lengths = range(longest, shortest - 1, -1)
        self._seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}  # by row: tokens indexed, and n-gram → end

    def draft(self, cache: HybridCache, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:  # noqa: ARG002
        return [self._of_row(row, text, count) for row, text in enumerate(texts)]

    def _of_row(self, row: int, text: Sequence[int], count: int) -> list[int]:
        done, ends = self._seen.get(row, (0, {}))
        for end in range(done + 1, len(text)):  # the last token itself is not yet followed by anything
            for n in self.lengths:
                if n <= end:
                    ends[tuple(text[end - n : end])] = end
        self._seen[row] = max(done, len(text) - 1), ends
        for n in self.lengths:
            if n < len(text) and (place := ends.get(tuple(text[-n:]))) is not None:
                return list(text[place : place + count])
        return []


class Both:
    """Prompt lookup, and the MTP layer for rows in which nothing matches."""

    def __init__(self, model: Prefilling):
        self.mtp, self.lookup = MTPDrafts(model), PromptLookup()

    def draft(self, cache: HybridCache, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        found = self.lookup.draft(cache, texts, count)
        if all(len(row) == count for row in found):
            return found
        return [a if a else b for a, b in zip(found, self.mtp.draft(cache, texts, count), strict=True)]


def drafter_named(name: str, model: Prefilling) -> Drafter:
    """Raises: ValueError for an unknown name, and for a model without an MTP layer where it is needed."""
    if name not in DRAFTERS:
        raise ValueError(f"There are no drafts {name!r}: choose one of {', '.join(DRAFTERS)}.")
    if name != "lookup" and model.mtp is None:
        raise ValueError(f'This model has no MTP layer, which drafts={name!r} needs: use drafts="lookup".')
    made: dict[str, Callable[[], Drafter]] = {
        "mtp": lambda: MTPDrafts(model),
        "lookup": PromptLookup,
        "both": lambda: Both(model),
    }
    return made[name]()


@dataclass
class Measured:
    """What rounds took and how many drafts were accepted, for one model, drafter and number of rows.

    Attributes:
        seconds: of a round, by the number of drafts in it.
        rounds: how often each number was timed. The first time does not count: it may include one-off preparations.
        accepted: share of drafts accepted at each place, if those before were.
        total, wasted: seconds of all rounds, and those lost by trying numbers that turned out not to be the best.
        used: by the number of drafts: the total when it was last used.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    accepted: list[float] = field(default_factory=list)
    total: float = 0.0
    wasted: float = 0.0
    used: dict[int, float] = field(default_factory=dict)


_MEASURED: WeakKeyDictionary[Prefilling, dict[tuple[str, int, bool], Measured]] = WeakKeyDictionary()


def measured(model: Prefilling, drafts: str, rows: int, *, sampled: bool) -> Measured:
    """What is known of a model so far: every generation goes on from what those before it measured."""
    return _MEASURED.setdefault(model, {}).setdefault((drafts, rows, sampled), Measured())


class DraftLength:
    """How many tokens to draft in a round: a fixed number, or what promises the most tokens a second.

    The time of a round and the share of accepted drafts are measured as it runs. A length that is not the best one so
    far is tried again now and then, for at most a hundredth of the time.

    Args:
        most: the number, or with `adapt` the largest.
        adapt: whether to choose from 0 to `most`.
        known: what was measured before; it is extended.
        clock: seconds; tests replace it.
    """

    BUDGET = 0.01  # of the time, for lengths that do not look best
    BEGINNING = 2  # steps without drafts that the first trials of a model may cost beside that
    FORGETS = 0.1  # weight of a new measurement
    HOPE = 0.7  # share of drafts that are accepted, until it is measured

    def __init__(
        self,
        most: int,
        *,
        adapt: bool,
        known: Measured | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.most, self.adapt, self.clock = most, adapt, clock
        self.known = Measured() if known is None else known
        self.known.accepted += [self.HOPE] * (most - len(self.known.accepted))
        self._tried = [2 if known and known.rounds else 0] * most  # in this text: another may be easier to guess
        self._began = 0.0

    def begin(self) -> int:
        """Start a round; the number of tokens to draft in it."""
        self._began = self.clock()
        return self.choose() if self.adapt else self.most

    def end(self, drafted: int, accepted: Sequence[int]) -> None:
        """Finish a round in which `drafted` tokens were drafted a row, and so many accepted in each running row."""
        now, took = self.known, self.clock() - self._began
        before = now.seconds.get(drafted)
        now.seconds[drafted] = took if before is None else min(took, before + self.FORGETS * (took - before))
        now.rounds[drafted] = now.rounds.get(drafted, 0) + 1
        for place in range(drafted):
            for n in accepted:
                if n >= place:
                    self._tried[place] += 1
                    weight = max(self.FORGETS, 1 / (self._tried[place] + 1))
                    now.accepted[place] += weight * (float(n > place) - now.accepted[place])
        now.total += took
        now.used[drafted] = now.total
        best = self.best()
        if drafted != best and best in now.seconds and now.rounds[drafted] > 1:
            gained = 1 + sum(accepted) / max(1, len(accepted))
            now.wasted += max(took - gained * now.seconds[best] / self.tokens(best), 0.0)

    def tokens(self, drafts: int) -> float:
        """Expected tokens of a round."""
        expected, all_before = 1.0, 1.0
        for share in self.known.accepted[:drafts]:
            all_before *= share
            expected += all_before
        return expected

    def best(self) -> int:
        """The measured length that promises the most tokens a second."""
        seconds = self.known.seconds
        return max((n for n in seconds if n <= self.most), key=lambda n: self.tokens(n) / seconds[n], default=0)

    def choose(self) -> int:
        now = self.known
        if not now.seconds:
            return 0
        best, seconds = self.best(), now.seconds
        if now.wasted > self.BUDGET * now.total + self.BEGINNING * seconds.get(0, 0.0):
            return best
        near = [n for n in (best + 1, best - 1) if 0 <= n <= self.most]
        unsure = [n for n in (best, *near) if now.rounds.get(n, 0) < 2]
        if unsure:
            return unsure[0]
        # One that could be better if all of its drafts were accepted is tried more often. The others are tried too: a
        # time that was measured on a busy machine must not decide for good.
        hopeful = [n for n in near if (1 + n) / seconds[n] > self.tokens(best) / seconds[best]]
        share = self.BUDGET / 2 if hopeful else self.BUDGET / 4
        return self._oldest(hopeful or near) if now.wasted < share * now.total else best

    def _oldest(self, lengths: Sequence[int]) -> int:
        """Of these, the length that was used longest ago."""
        return min(lengths, key=lambda n: self.known.used.get(n, -1))
