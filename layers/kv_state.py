"""Keys and values of the tokens seen: a buffer that grows by blocks and may be shared."""

import weakref

from jaxtyping import Float
from torch import Tensor

from layers.segments import Segments

BLOCK = 256  # tokens; a buffer's size is a multiple of it, or the limit


class _Buffer:
    """k, v (b, capacity, kv_heads, d), the tokens written so far in any row, and who holds it."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v, self.used = k, v, 0
        self.holders: weakref.WeakSet[KVState] = weakref.WeakSet()


class KVState:
    """Keys (rotated) and values, row r's token at position p in place p, whatever the padding was.

    What is held is never changed, only continued: states that share a buffer (`share`) go on sharing what they have in
    common. The first of them to continue does so in place, another one copies what it holds before it writes.

    Args:
        like: an empty (b, 0, kv_heads, d) tensor of the dtype and device to store in.
        max_len: most tokens a row.
    """

    def __init__(self, like: Float[Tensor, "b 0 kvh d"], max_len: int):
        self.max_len = max_len
        self._hold(_Buffer(like, like))

    def _hold(self, buffer: _Buffer) -> None:
        self._buffer = buffer
        buffer.holders.add(self)

    @property
    def k(self) -> Tensor:
        """(b, capacity, kv_heads, d); places beyond a row's length are zero or stale and must be masked."""
        return self._buffer.k

    @property
    def v(self) -> Tensor:
        return self._buffer.v

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all rows."""
        return 2 * self.k.shape[0] * self.k.shape[2] * self.k.shape[3] * self.k.element_size()

    def share(self) -> "KVState":
        """Another state of the same tokens; nothing is copied until both are continued."""
        other = KVState(self.k[:, :0], self.max_len)
        other._hold(self._buffer)
        return other

    def append(self, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Store the keys and values of real tokens after `segments.past`; return all stored so far (b s kv_heads d).

        Where rows have unequal lengths, the shorter ones are followed by stale or zero places that callers must mask.
        """
        past, end = max(segments.past), max(segments.ends)
        if end > self.max_len:
            raise ValueError(
                f"The cache holds {self.max_len} tokens and {end} are needed: make it with a larger max_len."
            )
        buffer = self._buffer
        continues = segments.aligned and past == buffer.used  # nobody has written where this writes
        if end > self.capacity or not (continues or len(buffer.holders) == 1):
            self._move(past, end)
        buffer = self._buffer
        for to, new in ((buffer.k, k), (buffer.v, v)):
            if segments.aligned:
                to[:, past:end] = new.detach()
            else:
                for r, (begin, stop) in enumerate(zip(segments.past, segments.ends, strict=True)):
                    first = int(segments.first[r])
                    to[r, begin:stop] = new[r, first : first + stop - begin].detach()
        buffer.used = end
        return self.k[:, :end], self.v[:, :end]

    def _move(self, held: int, needed: int) -> None:
        """Into a buffer of its own with room for `needed` tokens; a quarter more, so that decoding moves seldom."""
        wanted = max(needed, self.capacity + self.capacity // 4 if needed > self.capacity else self.capacity)
        capacity = min(self.max_len, -(-wanted // BLOCK) * BLOCK)
        old, pair = self._buffer, []
        for x in (old.k, old.v):
            new = x.new_zeros(x.shape[0], capacity, *x.shape[2:])  # zeros: a masked place is multiplied by 0
            new[:, :held] = x[:, :held]
            pair.append(new)
        old.holders.discard(self)
        self._hold(_Buffer(*pair))

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Hold these (b s kv_heads d), in place of what was held."""
        self._buffer.holders.discard(self)
        self._hold(_Buffer(k, v))
        self._buffer.used = k.shape[1]

    def select(self, rows: Tensor, held: int) -> "KVState":
        """A state of its own with these rows, of which at most `held` tokens count."""
        other = KVState(self.k[:, :0][rows], self.max_len)
        other.fill(*(x[:, :held].index_select(0, rows) for x in (self.k, self.v)))
        return other
