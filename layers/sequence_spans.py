"""Sequences that a cache continues, and sequences one at a time: what `Segments` offers beside the definitions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from layers.deprecation import warn_renamed

T = TypeVar("T")
Spans = TypeVar("Spans", bound="SequenceSpans")  # not Self, which the checker of shapes refuses outside of classes


class cached_property(Generic[T]):
    """functools', without the lock that it takes before Python 3.12: torch.compile would break its graph there."""

    def __init__(self, make: Callable[[Any], T]):
        self.make, self.__doc__ = make, make.__doc__

    def __get__(self, instance: Any, _owner: type) -> T:
        if instance is None:
            return self  # type: ignore[return-value]
        made = instance.__dict__[self.make.__name__] = self.make(instance)  # found there before this is asked again
        return made


class SequenceSpan(NamedTuple):
    """Where a sequence's tokens lie: its number, its row, first column, column after its last, tokens before them."""

    sequence: int
    row: int
    begin: int
    end: int
    offset: int

    @property
    def past(self) -> int:
        """The old name of `offset`."""
        warn_renamed("SequenceSpan.past", "offset")
        return self.offset


class SequenceSpans:
    """What `Segments` knows of each sequence as a whole: where it lies, how it goes on, what comes after it.

    Definitions need none of it. Caches, generation and the MTP layer do.
    """

    batch: int
    length: int
    device: torch.device
    document_ids: Tensor | None
    sequences: int
    offsets: tuple[int, ...]
    gapped: bool
    mask: cached_property[Tensor]
    resets: cached_property[Tensor]
    cu_seqlens: cached_property[Tensor]
    _previous: cached_property[Tensor]

    @property
    def packed(self) -> bool:
        """Some row holds several sequences."""
        return self.sequences > self.batch

    @property
    def uniform_offset(self) -> bool:
        """Every row is one whole sequence, and all rows have the same number of tokens before this call."""
        return self.document_ids is None and (len(self.offsets) == 1 or len(set(self.offsets)) == 1)

    def after(self: Spans, past: Sequence[int]) -> Spans:
        """The same tokens as continuations of sequences of which a cache holds `past` tokens already."""
        if self.document_ids is None:  # quicker than `replace`, which counts in decoding
            return type(self)(self.batch, self.length, self.device, None, self.sequences, tuple(past))  # type: ignore[call-arg]
        return self._with(offsets=tuple(past))

    def part(self: Spans, begin: int, end: int) -> Spans:
        """The columns from `begin` up to `end`, with the same sequences. `offsets` stay: `after` says what is new."""
        if self.document_ids is None:
            return self._with(length=end - begin)
        ids = self.document_ids[:, begin:end]
        plain = not self.packed and bool((ids >= 0).all())
        return self._with(length=end - begin, document_ids=None if plain else ids)

    def closed(self: Spans, x: Tensor) -> tuple[Tensor, Spans]:
        """(b, t, …) with the tokens of each row moved together, absent ones behind them, and the segments of that."""
        if x.shape[:2] != (self.batch, self.length):
            raise ValueError(f"segments describe {self.batch} x {self.length} tokens, got {tuple(x.shape[:2])}.")
        if not self.gapped:
            return x, self
        assert self.document_ids is not None
        ids = self.document_ids.gather(1, self._order)
        return _along(x, self._order), self._with(document_ids=ids)

    def reopened(self, x: Tensor) -> Tensor:
        """Undo `closed`: (b, t, …) in its columns, back in these. Values at absent tokens are arbitrary."""
        return _along(x, self._order.argsort(1)) if self.gapped else x

    @cached_property
    def real_lengths(self) -> tuple[int, ...]:
        """Real tokens of each sequence."""
        if self.document_ids is None:
            return (self.length,) * self.batch
        real = self.document_ids[self.mask]
        return tuple(torch.bincount(real, minlength=self.sequences).tolist())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of each sequence with these counted in: where a cache stands afterwards."""
        if self.document_ids is None and len(self.offsets) == 1:  # quicker, which counts in decoding
            return (self.offsets[0] + self.length,)
        return tuple(past + new for past, new in zip(self.offsets, self.real_lengths, strict=True))

    @cached_property
    def runs(self) -> list[SequenceSpan]:
        """Where each sequence that has tokens here lies, in order."""
        self.together()
        if self.document_ids is None:
            return [SequenceSpan(r, r, 0, self.length, past) for r, past in enumerate(self.offsets)]
        opens = self.mask & (self.resets | (self._previous < 0))
        rows, columns = opens.nonzero(as_tuple=True)
        numbers = self.document_ids[rows, columns].tolist()
        where = zip(numbers, rows.tolist(), columns.tolist(), strict=True)
        return [SequenceSpan(n, r, c, c + self.real_lengths[n], self.offsets[n]) for n, r, c in where]

    def pairs(self: Spans) -> tuple[Spans | None, int]:
        """Each token with the one before it: a sequence's first makes none, so there is one fewer in each.

        Returns: where the second ones stand, in columns from the returned number on; None where there are no pairs.
        """
        past = tuple(max(n - 1, 0) for n in self.offsets)
        if self.document_ids is None and min(self.offsets):
            return self._with(offsets=past), 0
        if self.document_ids is None and not max(self.offsets):
            return (self._with(length=self.length - 1, offsets=past), 1) if self.length > 1 else (None, 0)
        ids = torch.arange(self.batch, device=self.device)[:, None].expand(-1, self.length)
        ids = (ids if self.document_ids is None else self.document_ids).clone()
        for run in self.runs:
            if not run.offset:
                ids[run.row, run.begin] = -1
        return (self._with(document_ids=ids, offsets=past), 0) if bool((ids >= 0).any()) else (None, 0)

    @cached_property
    def _order(self) -> Tensor:
        """(b, t) columns, those of absent tokens within a row last."""
        index = torch.arange(self.length, device=self.device)
        last = (index * self.mask).amax(1, keepdim=True)
        return (~self.mask & (self._previous >= 0) & (index < last)).int().argsort(dim=1, stable=True)

    def _with(self: Spans, **changes: Any) -> Spans:
        return replace(self, **changes)  # type: ignore[type-var]  # every instance is a dataclass

    def together(self) -> None:
        """Raises: ValueError where absent tokens stand within a sequence."""
        if self.gapped:
            raise ValueError(
                "Absent tokens stand within a sequence: give segments.closed(x), which moves its tokens together."
            )

    @cached_property
    def starts_late(self) -> bool:
        """Some row begins with padding."""
        return self.document_ids is not None and bool((self.document_ids[:, 0] < 0).any())

    @cached_property
    def real_tokens(self) -> Tensor:
        """(n,) indices of the real tokens in the flattened (b · t)."""
        return self.mask.flatten().nonzero().flatten()

    @cached_property
    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Where the sequences of `runs` begin among their tokens here, and among all of theirs: each (n + 1,) int32."""
        new = torch.tensor([(run.end - run.begin, run.offset) for run in self.runs]).mT.to(self.device)
        both = torch.nn.functional.pad(torch.stack((new[0], new.sum(0))), (1, 0)).cumsum(1).int()
        return both[0], both[1]

    @cached_property
    def last_segments(self) -> Tensor:
        """(b,) index of each row's last segment among those of `cu_seqlens`."""
        return (self.resets.sum(1) + 1).cumsum(0) - 1

    def to_segments(self, state: Tensor) -> Tensor:
        """(segments …): each row's `state` (b …) for its first segment in `cu_seqlens`, zeros for the others."""
        first = torch.nn.functional.pad(self.last_segments[:-1] + 1, (1, 0))
        spread = state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:])
        return spread.index_copy(0, first, state)

    def has_state_each(self, state: Tensor) -> bool:
        """Whether rows are packed and `state` has an entry for each sequence, not one for each row."""
        return self.packed and len(state) == self.sequences


def _along(x: Tensor, columns: Tensor) -> Tensor:
    """x (b, t, …) with these columns of each row."""
    return x.gather(1, columns.view(*columns.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def each_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    segments: SequenceSpans,
    states: Tensor,
    like: Tensor,
    *tensors: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`run(*tensors, state=…, **options)` on every sequence of packed rows by itself, each from a state of its own.

    Args:
        states: (sequences …).
        like: a tensor of the outputs' shape and dtype.
        tensors: (b t …).
    Returns: outputs (b t …), zero at padding, and the states after each sequence; one without tokens keeps its own.
    """
    outputs, after = torch.zeros_like(like), states.clone()
    for n, row, begin, end, _ in segments.runs:
        parts = (x[row : row + 1, begin:end] for x in tensors)
        y, state = run(*parts, state=states[n : n + 1], **options)
        outputs[row, begin:end], after[n] = y[0], state[0]
    return outputs, after
