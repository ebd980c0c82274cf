"""Where sequences begin and end, for convolution, delta rule, attention, positions and losses alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.deprecation import renamed_attribute, renamed_names
from layers.sequence_spans import SequenceSpan, SequenceSpans, cached_property

__all__ = ["UNKNOWN", "Segments", "SequenceSpan"]
UNKNOWN = -1  # sequences under torch.compile, which cannot count them


@dataclass(frozen=True, eq=False)
class Segments(SequenceSpans):
    """How the tokens of a (b, t) batch form sequences.

    A *segment* is a run of tokens of one sequence. Nothing crosses from one segment into another. Make one with
    `Segments.full`, `from_mask`, `from_document_ids` or `from_lengths`. What caches need beside is in `SequenceSpans`.

    Attributes:
        batch, length: b and t.
        document_ids: (b, t), equal ids mark one sequence, -1 padding; None where every row is one whole sequence.
        sequences: how many there are, row by row; a row without tokens is one of no tokens. 0: counted (UNKNOWN under
            torch.compile). Where it is given, document_ids are numbers of sequences, some of which may have no
            token here (see `part`).
        offsets: tokens of each sequence that a cache already holds.
        gapped: absent tokens stand within a sequence; a model moves such tokens together, layers refuse them.
    """

    batch: int
    length: int
    device: torch.device
    document_ids: Tensor | None = None
    sequences: int = 0
    offsets: tuple[int, ...] = ()
    gapped: bool = field(default=False, init=False)

    plain = renamed_attribute("plain", "unpadded")
    aligned = renamed_attribute("aligned", "uniform_offset")
    past = renamed_attribute("past", "offsets")
    number = renamed_attribute("number", "segment_ids")
    starts = renamed_attribute("starts", "resets")

    def __post_init__(self) -> None:
        tracing = torch.compiler.is_compiling()
        if not self.sequences and self.document_ids is not None and tracing:
            for name, value in (
                ("sequences", UNKNOWN),
                ("offsets", (0,)),
                ("gapped", True),
            ):  # gapped, for all it knows
                object.__setattr__(self, name, value)
        if not self.sequences:
            count = self.batch
            if self.document_ids is not None:
                count = int((self.segment_ids.amax(1) + 1).clamp(min=1).sum())
                object.__setattr__(self, "document_ids", self._numbered())
            object.__setattr__(self, "sequences", count)
        if not self.offsets:
            object.__setattr__(self, "offsets", (0,) * self.sequences)
        assert len(self.offsets) == self.sequences or self.sequences == UNKNOWN
        if self.document_ids is not None and not tracing and bool((self._gaps & self.mask).any()):
            object.__setattr__(self, "gapped", True)

    @classmethod
    def full(cls, ids: Tensor) -> "Segments":
        """Every row of `ids` (b, t, …) is one sequence, without padding."""
        return cls(ids.shape[0], ids.shape[1], ids.device)

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> "Segments":
        """Packed rows: (b, t) integers, neighbours with equal ids are one sequence, -1 is a token that is not there."""
        if document_ids.ndim != 2 or document_ids.is_floating_point():
            raise ValueError(f"document_ids must be integers of shape (b, t), got {tuple(document_ids.shape)}.")
        batch, length = document_ids.shape
        tracing = torch.compiler.is_compiling()
        # Whole rows take the faster paths.
        whole = not tracing and bool(((document_ids == document_ids[:, :1]) & (document_ids >= 0)).all())
        return cls(batch, length, document_ids.device, None if whole else document_ids.long())

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "Segments":
        """Padded rows: (b, t), 1 or True for real tokens, others wherever they stand."""
        return cls.from_document_ids(attention_mask.long() - 1)

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Segments":
        """Packed rows by the lengths of their sequences, e.g. `[[5, 3], [8]]`; shorter rows are padded at the end."""
        t = max(sum(row) for row in lengths)
        ids = torch.full((len(lengths), t), -1)
        for r, row in enumerate(lengths):
            ids[r, : sum(row)] = torch.arange(len(row)).repeat_interleave(torch.tensor(row, dtype=torch.long))
        return cls.from_document_ids(ids.to(device))

    def _numbered(self) -> Tensor:
        """document_ids as numbers of the sequences, counted through the rows."""
        first = torch.nn.functional.pad((self.segment_ids.amax(1) + 1).clamp(min=1).cumsum(0)[:-1], (1, 0))
        return (first[:, None] + self.segment_ids).masked_fill(~self.mask, -1)

    @property
    def unpadded(self) -> bool:
        """Every row is one sequence without padding."""
        return self.document_ids is None

    @cached_property
    def mask(self) -> Tensor:
        """(b, t) True for real tokens."""
        if self.document_ids is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return self.document_ids >= 0

    @cached_property
    def padded(self) -> bool:
        """Some token is absent; under torch.compile, which must not ask, some may be."""
        return self.document_ids is not None and (torch.compiler.is_compiling() or not bool(self.mask.all()))

    def real(self, x: Tensor) -> Tensor:
        """(b, t, …) with zeros at absent tokens: a mask that multiplies would let NaN and infinity through."""
        return x.masked_fill(~self.mask.view(*self.mask.shape, *(1,) * (x.ndim - 2)), 0) if self.padded else x

    @cached_property
    def _previous(self) -> Tensor:
        """(b, t) index of the last real token before each token, -1 where there is none."""
        index = torch.arange(self.length, device=self.device)
        latest = torch.where(self.mask, index, -1).cummax(dim=1).values
        return torch.where(index == 0, -1, latest.roll(1, dims=1))

    @cached_property
    def resets(self) -> Tensor:
        """(b, t) True where the recurrent state must be cleared: first tokens of all sequences but a row's first.

        A row's first sequence resets from the state that it is given: zeros, or a cache.
        """
        if self.document_ids is None:
            return torch.zeros(self.batch, self.length, dtype=torch.bool, device=self.device)
        before = self.document_ids.gather(1, self._previous.clamp(min=0))
        return self.mask & (self._previous >= 0) & (self.document_ids != before)

    @cached_property
    def _gaps(self) -> Tensor:
        index = torch.arange(self.length, device=self.device)
        return (self._previous >= 0) & (self._previous != index - 1) & ~self.resets

    @cached_property
    def segment_ids(self) -> Tensor:
        """(b, t) number of each token's segment in its row, from 0; -1 for padding."""
        return self.resets.long().cumsum(1).masked_fill(~self.mask, -1)

    @cached_property
    def positions(self) -> Tensor:
        """(b, t) position of each token in its sequence, counting what a cache holds; 0 for padding."""
        past = torch.tensor(self.offsets, device=self.device)[:, None]
        if self.document_ids is None:
            return past + torch.arange(self.length, device=self.device)
        count = self.mask.long().cumsum(1) - 1
        begin = torch.where(self.resets, count, 0).cummax(dim=1).values
        positions = count - begin
        if self.sequences != UNKNOWN:
            positions = positions + past.flatten()[self.document_ids.clamp(min=0)]
        return positions.masked_fill(~self.mask, 0)

    @cached_property
    def first(self) -> Tensor:
        """(b,) index of the first real token of each row; 0 where a row has none."""
        self.together()
        return self.mask.int().argmax(1)

    @cached_property
    def end(self) -> Tensor:
        """(b,) index after the last real token of each row; 0 where a row has none."""
        self.together()
        index = torch.arange(1, self.length + 1, device=self.device)
        return (index * self.mask).amax(1)

    @cached_property
    def attention_mask(self) -> Tensor:
        """(b, 1, t, t) True where a query may look: causal, inside its segment. Padding sees itself, to stay finite."""
        self.together()
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()
        diagonal = torch.eye(self.length, dtype=torch.bool, device=self.device)
        return ((same & causal & self.mask[:, :, None]) | diagonal)[:, None]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(n + 1,) boundaries of the segments in the flattened (b · t) tokens, int64 as FLA's kernels want them.

        Padding belongs to the segment before it, or to its row's first: kernels must be given a neutral input there.
        """
        self.together()
        edge = self.resets.clone()
        edge[:, 0] = True
        begins = edge.flatten().nonzero().flatten()
        return torch.nn.functional.pad(begins, (0, 1), value=self.batch * self.length)

    def next_is_same(self, ahead: int = 1) -> Tensor:
        """(b, t) True where the token `ahead` places on belongs to the same sequence: the places with a target."""
        self.together()
        same = torch.zeros(self.batch, self.length, dtype=torch.bool, device=self.device)
        if ahead < self.length:
            same[:, :-ahead] = (self.segment_ids[:, ahead:] == self.segment_ids[:, :-ahead]) & self.mask[:, :-ahead]
        return same


__getattr__ = renamed_names(__name__, {"Run": "SequenceSpan"})
