"""What a model carries between calls: keys and values, recurrent memory, last convolution inputs."""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.kv_state import KVState
from layers.norm import at_least_fp32
from layers.rope import Yarn
from layers.segments import Segments
from qwen3next.config import ModelConfig

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

State = KVState | DeltaNetState


@dataclass
class Mark:
    """A cache as it was at some point. States are shared with the cache, which replaces and never changes them.

    `tokens` is None for a point on the cache's own way, whose tokens it still has.
    """

    lengths: tuple[int, ...]
    layers: list[State]
    last_logits: Tensor | None
    tokens: Tensor | None = None

    def storages(self) -> dict[int, int]:
        """Address and bytes of the memory that this keeps alive, token ids and logits left out."""
        found: dict[int, int] = {}
        for s in self.layers:
            if isinstance(s, KVState):
                found |= s.storages
            else:
                found |= {m.data_ptr(): m.nbytes() for x in (s.conv, s.memory) if (m := x.untyped_storage()).nbytes()}
        return found


@dataclass
class HybridCache:
    """The state of `batch` sequences. Make one with `model.new_cache`; `model(ids, cache=cache)` reads and extends it.

    Attributes:
        config: of the model that it belongs to.
        layers: one KVState or DeltaNetState a layer.
        tokens: (b, max_len) the token ids seen, row r's first `lengths[r]` places.
        lengths: tokens each row holds.
        yarn: how RoPE was stretched where the keys were turned.
        history: calls that `rollback` can take back.
        last_logits: (b, vocab) after each row's last token, once `generate` or `prefill` has run; else None.
        snapshots: marks by name.
        model: the one that made it, which a file of it names.
    """

    config: ModelConfig
    layers: list[State]
    tokens: Tensor
    lengths: tuple[int, ...]
    yarn: Yarn | None = None
    history: int = 0
    last_logits: Tensor | None = field(default=None, repr=False)
    snapshots: dict[str, Mark] = field(default_factory=dict, repr=False)
    model: "weakref.ref[Qwen3Next] | None" = field(default=None, repr=False)
    _kept: deque[Mark] = field(default_factory=deque, repr=False)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def max_len(self) -> int:
        """Tokens that fit into a row."""
        return self.tokens.shape[1]

    def admit(self, input_ids: Tensor, segments: Segments) -> Segments:
        """Check that these tokens fit, before anything is written; return them as continuations of the rows.

        Raises: ValueError for another batch size, packed rows, or more tokens than fit.
        """
        if input_ids.shape[0] != self.batch:
            raise ValueError(
                f"The cache was made for {self.batch} sequences and {input_ids.shape[0]} are given: "
                "make it with batch= that many."
            )
        segments = segments.after(self.lengths)
        if max(segments.ends) > self.max_len:
            raise ValueError(
                f"The cache holds {self.max_len} tokens a sequence and {max(segments.ends)} are needed: "
                "make it with a larger max_len."
            )
        return segments

    def keep(self) -> None:
        """Keep this point for `rollback`, before a call that nothing refuses any more."""
        if self.history:
            self._kept.append(self.mark(share_kv=False))
            while len(self._kept) > self.history:
                self._kept.popleft()

    def advance(self, input_ids: Tensor, segments: Segments) -> None:
        """Note that these tokens, a result of `admit`, are now part of every layer's state."""
        for r, (past, end) in enumerate(zip(segments.past, segments.ends, strict=True)):
            first = 0 if segments.plain else int(segments.first[r])
            self.tokens[r, past:end] = input_ids[r, first : first + end - past]
        self.lengths, self.last_logits = segments.ends, None

    def snapshot(self, name: str) -> None:
        """Remember this point; costs no time and, for the recurrent states, their memory."""
        self.snapshots[name] = self.mark(share_kv=True)
        self.snapshots[name].tokens = self.tokens[:, : max(self.lengths)].clone()

    def restore(self, name: str) -> None:
        """Go to a snapshot, which stays; `rollback` cannot go behind it. Raises: ValueError for an unknown name."""
        if name not in self.snapshots:
            raise ValueError(f"There is no snapshot {name!r}: {', '.join(self.snapshots) or 'none was taken'}.")
        self.go_to(self.snapshots[name])
        self._kept.clear()  # they are of the way that was left

    def rollback(self, tokens: int) -> None:
        """Take back the last so many tokens of every row, exactly, in all parts; or refuse and change nothing.

        Possible to the beginnings of the last `history` calls, so in decoding by any number up to that.
        Raises: ValueError where no state of that point is kept.
        """
        target = tuple(length - tokens for length in self.lengths)
        if tokens < 0 or min(target) < 0:
            raise ValueError(f"Cannot take back {tokens} of {min(self.lengths)} tokens.")
        if tokens == 0:
            return
        for mark in reversed(self._kept):
            if mark.lengths == target:
                while self._kept[-1] is not mark:
                    self._kept.pop()
                self._kept.pop()
                self.go_to(mark)
                return
        kept = ", ".join(str(mark.lengths[0]) for mark in self._kept) or "none"
        raise ValueError(
            f"No state after {target[0]} tokens is kept (kept: {kept}): make the cache with a larger history=, or "
            "take a snapshot there."
        )

    def fork(self, n: int = 1) -> list["HybridCache"]:
        """Copies that go on independently. Keys and values are shared until both sides are continued."""
        return [self._with(self.mark(share_kv=True), self.tokens.clone()) for _ in range(n)]

    def select(self, rows: Sequence[int] | Tensor) -> "HybridCache":
        """A cache of these rows, in this order, any of them several times: for batches that shrink, and beams."""
        index = torch.as_tensor(rows, device=self.tokens.device)
        if not len(index) or int(index.min()) < 0 or int(index.max()) >= self.batch:
            raise ValueError(f"rows must be numbers below {self.batch}, got {index.tolist()}.")
        held = max(self.lengths)
        layers: list[State] = []
        for state in self.layers:
            if isinstance(state, KVState):
                layers.append(state.select(index, held))
            else:
                layers.append(DeltaNetState(state.conv[index], state.memory[index]))
        logits = None if self.last_logits is None else self.last_logits[index]
        lengths = tuple(self.lengths[i] for i in index.tolist())
        return self._with(Mark(lengths, layers, logits), self.tokens[index])

    reorder = select

    def rewind_to(self, ids: Sequence[int]) -> int:
        """Go to the furthest point known that is a beginning of `ids`; returns its tokens, 0 where there is none.

        Considers where the cache stands, kept states and snapshots. For one row.
        """
        assert self.batch == 1
        wanted, best, steps, name = torch.tensor(ids, device=self.tokens.device), 0, 0, ""
        kept = [(mark.lengths[0], "", self.tokens[0]) for mark in self._kept]
        named = [(m.lengths[0], key, m.tokens[0]) for key, m in self.snapshots.items() if m.tokens is not None]
        for length, key, tokens in [(self.lengths[0], "", self.tokens[0]), *kept, *named]:
            if best < length <= len(ids) and torch.equal(tokens[:length], wanted[:length]):
                best, name, steps = length, key, self.lengths[0] - length
        if name:
            self.restore(name)
        elif best:
            self.rollback(steps)
        return best

    def nbytes(self) -> int:
        """Bytes of the state and of the keys and values held (token ids and snapshots left out)."""
        held = max(self.lengths)
        return sum(
            s.bytes_per_token * held if isinstance(s, KVState) else s.conv.nbytes + s.memory.nbytes for s in self.layers
        )

    @property
    def reserved(self) -> int:
        """Bytes allocated: as `nbytes`, and the room that keys and values have left; what others share is counted."""
        return sum(self.storages().values())

    def storages(self) -> dict[int, int]:
        """Address and bytes of all memory that states, keys and values keep alive; forks have some in common."""
        return self.mark(share_kv=False).storages()

    def save(self, path: str | Path) -> None:
        """Write this cache and its snapshots to a file, whole or not at all; `load` wants the same model."""
        from qwen3next.cache_files import save_cache

        model = None if self.model is None else self.model()
        if model is None:
            raise ValueError("The model of this cache is gone: save while it is there, so that the file can name it.")
        save_cache(self, path, model)

    @staticmethod
    def load(path: str | Path, model: "Qwen3Next", *, max_len: int | None = None, history: int = 0) -> "HybridCache":
        """Read what `save` wrote. Raises: ValueError for a damaged file, or another model's, dtype's or factor's."""
        from qwen3next.cache_files import load_cache

        return load_cache(path, model, max_len=max_len, history=history)

    @staticmethod
    def estimate(config: ModelConfig, tokens: int, *, kv_bytes: int = 2, conv_bytes: int = 2) -> int:
        """Bytes that `nbytes` of one sequence of so many tokens will be."""
        return tokens * config.bytes_per_token(kv_bytes) + config.bytes_per_sequence(conv_bytes)

    def mark(self, *, share_kv: bool = True) -> Mark:
        """This point. Recurrent states are replaced and never written to; keys and values are, behind what is held."""
        layers: list[State] = []
        for s in self.layers:
            if isinstance(s, KVState):
                layers.append(s.share(max(self.lengths)) if share_kv else s)
            else:
                layers.append(DeltaNetState(s.conv, s.memory))
        return Mark(self.lengths, layers, self.last_logits)

    def go_to(self, mark: Mark) -> None:
        """Stand where the mark was made."""
        for i, (now, then) in enumerate(zip(self.layers, mark.layers, strict=True)):
            if isinstance(then, DeltaNetState):
                self.layers[i] = DeltaNetState(then.conv, then.memory)
            elif then is not now:
                assert isinstance(then, KVState)
                self.layers[i] = then.share(max(mark.lengths))
        if mark.tokens is not None:
            self.tokens[:, : mark.tokens.shape[1]] = mark.tokens
        self.lengths, self.last_logits = mark.lengths, mark.last_logits

    def _with(self, mark: Mark, tokens: Tensor) -> "HybridCache":
        return HybridCache(
            self.config,
            mark.layers,
            tokens,
            mark.lengths,
            self.yarn,
            self.history,
            last_logits=mark.last_logits,
            model=self.model,
        )


Cache = HybridCache


def new_cache(
    config: ModelConfig,
    *,
    batch: int,
    max_len: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    state_dtype: torch.dtype | None = None,
    history: int = 0,
) -> HybridCache:
    """An empty cache: KV in `kv_dtype`, growing by blocks; convolution inputs in `dtype`, memory in `state_dtype`."""
    if batch < 1 or max_len < 1:
        raise ValueError(f"A cache needs at least one sequence and one token, got batch={batch}, max_len={max_len}.")
    if history < 0:
        raise ValueError(f"history must not be negative, got {history}.")
    c = config
    layers: list[State] = []
    for kind in c.layer_types:
        if kind == "full_attention":
            sizes = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim, "max_len": max_len}
            layers.append(KVState(batch, **sizes, dtype=kv_dtype, device=device))
        else:
            conv = torch.zeros(batch, c.conv_taps - 1, c.conv_channels, dtype=dtype, device=device)
            heads = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
            memory = torch.zeros(batch, *heads, dtype=dtype, device=device)
            memory = at_least_fp32(memory) if state_dtype is None else memory.to(state_dtype)
            layers.append(DeltaNetState(conv, memory))
    tokens = torch.zeros(batch, max_len, dtype=torch.long, device=device)
    return HybridCache(c, layers, tokens, (0,) * batch, c.rope_scaling, history)
