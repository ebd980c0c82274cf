"""A prefix store: prefixes of prompts are prefilled once and reused, within a budget, in memory and on disk."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.kernels.linear import FEW
from qwen3next.api import Qwen3Next
from qwen3next.cache.files import identity
from qwen3next.cache.hybrid import HybridCache
from qwen3next.files.sizes import binary, parse_bytes
from qwen3next.generation.block_parts import may_keep
from qwen3next.generation.kept_states import StateAfter, keeping
from qwen3next.generation.prefill import GRID
from qwen3next.prefix.files import PrefixFolder
from qwen3next.prefix.tree import End, Node, Piece, cut_out, keys_and_values, places
from qwen3next.prefix.writer import Writer

SPACING = 4096  # tokens between kept states; equals the block size of attention


@dataclass(frozen=True)
class Match:
    """How much of a prompt is stored.

    Attributes:
        matched_tokens: tokens that need not run again.
        shared_tokens: tokens of the longest common prefix with a stored text; there is no state after the matched ones.
        reason: why no more tokens match, in one sentence; "" if all match.
    """

    matched_tokens: int
    shared_tokens: int
    reason: str


class PrefixStore:
    """Stores keys, values and states of prompts by their tokens, so that a stored prefix of a new prompt is not run.

    A state is kept every `spacing` tokens, where texts diverge, at the end of prompts and where the caller asks. Caches
    from the store share its keys and values without copies. If the budget is exceeded, the least recently used part is
    freed: a state inside a text, or keys and values at its end.

    Args:
        model: the model of the caches. Make a new store after `extend_context` or a change of weights.
        budget: bytes in memory, such as "2GiB".
        folder: also keep everything on disk, for other and later processes; None keeps nothing on disk.
        disk_budget: bytes on disk.
        kv_dtype, state_dtype, mtp: as for `model.new_cache`.
        spacing: tokens, a multiple of 64.
        exact: keep and reuse states only where a prompt continues with the bits of a run without the store: behind
            multiples of 64 tokens, with at least 16 left to run.
        background: a thread writes the folder's files, so that no call waits for it. At most `budget` bytes wait; what
            exceeds them, and what cannot be written, is in memory only. `flush` waits for it, `close` ends it.
    Raises: ValueError for another spacing, or a budget that cannot hold one state of this model.
    """

    def __init__(
        self,
        model: Qwen3Next,
        *,
        budget: int | str = "2GiB",
        folder: str | Path | None = None,
        disk_budget: int | str = "16GiB",
        kv_dtype: str | torch.dtype | None = None,
        state_dtype: str | torch.dtype | None = None,
        mtp: bool = False,
        spacing: int = SPACING,
        exact: bool = False,
        background: bool = False,
    ):
        if spacing < GRID or spacing % GRID:
            raise ValueError(f"spacing must be a multiple of {GRID} tokens, got {spacing}.")
        self.model, self.budget, self.spacing, self.exact = model, parse_bytes(budget), spacing, exact
        self._kv_dtype, self._state_dtype, self._mtp = kv_dtype, state_dtype, mtp
        self._yarn, self._clock = model.config.rope_scaling, 0
        self.root = Node(torch.empty(0, dtype=torch.long))
        like = self._new_cache(max_len=1)
        if self.budget < like.nbytes():
            raise ValueError(
                f"A budget of {binary(self.budget)} cannot hold one state of this model ({binary(like.nbytes())}) with "
                "its keys and values: make it larger."
            )
        self.files = None
        if folder is not None:
            dtypes = "-".join(str(x).removeprefix("torch.") for x in (like.kv_dtype, like.state_dtype))
            name = f"{identity(model, mtp=mtp)[:24]}-{dtypes}-{self._yarn.factor if self._yarn else 1:g}"
            writer = Writer(self.budget) if background else None
            self.files = PrefixFolder(Path(folder) / name, parse_bytes(disk_budget), writer)
            self._scan()

    @property
    def nbytes(self) -> int:
        """Bytes in memory of keys and values, states and last logits."""
        return sum(node.nbytes for node in self.root.below())

    def __len__(self) -> int:
        """Number of states from which a prompt can continue, in memory or on disk."""
        return sum(node.ends for node in self.root.below())

    def match(self, ids: Tensor) -> Match:
        """How much of a prompt, (t,) or (1, t), is stored, and why no more."""
        return self._look(self._ids(ids))[1]

    def prefill(
        self,
        ids: Tensor,
        *,
        max_len: int | None = None,
        chunk_size: int = 4096,
        max_memory: int | str | None = None,
        points: Sequence[int] = (),
        history: int = 0,
    ) -> "Prefill":
        """A prefill of this prompt, (t,) or (1, t), that runs only the tokens that are not stored, while iterated over.

            run = store.prefill(ids)
            for done, total in run: ...
            q.generate(model, ids, cache=run.cache)

        Args:
            max_len: tokens that the cache can hold; None means 4096 more than the prompt.
            chunk_size, max_memory: as for `model.prefill`.
            points: numbers of tokens after which to keep a state, where other prompts will diverge.
            history: as for `model.new_cache`.
        Raises: ValueError for a prompt of another shape or longer than `max_len`, or if the RoPE scaling has changed.
        """
        ids = self._ids(ids)
        run = Prefill(
            self, ids, max_len=len(ids) + 4096 if max_len is None else max_len, points=points, history=history
        )
        run.chunk_size, run.max_memory = chunk_size, max_memory
        return run

    def refresh(self) -> None:
        """Find what other stores have written into the folder since this one was made; reads new files only."""
        self._scan()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written, or for so many seconds. Returns: whether it is."""
        writer = None if self.files is None else self.files.writer
        return writer is None or writer.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """End the thread that writes, once all is written or so many seconds are over; nothing is written later."""
        if self.files is not None and self.files.writer is not None:
            self.files.writer.close(timeout)

    def add(self, cache: HybridCache) -> None:
        """Store a cache of one row. The store and the cache share keys and values afterwards.

        Tokens that exceed the budget are not stored; `match` gives the reason.
        Raises: ValueError for a cache of several rows, or one of another model or with other options.
        """
        self._add(cache, None)

    def _add(self, cache: HybridCache, after: StateAfter | None) -> None:
        """`add`; with `after`, as if the cache ended there. Then keys and values are not shared."""
        self._check_scaling()
        if cache.batch != 1:
            raise ValueError(f"The cache has {cache.batch} rows, but a store takes one sequence: select one row.")
        like = self._new_cache(max_len=1)
        if any(
            getattr(cache, name) != getattr(like, name) for name in ("config", "yarn", "kv_dtype", "state_dtype")
        ) or (cache.mtp is None) != (like.mtp is None):
            raise ValueError("The cache has another model or other options than this store: make it with the store's.")
        if not cache.lengths[0]:
            return
        assert cache.hidden is not None
        ids = cache.tokens[0, : cache.lengths[0] if after is None else after.tokens].cpu()
        node, partial, shared = self.root.follow(ids)
        if partial is not None:
            if not self._attach(partial):
                return self._add(cache, after)  # its file is gone: search again
            node = partial.split(shared, mtp=self._mtp)
            self._write(node)
            self._write(partial)
        if after is None:
            states = [(s.conv, s.recurrent) for s in cache.layers if isinstance(s, DeltaNetState)]
            finish = End(states, cache.hidden, cache.last_logits)
        else:
            assert after.hidden is not None
            finish = End(after.states, after.hidden, None)
        if node.end < len(ids):
            new = Node(ids[node.end :].clone(), node.end, node)
            new.finish, new.piece, new.ends = finish, cut_out(cache, node.end, len(ids)), True
            if not self._make_room(new.nbytes, node):
                node.full = True
                return None
            node.children.append(new)
            node = new
            self._write(node)
        elif not node.ends:
            if not self._attach(node):
                return self._add(cache, after)
            node.finish, node.ends = finish, True
            self._write(node)
        if node.piece is not None and after is None:  # share keys and values with the cache
            for (state, begin, _), stored in zip(places(cache, node.begin, node.end), node.piece, strict=True):
                state.hold((*state.parts(0, begin), stored))
        self._use(node)
        self._trim()
        return None

    def clear(self) -> None:
        """Free everything in memory; files stay."""
        self.root = Node(torch.empty(0, dtype=torch.long))
        self._scan()

    def _new_cache(self, *, max_len: int, history: int = 0) -> HybridCache:
        return self.model.new_cache(
            max_len=max_len, kv_dtype=self._kv_dtype, state_dtype=self._state_dtype, history=history, mtp=self._mtp
        )

    def _ids(self, ids: Tensor) -> Tensor:
        self._check_scaling()
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"A prompt must be one sequence of at least one token, got shape {tuple(ids.shape)}.")
        return ids.cpu()

    def _check_scaling(self) -> None:
        if self.model.config.rope_scaling != self._yarn:
            raise ValueError("The model's RoPE scaling has changed since this store was made: make a new store.")

    def _look(self, ids: Tensor) -> tuple[Node, Match]:
        """The last node with a state along these tokens, and the match that it gives."""
        node, partial, shared = self.root.follow(ids)
        best, held = node, 0
        while best.parent is not None and not (best.ends and self._usable(best.end, len(ids))):
            held = max(held, best.end if best.ends else 0)
            best = best.parent
        matched = best.end if best.ends else 0
        if matched == len(ids):
            reason = ""
        elif held > matched or (self.exact and matched == _last_exact(len(ids))):
            reason = f"Results stay equal to the bit only if the tokens from {matched} on run again."
        elif shared > matched:
            reason = f"Tokens {matched} to {shared} are stored, but without a state after any of them."
        elif not shared:
            reason = "No stored text starts like this." if self.root.children else "Nothing is stored yet."
        elif node.full:
            reason = f"The budget of {binary(self.budget)} had no room for the tokens after that."
        elif partial is None and not node.children:
            reason = "The stored text ends there."
        else:
            reason = "The stored texts continue differently from there."
        return best, Match(matched, shared, reason)

    def _usable(self, end: int, total: int) -> bool:
        """Whether a prompt of `total` tokens may continue from a state after `end` of them."""
        return not self.exact or (end % GRID == 0 and end <= _last_exact(total))

    def _open(self, node: Node, *, max_len: int, history: int) -> HybridCache | None:
        """A cache that ends at a node's last token; None if files of the node or its ancestors are gone or damaged."""
        cache = self._new_cache(max_len=max_len, history=history)
        if node is self.root:
            return cache
        loaded = []
        for one in node.path:
            found = self._load(one, finish=one is node)
            if found is None:
                return None
            loaded.append(found)
        finish = loaded[-1][1]
        assert finish is not None
        for state, *parts in zip(keys_and_values(cache), *(piece for piece, _ in loaded), strict=True):
            state.hold(tuple(parts))
        states = iter(finish.states)
        cache.layers = [DeltaNetState(*next(states)) if isinstance(s, DeltaNetState) else s for s in cache.layers]
        cache.tokens[0, : node.end] = node.text
        cache.lengths, cache.hidden, cache.last_logits = (node.end,), finish.hidden, finish.logits
        for one, (piece, _) in zip(node.path, loaded, strict=True):
            one.piece = piece
        node.finish = finish
        self._use(node)
        self._trim()
        return cache

    def _load(self, node: Node, *, finish: bool) -> tuple[Piece, End | None] | None:
        """A node's keys and values, and its state if `finish`; None if its file is gone or damaged.

        In that case the node and its descendants are removed from the tree.
        """
        if node.piece is not None and (node.finish is not None or not (finish and node.ends)):
            return node.piece, node.finish
        assert node.parent is not None
        found = None
        if self.files is not None and node.file is not None:
            try:
                found = self.files.read(node, self.model.device)
            except ValueError as error:
                warnings.warn(f"A stored prefix cannot be used and is removed: {error}", stacklevel=5)
                node.file.unlink(missing_ok=True)
        if found is None:
            node.parent.children.remove(node)
            self._scan()  # other stores may have written a replacement
        return found

    def _attach(self, node: Node) -> bool:
        """Load all of a node into memory, regardless of the budget; False if its file is gone."""
        found = self._load(node, finish=True)
        if found is not None:
            node.piece, node.finish = found
        return found is not None

    def _use(self, node: Node) -> None:
        self._clock += 1
        node.used = self._clock
        if self.files is not None:
            self.files.touch(node)

    def _write(self, node: Node) -> None:
        if self.files is not None:
            self.files.write(node)

    def _scan(self) -> None:
        """Add nodes for the files in the folder; reads their descriptions and tokens only."""
        if self.files is None:
            return
        pending = self.files.pending  # first: a file that is written meanwhile is then in one of the two
        known = {node.file.stem: node for node in self.root.below() if node.file is not None} | {"": self.root}
        for path, about, tokens in self.files.scan(left_out={*pending, *known}):
            parent = known.get(about["parent"])
            if parent is not None and parent.end == about["begin"]:
                node = Node(tokens, about["begin"], parent, file=path, ends=about["ends"])
                parent.children.append(node)
                known[path.stem] = node

    def _make_room(self, needed: int, node: Node) -> bool:
        """Free memory for `needed` bytes after `node`; returns False, and frees nothing, if that is impossible."""
        own = set(node.path)
        if sum(one.nbytes - (0 if one.finish is None else one.finish.nbytes) for one in own) + needed > self.budget:
            return False
        while self.nbytes + needed > self.budget:
            if not self._drop_oldest(kept=own):  # then states of `node` and its ancestors, first ones first
                self._drop(next(one for one in node.path if one.finish is not None), whole=False)
        return True

    def _trim(self) -> None:
        """Free memory until the budget holds."""
        while self.nbytes > self.budget and self._drop_oldest(kept=set()):
            pass

    def _drop_oldest(self, *, kept: set[Node]) -> bool:
        """Free the least recently used state or end of a text; False if there is none."""
        free = [one for one in self.root.below() if one.nbytes and one not in kept]
        ends = [one for one in free if not any(other.nbytes for other in one.below()[1:])]
        candidates = {one for one in free if one.finish is not None} | set(ends)
        if not candidates:
            return False
        oldest = min(candidates, key=lambda one: one.used)
        self._drop(oldest, whole=oldest in ends)
        return True

    def _drop(self, node: Node, *, whole: bool) -> None:
        """Free a node's state, or all of the node if `whole`; without a file, it is removed from the tree."""
        node.finish = None
        node.piece = None if whole else node.piece
        if node.file is not None:
            return
        node.ends = False
        while whole and node.parent is not None and not (node.children or node.ends or node.file):
            node.parent.children.remove(node)
            node = node.parent


class Prefill:
    """The prefill of a prompt; iterating over it runs the prompt and yields (tokens done, tokens in total).

    Attributes:
        cache: holds the matched tokens at the start, and all tokens at the end.
        matched_tokens, reason: as in `Match`.
        chunk_size, max_memory: as for `model.prefill`.
    """

    def __init__(
        self,
        store: PrefixStore,
        ids: Tensor,
        *,
        max_len: int,
        points: Sequence[int],
        history: int,
    ):
        if max_len < len(ids):
            raise ValueError(f"The prompt has {len(ids)} tokens, but max_len is {max_len}: make it larger.")
        cache = None
        while cache is None:
            node, match = store._look(ids)
            cache = store._open(node if match.matched_tokens else store.root, max_len=max_len, history=history)
        self.cache, self.matched_tokens, self.reason = cache, match.matched_tokens, match.reason
        self._store, self._ids = store, ids
        self.chunk_size: int = 4096
        self.max_memory: int | str | None = None
        branch = match.shared_tokens // GRID * GRID  # this text diverges here: later ones may too
        wanted = {*range(store.spacing, len(ids), store.spacing), branch, *points}
        if store.exact:
            last = _last_exact(len(ids))
            wanted = {min(n // GRID * GRID, last) for n in (*wanted, last)}
        self._stops = sorted(n for n in {*wanted, len(ids)} if self.matched_tokens < n <= len(ids))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        total = len(self._ids)
        while self.cache.lengths[0] < total:
            yield self.advance(), total
        if not self._stops:
            yield total, total

    def advance(self) -> int:
        """Run one chunk of at most `chunk_size` tokens; returns how many tokens of the prompt the cache then holds."""
        begin, total, model = self.cache.lengths[0], len(self._ids), self._store.model
        stop = next(n for n in self._stops if n > begin)
        if stop < total < stop + GRID + FEW and self._reaches(total):  # the short rest runs in the same call
            kept = StateAfter(stop)
            with keeping(kept):
                next(model.prefill(self._ids[None, begin:].to(model.device), self.cache, self.chunk_size))
            self._store._add(self.cache, kept)
            return total
        ids = self._ids[None, begin:stop].to(model.device)
        next(model.prefill(ids, self.cache, self.chunk_size, max_memory=self.max_memory))
        if (done := self.cache.lengths[0]) == stop and (not self._store.exact or stop % GRID == 0):
            self._store.add(self.cache)
        return done

    def _reaches(self, total: int) -> bool:
        """Whether one call runs all the rest, and can keep a state inside."""
        begin, chunk = self.cache.lengths[0], self.chunk_size // GRID * GRID
        if not self._store.exact or self.max_memory is not None or chunk < GRID:
            return False
        one = begin % chunk + total - begin < chunk + FEW
        return one and may_keep(self._store.model, self.cache, total - begin)


def _last_exact(total: int) -> int:
    """The last place from which a prompt of so many tokens continues with the same bits: a rest of few tokens runs
    with the tokens before it."""
    return max(total - FEW, 0) // GRID * GRID
