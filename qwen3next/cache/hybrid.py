"""What a model carries between calls: keys and values, recurrent memory, last convolution inputs."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from layers.deprecation import warn_renamed
from layers.gated_deltanet import DeltaNetState
from layers.norm import at_least_fp32
from layers.rope import Yarn
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.cache.files import load_cache, save_cache
from qwen3next.cache.rollback_log import RollbackLog, State
from qwen3next.cache.snapshot import Snapshot
from qwen3next.config import ModelConfig

# What a cache's contents depend on, of a model's configuration.
SHAPED_BY = (
    "layer_types", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "partial_rotary_factor", "rope_theta", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip


@dataclass
class Extension:
    """A call that extends a cache; see `HybridCache.extend`.

    Attributes:
        segments: where the call's tokens lie, and how many tokens each sequence has before them.
        layers: the state of each layer, which the layer reads and replaces.
        cache: the one that is extended.
        hidden_before: (b, hidden size) after each row's last token before the call; None where there are none.
        hidden: (b, t, hidden size) after the final norm, set by the caller.
    """

    segments: Segments
    layers: list[State]
    cache: "HybridCache"
    hidden_before: Tensor | None
    hidden: Tensor | None = None

    @property
    def mtp(self) -> KVCache | None:
        """The MTP layer's keys and values, or None."""
        return self.cache.mtp


@runtime_checkable
class Waiting(Protocol):
    """Keys and values of the MTP layer that are still to be written."""

    def write(self, state: KVCache, lengths: Sequence[int], tokens: Tensor) -> None: ...


@dataclass
class HybridCache:
    """The state of `batch` sequences. Make one with `model.new_cache`; `model(ids, cache=cache)` reads and extends it.

    A call that fails or is interrupted leaves it as it was.

    Attributes:
        config: of the model that it belongs to.
        layers: one KVCache or DeltaNetState a layer.
        tokens: (b, max_len) the token ids seen, row r's first `lengths[r]` places.
        lengths: tokens each row holds.
        yarn: how RoPE was stretched where the keys were turned.
        history: tokens that `rollback` can take back; what that takes is kept beside what `nbytes` counts.
        waiting_pairs: what compiled steps have not written into `mtp` yet; it is written when `mtp` is read.
        hidden: (b, width) after each row's last token and the final norm; None while the cache is empty.
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
    waiting_pairs: Waiting | None = field(default=None, repr=False)
    hidden: Tensor | None = field(default=None, repr=False)
    last_logits: Tensor | None = field(default=None, repr=False)
    snapshots: dict[str, Snapshot] = field(default_factory=dict, repr=False)
    model: "weakref.ref[Any] | None" = field(default=None, repr=False)
    _rollback_log: RollbackLog | None = field(default=None, repr=False)
    _forgets: bool = field(default=False, repr=False)  # records need not outlast a `take_back`
    _resting: Sequence[int] = field(default=(), repr=False)
    _mtp: KVCache | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """For pickle: without the model, which the next call with one gives back."""
        self.write_pairs()
        return self.__dict__ | {"model": None}

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def mtp(self) -> KVCache | None:
        """Keys and values of the MTP layer, where the cache was made with it: one fewer than tokens."""
        self.write_pairs()
        return self._mtp

    @mtp.setter
    def mtp(self, state: KVCache | None) -> None:
        self._mtp, self.waiting_pairs = state, None

    @property
    def unwritten_mtp(self) -> KVCache | None:
        """`mtp`, in which the pairs that wait are missing."""
        return self._mtp

    def write_pairs(self) -> None:
        """Write the pairs that wait into the MTP layer's keys and values."""
        waiting, self.waiting_pairs = self.waiting_pairs, None
        if waiting is not None and self._mtp is not None:
            waiting.write(self._mtp, self.lengths, self.tokens)

    @property
    def max_len(self) -> int:
        """Tokens that fit into a row."""
        return self.tokens.shape[1]

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """Of keys and values; None in a model without softmax attention."""
        return next((s.dtype for s in self.layers if isinstance(s, KVCache)), None)

    @property
    def state_dtype(self) -> torch.dtype | None:
        """Of recurrent states; None in a model without Gated DeltaNet layers."""
        return next((s.recurrent.dtype for s in self.layers if isinstance(s, DeltaNetState)), None)

    def check(self, config: ModelConfig) -> None:
        """Raises: ValueError where this is no cache for a model of that configuration."""
        if config is self.config:
            return
        for name in SHAPED_BY:
            mine, asked = getattr(self.config, name), getattr(config, name)
            if mine != asked:
                raise ValueError(
                    f"The cache was made for a model with {name} = {mine}, this one has {asked}: "
                    "make one with model.new_cache()."
                )

    def cast(self, dtype: torch.dtype) -> None:
        """Go on with a model that was cast to `dtype` meanwhile; what was before cannot be rolled back to any more.

        Keys, values and recurrent states stay as `new_cache` was asked for them, but that fp64 comes and goes.
        """
        self.write_pairs()
        for i, state in enumerate(self.layers):
            if isinstance(state, DeltaNetState):
                exact = torch.float64 if dtype == torch.float64 else torch.float32
                recurrent = state.recurrent if state.recurrent.itemsize < 4 else state.recurrent.to(exact)
                self.layers[i] = DeltaNetState(state.conv.to(dtype), recurrent)
        self.hidden = None if self.hidden is None else self.hidden.to(dtype)
        self.last_logits = None if self.last_logits is None else self.last_logits.to(dtype)
        if self._rollback_log is not None:
            self._rollback_log.clear()

    @contextmanager
    def extend(self, input_ids: Tensor, segments: Segments | None, model: Any) -> Iterator[Extension]:
        """Around a forward or a step of `model`: check that the tokens fit, then take them in as the block ends.

        A sequence is a row of the cache; where rows of `input_ids` are packed, they are sequences of it in their order.
        If the block fails, the cache is as before; what was added to keys and values lies behind what counts.

        Args:
            segments: where sequences lie in input_ids (b, t); None means each row is one whole sequence.
        Raises: ValueError for a model of another shape, another number of sequences, or more tokens than fit.
        """
        segments = self.check_fits(input_ids, segments, model)
        self._follow(model)
        if torch.is_grad_enabled():
            self._leave_inference_mode()
        before: list[State] = [s if isinstance(s, KVCache) else s.share() for s in self.layers]
        if self.history:
            if self._rollback_log is None:
                self._rollback_log = RollbackLog(self.history)
            self._rollback_log.begin(
                self.layers, segments, logits=self.last_logits, hidden=self.hidden, resting=self._resting
            )
        call, hidden, lengths = Extension(segments, self.layers, self, self.hidden), self.hidden, self.lengths
        try:
            yield call
            assert call.hidden is not None
            self._advance(input_ids, segments, call.hidden.detach())
            if self._resting:
                self._put_back(before, hidden, lengths)
        except BaseException:
            self.layers = before
            if self._rollback_log is not None:
                self._rollback_log.abandon(self.layers)
            raise

    def check_fits(self, input_ids: Tensor, segments: Segments | None, model: Any) -> Segments:
        """What `extend` checks, and changes nothing. Returns: the segments as continuations of what is held.

        Raises: as `extend`.
        """
        if self.yarn != model.config.rope_scaling:
            raise ValueError(
                "The cache was made with another RoPE scaling: its keys are turned otherwise. Make a new one."
            )
        self.check(model.config)
        return self._admitted(input_ids, segments)

    def _follow(self, model: Any) -> None:
        """A model that was cast meanwhile casts the cache."""
        if self.hidden is not None and self.hidden.dtype != (dtype := model.dtype):
            self.cast(dtype)
        if self.model is None:  # from a pickle
            self.model = weakref.ref(model)

    def _admitted(self, input_ids: Tensor, segments: Segments | None) -> Segments:
        """The segments as continuations of what is held. Raises: ValueError where they do not fit."""
        if segments is None:
            batch, length = input_ids.shape
            past = self.lengths if batch == self.batch else ()
            given = Segments(batch, length, input_ids.device, None, batch, past)
        else:
            given = segments.after(self.lengths) if segments.sequences == self.batch else segments
        if given.sequences != self.batch:
            raise ValueError(
                f"The cache was made for {self.batch} sequences and {given.sequences} are given: "
                "make it with batch= that many."
            )
        if max(given.ends) > self.max_len:
            raise ValueError(
                f"The cache holds {self.max_len} tokens a sequence and {max(given.ends)} are needed: "
                "make it with a larger max_len."
            )
        return given

    def _advance(self, input_ids: Tensor, segments: Segments, hidden: Tensor) -> None:
        """Note that these tokens are now part of every layer's state; `hidden` is (b t width)."""
        if segments.uniform_offset:
            self.tokens[:, segments.offsets[0] : segments.ends[0]] = input_ids
        else:
            for n, row, begin, end, past in segments.runs:
                self.tokens[n, past : past + end - begin] = input_ids[row, begin:end]
        if self._rollback_log is not None:
            self._rollback_log.end(self.layers, hidden)
        if segments.unpadded:
            last = hidden[:, -1].clone()
        else:
            runs = segments.runs
            last = hidden.new_zeros(self.batch, hidden.shape[-1]) if self.hidden is None else self.hidden.clone()
            last[[run.sequence for run in runs]] = hidden[[run.row for run in runs], [run.end - 1 for run in runs]]
        self.lengths, self.hidden, self.last_logits = segments.ends, last, None

    @contextmanager
    def revocable(self, tokens: int) -> Iterator[None]:
        """`take_back` can take back tokens of the latest call in the block, once, if it brought no more than these.

        Beside those of `history`.
        """
        history, self.history = self.history, self.history + tokens
        self._forgets = not history
        if self._rollback_log is not None:
            self._rollback_log.limit = self.history
        try:
            yield
        finally:
            self.history, self._forgets = history, False
            if not history:
                self._rollback_log = None
            elif self._rollback_log is not None:
                self._rollback_log.limit = history

    @contextmanager
    def resting(self, rows: Sequence[int]) -> Iterator[None]:
        """Calls in the block run these rows along with the others and leave them as they are."""
        self._resting = tuple(rows)
        try:
            yield
        finally:
            self._resting = ()

    def _put_back(self, before: Sequence[State], hidden: Tensor | None, lengths: tuple[int, ...]) -> None:
        """Give the resting rows the states that they had before the call."""
        index = torch.tensor(self._resting, device=self.tokens.device)

        def put_back(now: Tensor, then: Tensor) -> Tensor:  # into a new tensor: others may hold the old one
            return now.index_copy(0, index, then[index].to(now.dtype))

        for now, then in zip(self.layers, before, strict=True):
            if isinstance(now, DeltaNetState) and isinstance(then, DeltaNetState):
                now.conv, now.recurrent = put_back(now.conv, then.conv), put_back(now.recurrent, then.recurrent)
        self.lengths = tuple(lengths[r] if r in self._resting else n for r, n in enumerate(self.lengths))
        if self.hidden is not None and hidden is not None:
            self.hidden = put_back(self.hidden, hidden)

    @contextmanager
    def unchanged_on_failure(self) -> Iterator[None]:
        """Around several calls that extend the cache: if the block fails, it is as before all of them."""
        states: list[State] = [s if isinstance(s, KVCache) else DeltaNetState(s.conv, s.recurrent) for s in self.layers]
        before = states, self.lengths, self.hidden, self.last_logits
        log = None if self._rollback_log is None else self._rollback_log.copy()
        try:
            yield
        except BaseException:
            self.layers, self.lengths, self.hidden, self.last_logits = before
            self._rollback_log = log
            raise

    def _leave_inference_mode(self) -> None:
        for state in self.layers:
            if isinstance(state, KVCache):
                state.leave_inference_mode()
            elif state.conv.is_inference() or state.recurrent.is_inference():
                state.conv, state.recurrent = state.conv.clone(), state.recurrent.clone()

    def snapshot(self, name: str) -> None:
        """Remember this point; costs no time and, for the recurrent states, their memory."""
        self.snapshots[name] = self.mark()

    def restore(self, name: str) -> None:
        """Go to a snapshot, which stays; `rollback` cannot go behind it. Raises: ValueError for an unknown name."""
        if name not in self.snapshots:
            raise ValueError(f"There is no snapshot {name!r}: {', '.join(self.snapshots) or 'none was taken'}.")
        self.go_to(self.snapshots[name])

    def rollback(self, tokens: int | Sequence[int]) -> None:
        """Take back the last so many tokens, of every row or row by row, in all parts; or refuse and change nothing.

        Possible within the last `history` tokens. Exact to the bit where single tokens are taken back and where a call
        began; inside a call that ran in chunks, as exact as chunks and token loop agree.
        Raises: ValueError where the state of that point is not known.
        """
        self.take_back([tokens] * self.batch if isinstance(tokens, int) else list(tokens))
        model = None if self.model is None else self.model()
        if self.last_logits is None and self.hidden is not None and model is not None:
            self.last_logits = model.logits_after(self)

    def take_back(self, back: Sequence[int], *, logits: Tensor | None = None) -> None:
        """`rollback` of so many tokens a row, to places after which the logits are known, or else not made again.

        Args:
            logits: (b, vocab) after the last token that stays in each row.
        """
        if len(back) != self.batch:
            raise ValueError(f"Give one number, or one for each of the {self.batch} rows, not {len(back)}.")
        target = tuple(length - n for length, n in zip(self.lengths, back, strict=True))
        if min(back) < 0 or min(target) < 0:
            raise ValueError(f"Cannot take back {max(back)} of {min(self.lengths)} tokens.")
        if not any(back):
            self.last_logits = self.last_logits if logits is None else logits
            return
        point = None if self._rollback_log is None else self._rollback_log.find(target, keep=not self._forgets)
        if point is None:
            raise ValueError(
                f"No state after {target[0]} tokens is kept (kept: {self._rollback_log or 'none'}): make the cache "
                "with a larger history=, or take a snapshot there."
            )
        states = iter(point.layers)
        for i, now in enumerate(self.layers):
            if isinstance(now, DeltaNetState):
                then = next(states)
                self.layers[i] = DeltaNetState(then.conv, then.recurrent.to(now.recurrent.dtype))
        self.lengths, self.hidden = point.lengths, point.hidden
        self.last_logits = point.logits if logits is None else logits

    def fork(self, n: int = 1) -> list["HybridCache"]:
        """Copies that go on independently, with the same past. Keys and values of it are shared for good."""
        forks = [self._with(self.mark()) for _ in range(n)]
        if self._rollback_log is not None:
            for fork in forks:
                fork._rollback_log = self._rollback_log.copy()
        return forks

    def select(self, rows: Sequence[int] | Tensor) -> "HybridCache":
        """A cache of these rows, in this order, any of them several times: for batches that shrink, and beams."""
        index = torch.as_tensor(rows, device=self.tokens.device)
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32) or not len(index):
            raise ValueError(f"rows must be a list of row numbers, at least one, got {rows}.".replace("\n", " "))
        if int(index.min()) < 0 or int(index.max()) >= self.batch:
            raise ValueError(f"rows must be numbers below {self.batch}, got {index.tolist()}.")
        held = max(self.lengths)
        layers: list[State] = []
        for state in self.layers:
            if isinstance(state, KVCache):
                layers.append(state.select(index, held))
            else:
                layers.append(DeltaNetState(state.conv[index], state.recurrent[index]))
        mtp = None if self.mtp is None else self.mtp.select(index, max(held - 1, 0))
        hidden, logits = (None if x is None else x[index] for x in (self.hidden, self.last_logits))
        lengths = tuple(self.lengths[i] for i in index.tolist())
        return self._with(Snapshot(lengths, layers, mtp, self.tokens[index, : max(lengths)], hidden, logits))

    def reorder(self, rows: Sequence[int] | Tensor) -> "HybridCache":
        """The old name of `select`."""
        warn_renamed("HybridCache.reorder", "select")
        return self.select(rows)

    def rewind_to(self, ids: Sequence[int]) -> int:
        """Go to the longest known prefix of `ids`; returns its number of tokens, 0 if there is none.

        Known are the point where the cache stands, the points that `rollback` reaches, and snapshots.
        Raises: ValueError for a cache of several rows.
        """
        if self.batch != 1:
            raise ValueError(f"The cache has {self.batch} rows, but rewind_to takes one sequence: select one row.")
        wanted = torch.tensor(ids, device=self.tokens.device, dtype=torch.long)
        same = common_prefix(self.tokens[0, : self.lengths[0]], wanted)
        best, name = self.lengths[0], ""
        if same < best:
            best = -1 if self._rollback_log is None else self._rollback_log.furthest(same)
        for key, mark in self.snapshots.items():
            length = mark.lengths[0]
            if best < length <= len(ids) and torch.equal(mark.tokens[0], wanted[:length]):
                best, name = length, key
        if name:
            self.restore(name)
        elif best > 0:
            self.rollback(self.lengths[0] - best)
        return max(best, 0)

    def lengthen(self, max_len: int) -> None:
        """Let every row hold up to `max_len` tokens, if it could hold fewer; memory for them is taken as they come."""
        if max_len <= self.max_len:
            return
        tokens = _no_tokens(self.batch, max_len, self.tokens.device)
        tokens[:, : self.max_len] = self.tokens
        self.tokens = tokens
        marked = (state for mark in self.snapshots.values() for state in (*mark.layers, mark.mtp))
        for state in (*self.layers, self.mtp, *marked):
            if isinstance(state, KVCache):
                state.max_len = max_len

    def nbytes(self) -> int:
        """Bytes of the state and of the keys and values held (token ids, history and snapshots left out)."""
        held = max(self.lengths)
        layers = sum(s.bytes_per_token * held if isinstance(s, KVCache) else s.nbytes for s in self.layers)
        return layers + (0 if self.mtp is None else self.mtp.bytes_per_token * max(held - 1, 0))

    @property
    def reserved(self) -> int:
        """Bytes allocated: as `nbytes`, and the room that keys and values have left; what others share is counted."""
        return sum(self.storages().values())

    def storages(self) -> dict[int, int]:
        """Address and bytes of all memory that states, keys and values keep alive; forks have some in common."""
        return Snapshot(self.lengths, self.layers, self.mtp, self.tokens, None, None).storages()

    def save(self, path: str | Path) -> None:
        """Write this cache and its snapshots as a safetensors file, atomically. `load` requires the same model.

        Keys and values that snapshots share with the cache are written once.
        Raises: ValueError if the cache's model no longer exists.
        """
        save_cache(self, path)

    @staticmethod
    def load(path: str | Path, model: Any, *, max_len: int | None = None, history: int = 0) -> "HybridCache":
        """Read a cache that was saved with `model`, onto the model's device.

        Args:
            max_len: tokens that the cache can hold; None means 4096, or the tokens in the file if more.
            history: as for `model.new_cache`.
        Raises: ValueError for a damaged or changed file, one of another model, dtype or RoPE factor, or more tokens
            than `max_len`.
        """
        return load_cache(path, model, max_len=max_len, history=history)

    @staticmethod
    def estimate(config: ModelConfig, tokens: int, *, kv_bytes: int = 2, conv_bytes: int = 2, mtp: bool = False) -> int:
        """Bytes that `nbytes` of one sequence of so many tokens will be; a kv_bytes of 1 is int8 with its scales."""
        held = tokens * config.bytes_per_token(kv_bytes) + config.bytes_per_sequence(conv_bytes)
        if mtp:
            held += max(tokens - 1, 0) * config.bytes_per_token(kv_bytes, mtp=True)
        return held

    def mark(self) -> Snapshot:
        """This point. Recurrent states are replaced and never written to; keys and values are, behind what is held."""
        held = max(self.lengths)
        layers: list[State] = [
            s.share(held) if isinstance(s, KVCache) else DeltaNetState(s.conv, s.recurrent) for s in self.layers
        ]
        mtp = None if self.mtp is None else self.mtp.share(max(held - 1, 0))
        return Snapshot(self.lengths, layers, mtp, self.tokens[:, :held].clone(), self.hidden, self.last_logits)

    def go_to(self, mark: Snapshot) -> None:
        """Stand where the mark was made, of this cache or of one of the same shape; nothing can be rolled back then."""
        held = max(mark.lengths)
        self.layers = [
            s.share(held) if isinstance(s, KVCache) else DeltaNetState(s.conv, s.recurrent) for s in mark.layers
        ]
        self.mtp = None if mark.mtp is None else mark.mtp.share(max(held - 1, 0))
        self.tokens[:, :held] = mark.tokens
        self.lengths, self.hidden, self.last_logits = mark.lengths, mark.hidden, mark.last_logits
        if self._rollback_log is not None:
            self._rollback_log.clear()

    def _with(self, mark: Snapshot) -> "HybridCache":
        tokens = _no_tokens(len(mark.lengths), self.max_len, self.tokens.device)
        other = HybridCache(self.config, [], tokens, mark.lengths, self.yarn, self.history, model=self.model)
        other.go_to(mark)
        return other


def common_prefix(a: Tensor, b: Tensor) -> int:
    """How many of the first tokens of both are equal."""
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


@torch.inference_mode(False)  # made inside that mode, it could not be written to outside it
def _no_tokens(batch: int, max_len: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, max_len, dtype=torch.long, device=device)


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
    mtp: bool = False,
) -> HybridCache:
    """An empty cache: KV in `kv_dtype`, growing by blocks; convolution inputs in `dtype`, memory in `state_dtype`."""
    if batch < 1 or max_len < 1:
        raise ValueError(f"A cache needs at least one sequence and one token, got batch={batch}, max_len={max_len}.")
    if history < 0:
        raise ValueError(f"history must not be negative, got {history}.")
    if mtp and not config.mtp_num_hidden_layers:
        raise ValueError("This model has no MTP layer to remember for: leave mtp out.")
    c = config

    def keys_and_values() -> KVCache:
        sizes = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim, "max_len": max_len}
        return KVCache(batch, **sizes, dtype=kv_dtype, device=device)

    layers: list[State] = []
    for kind in c.layer_types:
        if kind == "full_attention":
            layers.append(keys_and_values())
        else:
            conv = torch.zeros(batch, c.conv_kernel_size - 1, c.conv_channels, dtype=dtype, device=device)
            heads = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
            recurrent = torch.zeros(batch, *heads, dtype=dtype, device=device)
            recurrent = at_least_fp32(recurrent) if state_dtype is None else recurrent.to(state_dtype)
            layers.append(DeltaNetState(conv, recurrent))
    tokens = _no_tokens(batch, max_len, device)
    cache = HybridCache(c, layers, tokens, (0,) * batch, c.rope_scaling, history)
    cache.mtp = keys_and_values() if mtp else None
    return cache
