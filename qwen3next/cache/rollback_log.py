"""The rollback log of a cache: kept states, and update logs to replay the tokens between them."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from layers.state.kv_cache import KVState
from layers.state.update_log import Tape

GRID = 64  # tokens: long calls are cut at multiples of this, so that the cut does not change their result
State = KVState | DeltaNetState


@dataclass
class Stretch:
    """A span: a kept state, and the update logs of the tokens after it.

    Attributes:
        lengths: tokens of each row at the start of the span.
        tapes: one update log per Gated DeltaNet layer, in the order of the layers.
        logits: (b, vocab) at the start, if known.
        before: (b, width) hidden state of the token before the start, if known.
        hidden: (b n width) hidden states of the recorded tokens.
        rested: row → number of recorded tokens that belong to it, if the row paused or was rolled back after those.
    """

    lengths: tuple[int, ...]
    tapes: list[Tape]
    logits: Tensor | None
    before: Tensor | None
    hidden: list[Tensor] = field(default_factory=list)
    rested: dict[int, int] = field(default_factory=dict)

    @property
    def noted(self) -> int:
        return sum(x.shape[1] for x in self.hidden)

    def own(self, row: int) -> int:
        """Number of recorded tokens that belong to this row; −1 if not even the start of the span does."""
        return self.rested.get(row, self.noted)

    def after(self, counts: Sequence[int]) -> "Point":
        """The state after `counts` recorded tokens of each row."""
        layers = [DeltaNetState(*tape.state_after(counts)) for tape in self.tapes]
        hidden, logits = self.before, None if max(counts) else self.logits
        if max(counts):
            noted = torch.cat(self.hidden, dim=1)
            before = torch.zeros_like(noted[:, :1]) if hidden is None else hidden[:, None]
            index = torch.tensor(counts, device=noted.device)[:, None, None].expand(-1, 1, noted.shape[2])
            hidden = torch.cat((before, noted), dim=1).gather(1, index)[:, 0]
        lengths = tuple(begin + n for begin, n in zip(self.lengths, counts, strict=True))
        return Point(lengths, layers, logits, hidden)

    def cut(self, length: int) -> "Stretch":
        """A copy of this span with its first `length` tokens."""
        hidden = [torch.cat(self.hidden, dim=1)[:, :length]] if length else []
        tapes = [tape.cut(length) for tape in self.tapes]
        rested = {row: n for row, n in self.rested.items() if n < length}
        return Stretch(self.lengths, tapes, self.logits, self.before, hidden, rested)


@dataclass(frozen=True)
class Point:
    """The state after an earlier token: `layers` holds Gated DeltaNet states in the order of the layers."""

    lengths: tuple[int, ...]
    layers: list[DeltaNetState]
    logits: Tensor | None
    hidden: Tensor | None


class Journal:
    """The rollback log: can restore a cache to any of its last `limit` tokens, independent of where calls started.

    A short call is appended to the newest span, while that is cheaper than keeping another state and the span has at
    most `limit` tokens, which bounds the cost of a replay. Of a long call, only the end is recorded, from a cut at a
    multiple of 64 tokens, which does not change its result. Of a call with padded or packed rows, only the state at its
    start is kept.

    Args:
        limit: tokens that can be rolled back.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.stretches: deque[Stretch] = deque()
        self._open: Stretch | None = None  # records the current call,
        self._cut = 0  # from this token of it

    def copy(self) -> "Journal":
        """A copy of the rollback log: lists are copied, tensors shared."""
        other = Journal(self.limit)
        other.stretches.extend(stretch.cut(stretch.noted) for stretch in self.stretches)
        return other

    def clear(self) -> None:
        self.stretches.clear()
        self._open = None

    def begin(
        self,
        layers: Sequence[State],
        segments: Segments,
        *,
        logits: Tensor | None,
        hidden: Tensor | None,
        resting: Collection[int] = (),
    ) -> None:
        """Start recording the updates of a call. Call it after the call was validated.

        Args:
            logits, hidden: (b, vocab) and (b, width) after the last token before the call, if known.
            resting: rows that the call does not change.
        """
        states = [s for s in layers if isinstance(s, DeltaNetState)]
        newest = self.stretches[-1] if self.stretches else None
        length, cut = segments.length, 0
        if not segments.plain:
            self._open = None
            self._keep(Stretch(segments.past, _tapes(states), logits, hidden))
            return
        fits = newest is not None and newest.noted + length <= self._most(newest)
        if newest is not None and fits and self._reaches(newest, segments.past, resting):
            self._open = newest
        else:
            if length > self.limit + GRID:
                cut = (length - self.limit) // GRID * GRID
                logits = hidden = None
            lengths = tuple(past + cut for past in segments.past)
            self._open = Stretch(lengths, _tapes(states), logits, hidden)
        self._cut = cut
        rested = self._open.rested
        self._open.rested = {row: rested.get(row, self._open.noted) for row in resting}
        for state, tape in zip(states, self._open.tapes, strict=True):
            state.tape, state.cut = tape, cut

    def end(self, layers: Sequence[State], hidden: Tensor) -> None:
        """Finish recording after the call; `hidden` is its (b t width) hidden states."""
        states = [s for s in layers if isinstance(s, DeltaNetState)]
        tapes, stretch, cut = [s.tape for s in states], self._open, self._cut
        for state in states:
            state.tape, state.cut = None, 0
        self._open = None
        if stretch is None:
            return
        whole = [tape for tape in tapes if tape is not None]
        if len(whole) < len(tapes):  # hooks changed the updates: only the state at the call's start is known
            stretch.tapes = [tape.cut(stretch.noted) for tape in stretch.tapes]
            if not cut:
                self._keep(stretch)
            return
        if cut:
            stretch.before = hidden[:, cut - 1].clone()
        stretch.tapes = whole
        stretch.hidden.append(hidden[:, cut:].clone())
        self._keep(self._shortened(stretch) if cut else stretch)

    def abandon(self, layers: Sequence[State]) -> None:
        """Instead of `end`, if the call failed and the layers' states are restored."""
        stretch, self._open = self._open, None
        if stretch is not None:
            stretch.tapes = [tape.cut(stretch.noted) for tape in stretch.tapes]
        for state in layers:
            if isinstance(state, DeltaNetState):
                state.tape, state.cut = None, 0

    def find(self, targets: Sequence[int]) -> Point | None:
        """The state after `targets` tokens of each row, or None if it is not known. Drops all records after it."""
        holding = []
        for row, target in enumerate(targets):
            found = [i for i, s in enumerate(self.stretches) if 0 <= target - s.lengths[row] <= s.own(row)]
            if not found:
                return None
            holding.append(found[-1])
        counts = {i: [0] * len(targets) for i in holding}
        for row, i in enumerate(holding):
            counts[i][row] = targets[row] - self.stretches[i].lengths[row]
        points = {i: self.stretches[i].after(counts[i]) for i in counts}
        self._forget(targets)
        if len(points) == 1:
            return points[holding[0]]
        return _gathered([points[i] for i in holding], targets)

    def furthest(self, most: int) -> int:
        """For a cache of one row: the largest number of tokens, up to `most`, that `find` can restore; −1 if none."""
        ends = [min(most, s.lengths[0] + s.own(0)) for s in self.stretches if s.lengths[0] <= most]
        return max(ends, default=-1)

    def _forget(self, targets: Sequence[int]) -> None:
        """Drop the records after `targets` tokens of each row."""
        for _ in range(len(self.stretches)):
            stretch = self.stretches.popleft()
            left = [min(target - stretch.lengths[row], stretch.own(row)) for row, target in enumerate(targets)]
            if max(left) >= 0:
                kept = stretch.cut(max(left))
                kept.rested = {row: n for row, n in enumerate(left) if n < max(left)}
                self.stretches.append(kept)

    @property
    def nbytes(self) -> int:
        tapes = [tape for stretch in self.stretches for tape in stretch.tapes]
        return sum(x.nbytes for s in self.stretches for x in s.hidden) + sum(tape.nbytes for tape in tapes)

    def __str__(self) -> str:
        known = [
            f"{s.lengths[0]} to {s.lengths[0] + s.noted}" if s.noted else str(s.lengths[0]) for s in self.stretches
        ]
        return ", ".join(known) or "none"

    def _keep(self, stretch: Stretch) -> None:
        if not self.stretches or self.stretches[-1] is not stretch:
            self.stretches.append(stretch)
        # Drop the oldest span if the one after it covers the limit.
        newest = self.stretches[-1]
        first = [length + newest.noted - self.limit for length in newest.lengths]
        while len(self.stretches) > 1 and all(a <= b for a, b in zip(self.stretches[1].lengths, first, strict=True)):
            self.stretches.popleft()

    def _shortened(self, stretch: Stretch) -> Stretch:
        """A copy of this span with its last `limit` tokens."""
        skip = stretch.noted - self.limit
        hidden = torch.cat(stretch.hidden, dim=1)
        before = hidden[:, skip - 1] if skip else stretch.before
        tapes = [tape.skip(skip) for tape in stretch.tapes] if skip else stretch.tapes
        lengths = tuple(n + skip for n in stretch.lengths)
        return Stretch(lengths, tapes, None, before, [hidden[:, skip:].clone()])

    def _most(self, stretch: Stretch) -> int:
        """Most tokens to record after one kept state: their records may cost no more memory than another state."""
        each = sum(tape.nbytes - tape.conv.nbytes - tape.memory.nbytes for tape in stretch.tapes)
        state = sum(tape.conv.nbytes + tape.memory.nbytes for tape in stretch.tapes)
        cheap = state * stretch.noted // each if each else self.limit
        return min(self.limit, cheap)

    @staticmethod
    def _reaches(stretch: Stretch, past: Sequence[int], resting: Collection[int]) -> bool:
        """Whether the span ends where the call starts, in every row that the call changes."""
        return all(
            row in resting or (begin + stretch.noted == now and stretch.own(row) == stretch.noted)
            for row, (begin, now) in enumerate(zip(stretch.lengths, past, strict=True))
        )


def _tapes(states: Sequence[DeltaNetState]) -> list[Tape]:
    return [Tape(s.conv, s.memory, s.memory.dtype) for s in states]


def _gathered(points: Sequence[Point], targets: Sequence[int]) -> Point:
    """Combine points: row r of the result is row r of point r."""
    layers = []
    for states in zip(*(point.layers for point in points), strict=True):
        conv, memory = (
            torch.stack([x[row] for row, x in enumerate(parts)])
            for parts in ([s.conv for s in states], [s.memory for s in states])
        )
        layers.append(DeltaNetState(conv, memory))
    known = [x for point in points if (x := point.hidden) is not None]
    hidden = None
    if known:  # a row without tokens has no hidden state
        rows = [
            known[0].new_zeros(known[0].shape[1]) if p.hidden is None else p.hidden[r] for r, p in enumerate(points)
        ]
        hidden = torch.stack(rows)
    return Point(tuple(targets), layers, None, hidden)
