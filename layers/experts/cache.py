"""A bounded store for experts whose weights lie elsewhere: one for all layers of a model."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import GroupLayout

Matrix = Tensor | GroupWeight
# Fills gate_up (2·inner, width) and down (width, inner) with expert e; returns the bytes it read.
Read = Callable[[int, Any, Any], int]
Slot = tuple[Matrix, Matrix]


@dataclass(frozen=True)
class SlotKind:
    """What a slot holds: sizes, and the dtype of the matrices, or how each is kept in groups."""

    hidden_size: int
    intermediate_size: int
    kept: torch.dtype | tuple[GroupLayout, GroupLayout]

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)

    @property
    def nbytes(self) -> int:
        if isinstance(self.kept, torch.dtype):
            return 3 * self.hidden_size * self.intermediate_size * self.kept.itemsize
        return sum(layout.nbytes(*shape) for layout, shape in zip(self.kept, self.shapes, strict=True))

    def make(self) -> Slot:
        """Memory for one expert."""
        first, second = self.shapes
        with torch.inference_mode(False), torch.device("cpu"):  # another thread could not fill an inference tensor
            if isinstance(self.kept, torch.dtype):
                return torch.empty(first, dtype=self.kept), torch.empty(second, dtype=self.kept)
            return self.kept[0].empty(*first), self.kept[1].empty(*second)


@dataclass
class CacheReport:
    """What a cache did since it was made or `reset`. An expert counts once for each call of its layer."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    tokens: int = 0  # as the first layer saw them

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / max(1, self.tokens)


class ExpertCache:
    """At most `max_bytes` of experts, least recently used out first, in slots that are allocated once and reused.

    A layer's call leaves its even share of the slots as recently used, the experts of most tokens; what else it used is
    the first to go. So a long prefill, or a model in which one token routes to more experts than there are slots,
    recycles a few slots and does not wash out what other layers hold (docs/decisions/0003).

    Args:
        max_bytes: for all layers together; allocated as experts come in.
        readers: threads that read what is missing, while what is there is multiplied.
    """

    def __init__(self, max_bytes: int, *, readers: int = 4):
        if readers < 1:
            raise ValueError(f"Cannot read experts with {readers} threads: give at least 1.")
        self.max_bytes, self.readers = max_bytes, readers
        self.layers = self.slots = self._slot_bytes = 0
        self._like: SlotKind | None = None
        self.report = CacheReport()
        self._empty()

    def _empty(self) -> None:
        self._kept: OrderedDict[tuple[int, int], Slot] = OrderedDict()  # (layer, e), the first to go first
        self._free: list[Slot] = []
        self._allocated = 0
        self._lock = threading.RLock()  # held while a layer uses its experts: their slots are not to be refilled
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles begin empty: what is cached can be read again, threads cannot be copied."""
        left_out = ("_kept", "_free", "_allocated", "_lock", "_pool")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._empty()

    def join(self, like: SlotKind) -> int:
        """Serve one more layer; its number.

        Raises: ValueError where the budget holds no expert, or another layer's experts are of another size or dtype.
        """
        size = like.nbytes
        if self._like not in (None, like):
            raise ValueError(f"This cache serves experts of {self._like}: give those of {like} a cache of their own.")
        if self.max_bytes < size:
            raise ValueError(f"{self.max_bytes:,} bytes hold no expert of {size:,}: give the cache at least that.")
        self._like, self._slot_bytes, self.slots = like, size, self.max_bytes // size
        self.layers += 1
        return self.layers - 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated for experts so far."""
        return self._allocated * self._slot_bytes

    def reset(self) -> None:
        """Count anew, in a new `report`; experts stay."""
        self.report = CacheReport()

    def visit(self, layer: int, experts: Mapping[int, int], read: Read, *, tokens: int) -> Generator[Slot, None, None]:
        """The matrices of one expert after another, in the order given, each valid until the next is asked for.

        Args:
            experts: how many tokens use each.
        Close the iterator (`contextlib.closing`), so that what is being read ahead is let go where a product fails.
        """
        with self._lock:
            here = {e: self._kept.pop((layer, e)) for e in experts if (layer, e) in self._kept}
            missing = deque(e for e in experts if e not in here)
            reading: dict[int, tuple[Slot, Future[int]]] = {}
            ranked = sorted(experts, key=lambda e: (-experts[e], e not in here))
            stay = {(layer, e) for e in ranked[: max(1, self.slots // self.layers)]}
            self.report.tokens += tokens if layer == 0 else 0
            try:
                for e in experts:
                    while missing and len(reading) <= self.readers:  # all busy and one more lined up
                        slot = self._take(spare=stay if reading else set())
                        if slot is None and (reading or e in here):
                            break  # one is let go before this read is needed
                        if slot is None:
                            given_up, slot = here.popitem()  # the last to be needed
                            late = {given_up, *missing}
                            missing = deque(m for m in experts if m in late)
                        m = missing.popleft()
                        reading[m] = slot, self._submit(read, m, *slot)
                    if e in here:
                        slot = here.pop(e)
                        self.report.hits += 1
                    else:
                        slot, future = reading[e]
                        self.report.bytes_read += future.result()
                        del reading[e]  # not before: should the read fail, the slot has to be freed
                        self.report.misses += 1
                    self._keep(layer, e, slot, recent=(layer, e) in stay)
                    yield slot
            finally:
                for _, future in reading.values():
                    future.cancel()
                wait([future for _, future in reading.values()])
                self._free += [slot for slot, _ in reading.values()]
                for e, slot in here.items():
                    self._keep(layer, e, slot, recent=True)

    def _take(self, *, spare: set[tuple[int, int]]) -> Slot | None:
        """A slot to fill; None where every one is about to be used or holds what to spare."""
        if self._free:
            return self._free.pop()
        if self._allocated == self.slots:
            first = next(iter(self._kept), None)
            return None if first is None or first in spare else self._kept.pop(first)
        assert self._like is not None
        self._allocated += 1
        return self._like.make()

    def _keep(self, layer: int, e: int, slot: Slot, *, recent: bool) -> None:
        self._kept[layer, e] = slot
        self._kept.move_to_end((layer, e), last=recent)

    def _submit(self, read: Read, e: int, gate_up: Matrix, down: Matrix) -> Future[int]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.readers, thread_name_prefix="experts")
        return self._pool.submit(read, e, gate_up, down)
