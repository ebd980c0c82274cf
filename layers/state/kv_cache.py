"""Keys and values of the tokens seen: a buffer that grows by blocks, behind parts that others share."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layers.segments import Segments

BLOCK = 256  # tokens; a buffer's size is a multiple of it, or the limit
MOST_PARTS = 32  # beyond, they are joined: reading across many costs more than one copy

Stored = tuple[Tensor, ...]  # k, v (b, kv_heads, n, d); in int8 with their scales (b, kv_heads, n, 1)
NAMES = ("k", "v", "k_scale", "v_scale")  # of what is Stored


class Heads(NamedTuple):
    """Keys and values of neighbouring places, heads first, in the dtype that was asked for."""

    k: Float[Tensor, "b kvh n d"]
    v: Float[Tensor, "b kvh n d"]


class KVState:
    """Keys (rotated) and values, row r's token at position p in place p, whatever the padding was.

    What others see (`share`) is never changed. A shared state starts a buffer of its own behind what it has in common
    with the other, so continuing either copies nothing; on CUDA, where kernels want one piece, it copies once.

    Args:
        batch, kv_heads, head_dim: sizes.
        max_len: most tokens a row.
        dtype: to store in; torch.int8 keeps a number a head and token besides, its largest value / 127, in fp32.
    Attributes:
        size: (batch, kv_heads, head_dim).
    """

    def __init__(
        self, batch: int, *, kv_heads: int, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device
    ):
        self.max_len, self.dtype, self.size = max_len, dtype, (batch, kv_heads, head_dim)
        self._empty = _buffer(self.size, 0, dtype, device)
        self.native: object = None  # what compiled code made of these buffers, until there are others
        self._parts: tuple[Stored, ...] = ()  # seen by others: read only
        self._own: Stored = self._empty  # behind them, written here alone,
        self._seen = 0  # but for its first places, which others see too

    @property
    def base(self) -> int:
        """Tokens in the shared parts."""
        return sum(part[0].shape[2] for part in self._parts)

    @property
    def capacity(self) -> int:
        """Tokens a row for which memory is taken."""
        return self.base + self._own[0].shape[2]

    @property
    def k(self) -> Tensor:
        """(b, capacity, kv_heads, d); places beyond a row's length are zero or stale. A copy where there are parts."""
        return self.read(0, self.capacity).k.transpose(1, 2)

    @property
    def v(self) -> Tensor:
        return self.read(0, self.capacity).v.transpose(1, 2)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all rows."""
        batch, kv_heads, head_dim = self.size
        return batch * kv_heads * 2 * (head_dim * self.dtype.itemsize + (4 if self.dtype == torch.int8 else 0))

    @property
    def storages(self) -> dict[int, int]:
        """Address and bytes of all memory that this state keeps alive."""
        tensors = [x.untyped_storage() for part in (*self._parts, self._own) for x in part]
        return {s.data_ptr(): s.nbytes() for s in tensors if s.nbytes()}

    def share(self, held: int) -> "KVState":
        """Another state of the first `held` tokens; nothing is copied."""
        batch, kv_heads, head_dim = self.size
        other = KVState(
            batch,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_len=self.max_len,
            dtype=self.dtype,
            device=self._own[0].device,
        )
        other.hold(self.parts(0, held))
        self._seen = max(self._seen, held - self.base)
        return other

    def append(self, k: Float[Tensor, "b t kvh d"], v: Float[Tensor, "b t kvh d"], segments: Segments) -> None:
        """Store the keys and values of real tokens after `segments.past`, a sequence a row.

        Where rows have unequal lengths, the shorter ones are followed by stale or zero places.
        Raises: ValueError for more than `max_len` tokens.
        """
        self.reserve(segments)
        past, end, base = max(segments.past), max(segments.ends), self.base
        new = _encode(k.detach().transpose(1, 2), v.detach().transpose(1, 2), self.dtype)
        for to, x in zip(self._own, new, strict=True):
            if segments.aligned:
                to[:, :, past - base : end - base] = x
                continue
            for n, row, begin, stop, place in segments.runs:
                to[n, :, place - base : place - base + stop - begin] = x[row, :, begin:stop]

    def leave_inference_mode(self) -> None:
        """Hold copies of what was made in torch.inference_mode, which autograd refuses to work with."""
        self.native = None
        self._parts = tuple(tuple(x.clone() if x.is_inference() else x for x in part) for part in self._parts)

    def whole(self, segments: Segments) -> Stored:
        """As `reserve`, with all in one piece: the buffer itself, its first `segments.past` places filled."""
        self.reserve(segments, in_one=True)
        return self._own

    def reserve(self, segments: Segments, *, in_one: bool = False) -> None:
        """Have places for the tokens of `segments`, after `segments.past`, that this state alone may write to.

        Raises: ValueError for more than `max_len` tokens.
        """
        first, past, end = min(segments.past), max(segments.past), max(segments.ends)
        if end > self.max_len:
            raise ValueError(
                f"The cache holds {self.max_len} tokens and {end} are needed: make it with a larger max_len."
            )
        self._make_room(first, past, end, in_one=in_one or not segments.aligned)

    def _make_room(self, first: int, past: int, end: int, *, in_one: bool) -> None:
        """Let places `first` to `end` be this state's own, those before `past` keeping what they hold."""
        base, more = self.base, 0
        if first < base + self._seen or (end > self.capacity and self._seen):
            self.native = None
            # Others see where this would write, or hold on to what would be copied: they keep it, and so do we.
            more = past // 4 if past > base else 0
            self._parts, self._own, self._seen = self.parts(0, past), self._empty, 0
            base = self.base
        in_one = in_one or self._own[0].device.type != "cpu" or len(self._parts) > MOST_PARTS
        join = bool(self._parts) and in_one
        if end > self.capacity or join:
            self.native = None
            base = 0 if join else base
            kept, held = self.parts(base, past), past - base
            # A quarter more than is held, so that decoding seldom moves; behind another's document, than is its own.
            wanted = max(end - base, held + max(held // 4, more))
            capacity = min(self.max_len - base, -(-wanted // BLOCK) * BLOCK)
            self._own, place = _buffer(self.size, capacity, self.dtype, self._own[0].device), 0
            for part in kept:
                for to, x in zip(self._own, part, strict=True):
                    to[:, :, place : place + x.shape[2]] = x
                place += part[0].shape[2]
            if join:
                self._parts, self._seen = (), 0

    def read(self, begin: int, end: int, *, row: int | None = None, dtype: torch.dtype | None = None) -> Heads:
        """Keys and values of these places, of one row or all; a view where it can be, else a copy of that size."""
        parts = self.parts(begin, end)
        if row is not None:
            parts = tuple(tuple(x[row : row + 1] for x in part) for part in parts)
        return _decode(_joined(parts) if parts else _cut(self._empty, 0, 0), dtype)

    def hold(self, parts: tuple[Stored, ...]) -> None:
        """Hold what `parts` of a state gave, in place of what was held; it is shared, not copied."""
        self._parts, self._own, self._seen, self.native = parts, self._empty, 0, None

    def copy(self, begin: int, end: int) -> Stored:
        """What lies in these places, in one piece and in memory of its own."""
        parts = self.parts(begin, end)
        found = _joined(parts) if parts else _cut(self._empty, 0, 0)
        return found if len(parts) > 1 else tuple(x.clone(memory_format=torch.contiguous_format) for x in found)

    def select(self, rows: Tensor, held: int) -> "KVState":
        """A state of its own with these rows, of which at most `held` tokens count."""
        _, kv_heads, head_dim = self.size
        other = KVState(
            len(rows),
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_len=self.max_len,
            dtype=self.dtype,
            device=self._own[0].device,
        )
        other.hold(tuple(tuple(x.index_select(0, rows) for x in part) for part in self.parts(0, held)))
        return other

    def parts(self, begin: int, end: int) -> tuple[Stored, ...]:
        """What lies in these places, as it lies in memory, in order: views."""
        found, base = [], 0
        for part in (*self._parts, self._own):
            n = part[0].shape[2]
            if base < end and begin < base + n:
                found.append(_cut(part, max(begin - base, 0), min(end - base, n)))
            base += n
        assert end <= base
        return tuple(found)


@torch.inference_mode(False)  # a buffer made inside that mode could not be written to outside it
def _buffer(size: tuple[int, int, int], n: int, dtype: torch.dtype, device: torch.device) -> Stored:
    batch, kv_heads, head_dim = size
    pair = tuple(torch.zeros(batch, kv_heads, n, head_dim, dtype=dtype, device=device) for _ in "kv")
    if dtype != torch.int8:
        return pair
    return *pair, *(torch.zeros(batch, kv_heads, n, 1, device=device) for _ in "kv")


def _cut(part: Stored, begin: int, end: int) -> Stored:
    return tuple(x[:, :, begin:end] for x in part)


def _joined(parts: tuple[Stored, ...]) -> Stored:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x, dim=2) for x in zip(*parts, strict=True))


def _encode(k: Tensor, v: Tensor, dtype: torch.dtype) -> Stored:
    if dtype != torch.int8:
        return k.to(dtype), v.to(dtype)
    scales = tuple(x.float().abs().amax(-1, keepdim=True) / 127 for x in (k, v))
    whole = ((x.float() / s.clamp(min=1e-30)).round().to(dtype) for x, s in zip((k, v), scales, strict=True))
    return *whole, *scales


def _decode(part: Stored, dtype: torch.dtype | None) -> Heads:
    k, v, *scales = part
    if scales:
        k, v = (x * s for x, s in zip((k, v), scales, strict=True))
    return Heads(*(x if dtype is None else x.to(dtype) for x in (k, v)))
