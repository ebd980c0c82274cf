"""Keys and values of the tokens so far: read-only parts that states share, then a buffer that grows by blocks.

    places   0 ............ base ................... capacity
             shared parts   own buffer

A place is a token's position in its sequence.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layers.segments import Segments

BLOCK = 256  # tokens; a buffer's size is a multiple of it, or the limit
MOST_PARTS = 32  # more are joined: reading across many costs more than one copy

Stored = tuple[Tensor, ...]  # k, v (b, kv_heads, n, d); in int8 with their scales (b, kv_heads, n, 1)
NAMES = ("k", "v", "k_scale", "v_scale")  # of what is Stored


class Heads(NamedTuple):
    """Keys and values of neighbouring places, heads first, in the dtype that was asked for."""

    k: Float[Tensor, "b kvh n d"]
    v: Float[Tensor, "b kvh n d"]


class KVCache:
    """Keys (rotated) and values: row r's token at position p lies in place p, whatever the padding was.

    What another state shares (`share`) is never changed. Each of the two continues in a buffer of its own behind the
    shared parts, so that sharing and continuing copy nothing; on CUDA, where kernels want one piece, it copies once.

    Args:
        batch, kv_heads, head_dim: sizes.
        max_len: most tokens a row.
        dtype: to store in; torch.int8 also keeps an fp32 scale for each head and token, the largest value / 127.
    Attributes:
        size: (batch, kv_heads, head_dim).
    """

    def __init__(
        self, batch: int, *, kv_heads: int, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device
    ):
        self.max_len, self.dtype, self.size = max_len, dtype, (batch, kv_heads, head_dim)
        self._empty = _buffer(self.size, 0, dtype, device)
        self.native: object = None  # what compiled code keeps about these buffers; None once they are others
        self._parts: tuple[Stored, ...] = ()  # shared: read only
        self._own: Stored = self._empty  # behind them; only this state writes to it,
        self._seen = 0  # but not to its first places, which others share too

    @property
    def base(self) -> int:
        """Tokens in the shared parts."""
        return sum(part[0].shape[2] for part in self._parts)

    @property
    def capacity(self) -> int:
        """Tokens a row for which there is memory."""
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

    def share(self, held: int) -> "KVCache":
        """Another state of the first `held` tokens; nothing is copied."""
        other = self._like(self.size[0])
        other.hold(self.parts(0, held))
        self._seen = max(self._seen, held - self.base)
        return other

    def _like(self, batch: int) -> "KVCache":
        """An empty state of the same kind."""
        _, kv_heads, head_dim = self.size
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "max_len": self.max_len}
        return KVCache(batch, **sizes, dtype=self.dtype, device=self._own[0].device)

    def append(self, k: Float[Tensor, "b t kvh d"], v: Float[Tensor, "b t kvh d"], segments: Segments) -> None:
        """Store the keys and values of real tokens behind `segments.offsets`, a sequence a row.

        Where rows have unequal lengths, stale or zero places follow the shorter ones.
        Raises: ValueError for more than `max_len` tokens.
        """
        self.reserve(segments)
        past, end, base = max(segments.offsets), max(segments.ends), self.base
        new = _encode(k.detach().transpose(1, 2), v.detach().transpose(1, 2), self.dtype)
        for to, x in zip(self._own, new, strict=True):
            if segments.uniform_offset:
                to[:, :, past - base : end - base] = x
                continue
            for n, row, begin, stop, place in segments.runs:
                to[n, :, place - base : place - base + stop - begin] = x[row, :, begin:stop]

    def leave_inference_mode(self) -> None:
        """Replace tensors made in torch.inference_mode by copies: autograd refuses to work with them."""
        self.native = None
        self._parts = tuple(tuple(x.clone() if x.is_inference() else x for x in part) for part in self._parts)

    def whole(self, segments: Segments) -> Stored:
        """`reserve`, and the buffer itself: all in one piece, its first `segments.offsets` places filled."""
        self.reserve(segments, in_one=True)
        return self._own

    def reserve(self, segments: Segments, *, in_one: bool = False) -> None:
        """Make places for the tokens of `segments`, behind `segments.offsets`, that only this state writes to.

        Raises: ValueError for more than `max_len` tokens.
        """
        first, past, end = min(segments.offsets), max(segments.offsets), max(segments.ends)
        self.reserve_places(first, past, end, in_one=in_one or not segments.uniform_offset)

    def reserve_places(self, first: int, past: int, end: int, *, in_one: bool = False) -> None:
        """Make places `first` to `end` this state's own; those before `past` keep what they hold.

        Raises: as `reserve`.
        """
        if end > self.max_len:
            raise ValueError(
                f"The cache holds {self.max_len} tokens and {end} are needed: make it with a larger max_len."
            )
        spare = 0
        if first < self.base + self._seen or (end > self.capacity and self._seen):
            # Others share the places to write to, or keep alive what would be copied: leave all of it to them.
            spare = past // 4 if past > self.base else 0
            self.hold(self.parts(0, past))
        in_one = in_one or self._own[0].device.type != "cpu" or len(self._parts) > MOST_PARTS
        join = bool(self._parts) and in_one
        if end > self.capacity or join:
            self._move(0 if join else self.base, past, end, spare)

    def _move(self, base: int, past: int, end: int, spare: int) -> None:
        """Begin a buffer at place `base`, with what lies from there up to `past`; room up to `end`, or `spare` more."""
        kept, held = self.parts(base, past), past - base
        # More than is held, so that decoding seldom moves: a quarter; on CUDA, where it also captures a graph, as much.
        more = held // 4 if self._own[0].device.type == "cpu" else held
        wanted = max(end - base, held + max(more, spare))
        capacity = min(self.max_len - base, -(-wanted // BLOCK) * BLOCK)
        if base < self.base:
            self._parts, self._seen = (), 0
        self._own, self.native = _buffer(self.size, capacity, self.dtype, self._own[0].device), None
        place = 0
        for part in kept:
            for to, x in zip(self._own, part, strict=True):
                to[:, :, place : place + x.shape[2]] = x
            place += part[0].shape[2]

    def read(self, begin: int, end: int, *, row: int | None = None, dtype: torch.dtype | None = None) -> Heads:
        """Keys and values of these places, of one row or all: a view where possible, else a copy."""
        parts = self.parts(begin, end)
        if row is not None:
            parts = tuple(tuple(x[row : row + 1] for x in part) for part in parts)
        return _decode(_joined(parts) if parts else _cut(self._empty, 0, 0), dtype)

    def hold(self, parts: tuple[Stored, ...]) -> None:
        """Hold what `parts` of a state returned, in place of what was held; it is shared, not copied."""
        self._parts, self._own, self._seen, self.native = parts, self._empty, 0, None

    def copy(self, begin: int, end: int) -> Stored:
        """A copy of what lies in these places, in one piece."""
        parts = self.parts(begin, end)
        found = _joined(parts) if parts else _cut(self._empty, 0, 0)
        return found if len(parts) > 1 else tuple(x.clone(memory_format=torch.contiguous_format) for x in found)

    def select(self, rows: Tensor, held: int) -> "KVCache":
        """A state of its own with these rows, of which at most `held` tokens count."""
        other = self._like(len(rows))
        other.hold(tuple(tuple(x.index_select(0, rows) for x in part) for part in self.parts(0, held)))
        return other

    def parts(self, begin: int, end: int) -> tuple[Stored, ...]:
        """Views of what lies in these places, in order, one for each piece of memory."""
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
