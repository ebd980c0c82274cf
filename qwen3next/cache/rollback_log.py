"""The rollback log of a cache: kept states, and update logs to replay the tokens between them."""

import itertools
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from layers.state.update_log import UpdateLog, fold

GRID = 64  # tokens: long calls are cut at multiples of this, so that the cut does not change their result
State = KVCache | DeltaNetState


@dataclass
class Span:
    """A span: a kept state, and the update logs of the tokens after it.

    Attributes:
        lengths: tokens of each row at the start of the span.
        update_logs: one update log per Gated DeltaNet layer, in the order of the layers.
        logits: (b, vocab) at the start, if known.
        before: (b, width) hidden state of the token before the start, if known.
        hidden: (b n width) hidden states of the recorded tokens.
        rested: row → number of recorded tokens that belong to it, if the row paused or was rolled back after those.
    """

    lengths: tuple[int, ...]
    update_logs: list[UpdateLog]
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
        layers = [DeltaNetState(*update_log.state_after(counts)) for update_log in self.update_logs]
        hidden, logits = self.before, None if max(counts) else self.logits
        if max(counts):
            noted = torch.cat(self.hidden, dim=1)
            before = torch.zeros_like(noted[:, :1]) if hidden is None else hidden[:, None]
            index = torch.tensor(counts, device=noted.device)[:, None, None].expand(-1, 1, noted.shape[2])
            hidden = torch.cat((before, noted), dim=1).gather(1, index)[:, 0]
        lengths = tuple(begin + n for begin, n in zip(self.lengths, counts, strict=True))
        return Point(lengths, layers, logits, hidden)

    def cut(self, length: int) -> "Span":
        """A copy of this span with its first `length` tokens."""
        hidden = [torch.cat(self.hidden, dim=1)[:, :length]] if length else []
        update_logs = [update_log.cut(length) for update_log in self.update_logs]
        rested = {row: n for row, n in self.rested.items() if n < length}
        return Span(self.lengths, update_logs, self.logits, self.before, hidden, rested)


@dataclass
class LastCall:
    """The latest call, if it brought several tokens a row in compiled code: from its start the way back is shortest.

    Attributes:
        lengths, states, hidden: of each row or layer before the call.
    """

    lengths: tuple[int, ...]
    states: list[tuple[Tensor, Tensor]]
    hidden: Tensor | None
    resting: frozenset[int]

    def after(self, span: Span, targets: Sequence[int]) -> "Point | None":
        """The state after `targets` tokens of each row; None where one is not of this call."""
        counts = [target - begin for target, begin in zip(targets, self.lengths, strict=True)]
        logs, call = span.update_logs, span.hidden[-1]
        if self.hidden is None or not logs or not all(log.compiled and log.compiled[-1] for log in logs):
            return None
        if not 0 <= min(counts) <= max(counts) <= call.shape[1] or any(counts[row] for row in self.resting):
            return None
        layers = [DeltaNetState(*state) for state in fold(self.states, logs, counts)]
        hidden = [self.hidden[row] if not n else call[row, n - 1] for row, n in enumerate(counts)]
        return Point(tuple(targets), layers, None, torch.stack(hidden))


@dataclass(frozen=True)
class Point:
    """The state after an earlier token: `layers` holds Gated DeltaNet states in the order of the layers."""

    lengths: tuple[int, ...]
    layers: list[DeltaNetState]
    logits: Tensor | None
    hidden: Tensor | None


class RollbackLog:
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
        self.spans: deque[Span] = deque()
        self._last: LastCall | None = None
        self._open: Span | None = None  # records the current call,
        self._cut = 0  # from this token of it

    def copy(self) -> "RollbackLog":
        """A copy of the rollback log: lists are copied, tensors shared."""
        other = RollbackLog(self.limit)
        other.spans.extend(span.cut(span.noted) for span in self.spans)
        return other

    def clear(self) -> None:
        self.spans.clear()
        self._open = self._last = None

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
        newest = self.spans[-1] if self.spans else None
        length, cut = segments.length, 0
        self._last = None
        if segments.unpadded and 1 < length <= self.limit:
            before = [(s.conv, s.recurrent) for s in states]
            self._last = LastCall(segments.offsets, before, hidden, frozenset(resting))
        if not segments.unpadded:
            self._open = None
            self._keep(Span(segments.offsets, _update_logs(states), logits, hidden))
            return
        fits = newest is not None and newest.noted + length <= self._most(newest)
        if newest is not None and fits and self._reaches(newest, segments.offsets, resting):
            self._open = newest
        else:
            if length > self.limit + GRID:
                cut = (length - self.limit) // GRID * GRID
                logits = hidden = None
            lengths = tuple(past + cut for past in segments.offsets)
            self._open = Span(lengths, _update_logs(states), logits, hidden)
        self._cut = cut
        rested = self._open.rested
        self._open.rested = {row: rested.get(row, self._open.noted) for row in resting}
        for state, update_log in zip(states, self._open.update_logs, strict=True):
            state.update_log, state.cut = update_log, cut

    def end(self, layers: Sequence[State], hidden: Tensor) -> None:
        """Finish recording after the call; `hidden` is its (b t width) hidden states."""
        states = [s for s in layers if isinstance(s, DeltaNetState)]
        update_logs, span, cut = [s.update_log for s in states], self._open, self._cut
        for state in states:
            state.update_log, state.cut = None, 0
        self._open = None
        if span is None:
            return
        whole = [update_log for update_log in update_logs if update_log is not None]
        if len(whole) < len(update_logs):  # hooks changed the updates: only the state at the call's start is known
            span.update_logs = [update_log.cut(span.noted) for update_log in span.update_logs]
            self._last = None
            if not cut:
                self._keep(span)
            return
        if cut:
            span.before = hidden[:, cut - 1].clone()
        span.update_logs = whole
        span.hidden.append(hidden[:, cut:].clone())
        self._keep(self._shortened(span) if cut else span)

    def abandon(self, layers: Sequence[State]) -> None:
        """Instead of `end`, if the call failed and the layers' states are restored."""
        span, self._open, self._last = self._open, None, None
        if span is not None:
            span.update_logs = [update_log.cut(span.noted) for update_log in span.update_logs]
        for state in layers:
            if isinstance(state, DeltaNetState):
                state.update_log, state.cut = None, 0

    def find(self, targets: Sequence[int], *, keep: bool = True) -> Point | None:
        """The state after `targets` tokens of each row, or None if it is not known. Drops all records after it.

        Without `keep`, the earlier records may be dropped too.
        """
        if self._last is not None and self.spans and (point := self._last.after(self.spans[-1], targets)):
            self._last = None
            if keep:
                self._forget(targets)
            else:
                self.spans.clear()
            return point
        self._last = None
        holding = []
        for row, target in enumerate(targets):
            found = [i for i, s in enumerate(self.spans) if 0 <= target - s.lengths[row] <= s.own(row)]
            if not found:
                return None
            holding.append(found[-1])
        counts = {i: [0] * len(targets) for i in holding}
        for row, i in enumerate(holding):
            counts[i][row] = targets[row] - self.spans[i].lengths[row]
        points = {i: self.spans[i].after(counts[i]) for i in counts}
        self._forget(targets)
        if len(points) == 1:
            return points[holding[0]]
        return _gathered([points[i] for i in holding], targets)

    def furthest(self, most: int) -> int:
        """For a cache of one row: the largest number of tokens, up to `most`, that `find` can restore; −1 if none."""
        ends = [min(most, s.lengths[0] + s.own(0)) for s in self.spans if s.lengths[0] <= most]
        return max(ends, default=-1)

    def _forget(self, targets: Sequence[int]) -> None:
        """Drop the records after `targets` tokens of each row."""
        for _ in range(len(self.spans)):
            span = self.spans.popleft()
            left = [min(target - span.lengths[row], span.own(row)) for row, target in enumerate(targets)]
            if max(left) >= 0:
                kept = span if max(left) == span.noted else span.cut(max(left))
                kept.rested = {row: n for row, n in enumerate(left) if n < max(left)}
                self.spans.append(kept)

    @property
    def nbytes(self) -> int:
        update_logs = [update_log for span in self.spans for update_log in span.update_logs]
        kept = [x for span in self.spans for x in span.hidden]
        kept += [] if self._last is None else [x for state in self._last.states for x in state]
        return sum(x.nbytes for x in kept) + sum(update_log.nbytes for update_log in update_logs)

    def __str__(self) -> str:
        known = [f"{s.lengths[0]} to {s.lengths[0] + s.noted}" if s.noted else str(s.lengths[0]) for s in self.spans]
        return ", ".join(known) or "none"

    def _keep(self, span: Span) -> None:
        if not self.spans or self.spans[-1] is not span:
            self.spans.append(span)
        # A row that rests keeps its own last tokens, however far the others go on.
        newest, rows = self.spans[-1], range(len(span.lengths))
        first = [newest.lengths[row] + newest.own(row) - self.limit for row in rows]
        spans = list(self.spans)
        needed = [
            span
            for span, after in itertools.pairwise(spans)
            if any(max(first[row], span.lengths[row]) < after.lengths[row] for row in rows)
        ]
        self.spans = deque([*needed, newest])

    def _shortened(self, span: Span) -> Span:
        """A copy of this span with its last `limit` tokens."""
        skip = span.noted - self.limit
        hidden = torch.cat(span.hidden, dim=1)
        before = hidden[:, skip - 1] if skip else span.before
        update_logs = [update_log.skip(skip) for update_log in span.update_logs] if skip else span.update_logs
        lengths = tuple(n + skip for n in span.lengths)
        return Span(lengths, update_logs, None, before, [hidden[:, skip:].clone()])

    def _most(self, span: Span) -> int:
        """Most tokens to record after one kept state: their records may cost no more memory than another state."""
        each = sum(
            update_log.nbytes - update_log.conv.nbytes - update_log.recurrent.nbytes for update_log in span.update_logs
        )
        state = sum(update_log.conv.nbytes + update_log.recurrent.nbytes for update_log in span.update_logs)
        cheap = state * span.noted // each if each else self.limit
        return min(self.limit, cheap)

    @staticmethod
    def _reaches(span: Span, past: Sequence[int], resting: Collection[int]) -> bool:
        """Whether the span ends where the call starts, in every row that the call changes."""
        return all(
            row in resting or (begin + span.noted == now and span.own(row) == span.noted)
            for row, (begin, now) in enumerate(zip(span.lengths, past, strict=True))
        )


def _update_logs(states: Sequence[DeltaNetState]) -> list[UpdateLog]:
    return [UpdateLog(s.conv, s.recurrent, s.recurrent.dtype) for s in states]


def _gathered(points: Sequence[Point], targets: Sequence[int]) -> Point:
    """Combine points: row r of the result is row r of point r."""
    layers = []
    for states in zip(*(point.layers for point in points), strict=True):
        conv, recurrent = (
            torch.stack([x[row] for row, x in enumerate(parts)])
            for parts in ([s.conv for s in states], [s.recurrent for s in states])
        )
        layers.append(DeltaNetState(conv, recurrent))
    known = [x for point in points if (x := point.hidden) is not None]
    hidden = None
    if known:  # a row without tokens has no hidden state
        rows = [
            known[0].new_zeros(known[0].shape[1]) if p.hidden is None else p.hidden[r] for r, p in enumerate(points)
        ]
        hidden = torch.stack(rows)
    return Point(tuple(targets), layers, None, hidden)
