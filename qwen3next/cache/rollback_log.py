"""How a cache goes back to a token in its past: kept states, and between them the replay of what was written."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from layers.state.kv_cache import KVState
from layers.state.update_log import Tape

GRID = 64  # tokens: where a long call is cut, so that the cut leaves no trace in its result
State = KVState | DeltaNetState


@dataclass
class Stretch:
    """A state that was kept, and the tokens since then, noted a layer at a time.

    Attributes:
        lengths: tokens of each row where it begins.
        tapes: one a Gated DeltaNet layer, in the order of the layers.
        logits: (b, vocab) where it begins, if known.
        before: (b, width) hidden state of the token before it, if known.
        hidden: (b n width) of the tokens noted.
        rested: row → how many of them are its own, where it rested after those, or was taken back to there.
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
        """How many of the tokens noted are this row's; −1 where not even the beginning is."""
        return self.rested.get(row, self.noted)

    def after(self, counts: Sequence[int]) -> "Point":
        """The state after so many tokens of each row."""
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
        """The same beginning with `length` of its tokens."""
        hidden = [torch.cat(self.hidden, dim=1)[:, :length]] if length else []
        tapes = [tape.cut(length) for tape in self.tapes]
        rested = {row: n for row, n in self.rested.items() if n < length}
        return Stretch(self.lengths, tapes, self.logits, self.before, hidden, rested)


@dataclass(frozen=True)
class Point:
    """A token in the past, ready to go on from: `layers` holds Gated DeltaNet states in the order of the layers."""

    lengths: tuple[int, ...]
    layers: list[DeltaNetState]
    logits: Tensor | None
    hidden: Tensor | None


class Journal:
    """What it takes to take back the last `limit` tokens of a cache, wherever calls began.

    A call of a few tokens is noted behind the state that was kept last, as long as that is cheaper than keeping another
    one, and at most `limit` tokens long, which bounds the work of a replay. Of a long call only the end is noted, from
    a cut on the 64-token grid on, which leaves no trace in its result. Where a call's rows are padded or packed, only
    its beginning is kept.

    Args:
        limit: tokens.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.stretches: deque[Stretch] = deque()
        self._open: Stretch | None = None  # notes the call that runs now,
        self._cut = 0  # from this of its tokens on

    def copy(self) -> "Journal":
        """Another journal of the same past: lists are copied, tensors shared."""
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
        """Before a call that nothing refuses any more: make its layers note what they write.

        Args:
            resting: rows that it leaves as they are.
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
        """After that call; `hidden` is (b t width)."""
        states = [s for s in layers if isinstance(s, DeltaNetState)]
        tapes, stretch, cut = [s.tape for s in states], self._open, self._cut
        for state in states:
            state.tape, state.cut = None, 0
        self._open = None
        if stretch is None:
            return
        whole = [tape for tape in tapes if tape is not None]
        if len(whole) < len(tapes):  # hooks changed what was written: the call's beginning is known, not its middle
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
        """In place of `end`, where the call failed and the layers' states are put back."""
        stretch, self._open = self._open, None
        if stretch is not None:
            stretch.tapes = [tape.cut(stretch.noted) for tape in stretch.tapes]
        for state in layers:
            if isinstance(state, DeltaNetState):
                state.tape, state.cut = None, 0

    def find(self, targets: Sequence[int]) -> Point | None:
        """The state after so many tokens of each row, and everything after it forgotten; None where it is not known."""
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
        """Of a cache of one row: the largest number of tokens, up to `most`, that `find` would know; −1 for none."""
        ends = [min(most, s.lengths[0] + s.own(0)) for s in self.stretches if s.lengths[0] <= most]
        return max(ends, default=-1)

    def _forget(self, targets: Sequence[int]) -> None:
        """Take out what was noted behind so many tokens of each row."""
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
        # The oldest goes when the one after it reaches back far enough.
        newest = self.stretches[-1]
        first = [length + newest.noted - self.limit for length in newest.lengths]
        while len(self.stretches) > 1 and all(a <= b for a, b in zip(self.stretches[1].lengths, first, strict=True)):
            self.stretches.popleft()

    def _shortened(self, stretch: Stretch) -> Stretch:
        """The same end, begun where the limit reaches."""
        skip = stretch.noted - self.limit
        hidden = torch.cat(stretch.hidden, dim=1)
        before = hidden[:, skip - 1] if skip else stretch.before
        tapes = [tape.skip(skip) for tape in stretch.tapes] if skip else stretch.tapes
        lengths = tuple(n + skip for n in stretch.lengths)
        return Stretch(lengths, tapes, None, before, [hidden[:, skip:].clone()])

    def _most(self, stretch: Stretch) -> int:
        """Tokens to note behind one kept state: no more than cost what another would."""
        each = sum(tape.nbytes - tape.conv.nbytes - tape.memory.nbytes for tape in stretch.tapes)
        state = sum(tape.conv.nbytes + tape.memory.nbytes for tape in stretch.tapes)
        cheap = state * stretch.noted // each if each else self.limit
        return min(self.limit, cheap)

    @staticmethod
    def _reaches(stretch: Stretch, past: Sequence[int], resting: Collection[int]) -> bool:
        """Whether its last token is the one before the call's first, in every row that goes on."""
        return all(
            row in resting or (begin + stretch.noted == now and stretch.own(row) == stretch.noted)
            for row, (begin, now) in enumerate(zip(stretch.lengths, past, strict=True))
        )


def _tapes(states: Sequence[DeltaNetState]) -> list[Tape]:
    return [Tape(s.conv, s.memory, s.memory.dtype) for s in states]


def _gathered(points: Sequence[Point], targets: Sequence[int]) -> Point:
    """One point of several: each row is that of its own."""
    layers = []
    for states in zip(*(point.layers for point in points), strict=True):
        conv, memory = (
            torch.stack([x[row] for row, x in enumerate(parts)])
            for parts in ([s.conv for s in states], [s.memory for s in states])
        )
        layers.append(DeltaNetState(conv, memory))
    known = [x for point in points if (x := point.hidden) is not None]
    hidden = None
    if known:  # a row without tokens has none
        rows = [
            known[0].new_zeros(known[0].shape[1]) if p.hidden is None else p.hidden[r] for r, p in enumerate(points)
        ]
        hidden = torch.stack(rows)
    return Point(tuple(targets), layers, None, hidden)
