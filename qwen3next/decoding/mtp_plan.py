"""The MTP layer in compiled code, on the CPU: drafts, and the keys and values that later drafts need.

A step only notes the pairs that its tokens complete. They are written into the layer's cache when it is next read, by a
draft, a fork or a file. By then it is known which tokens were accepted. Steps without drafts write nothing.
The keys and values do not depend on when they are written, or on how the tokens were divided over calls.
"""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.cpp.operands import operand, readable
from layers.cpp.step import DTYPES, KeysAndValues, Row, kernels
from layers.dispatch.backends import why_not as backend_why_not
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.arguments import Arguments
from qwen3next.decoding.describe_model import ENDS, Unsupported, describe_mtp
from qwen3next.decoding.guard import Guard
from qwen3next.decoding.plan import MOST_TOKENS, call_of
from qwen3next.decoding.protocol import Decodable
from qwen3next.decoding.rotations import Rotations
from qwen3next.decoding.states import point_to_keys
from qwen3next.inputs import like
from qwen3next.mtp import MTP

_METHODS = MTP.remember, MTP._pairs  # one that was replaced must be called
Turn = tuple[Tensor, Tensor, int]  # of one position, as `Rotations.at` gives it


class MTPPlan:
    """A model's MTP layer in compiled code. Valid while its guard is, which keeps the weights alive."""

    def __init__(self, model: Decodable, guard: Guard):
        """Raises: Unsupported where compiled code cannot run the layer; ValueError for a weight without its memory."""
        self.guard, self._arguments = guard, Arguments(describe_mtp(model))
        self.rotations = Rotations(self._arguments.dtype)
        self._kv = KeysAndValues()
        self._arguments.layers[0].kv = ctypes.addressof(self._kv)
        self._lock = threading.Lock()  # the structures are filled anew for every call

    def supports(self, state: KVCache) -> bool:
        """Whether compiled code knows the sizes and the dtype of the layer's cache."""
        s = self._arguments.sizes
        return state.size[1:] == (s.kv_heads, s.head_dim) and state.dtype in DTYPES

    def draft(self, model: Decodable, cache: HybridCache, token: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The most likely `count` tokens (b, count) behind `token` (b,), and the logits (b, vocab) of the last.

        Their keys and values are written behind those that count, where the next pairs overwrite them.
        """
        state, hidden, b = cache.mtp, cache.hidden, cache.batch
        assert state is not None
        assert hidden is not None
        past = [n - 1 for n in cache.lengths]
        with self._lock:
            turns = [self.rotations.at(model, place + j) for j in range(count) for place in past]
        hidden = operand("hidden", hidden, (b, self._arguments.sizes.width), self._arguments.dtype)
        token = operand("token", token, (b,), torch.int64)
        after, drafts = torch.empty_like(hidden), torch.empty(b, count, dtype=torch.int64)
        logits = hidden.new_empty(b, self._arguments.ends.vocab)
        rows = [Row(0, r, r, 1, place) for r, place in enumerate(past)]
        with self._lock:
            state.reserve(Segments(b, count, token.device, None, b, tuple(past)))
            _kept = point_to_keys(self._kv, state)
            call, _held = call_of(rows, token, turns, range(b))
            call.hidden, call.logits = after.data_ptr(), logits.data_ptr()
            _before, address = readable(hidden)
            kernels().draft(*self._model(call), address, count, drafts.data_ptr(), torch.get_num_threads())
        return drafts, logits

    def remember(self, state: KVCache, held: Sequence[int], runs: Sequence["Run"], ids: Tensor, hidden: Tensor) -> None:
        """Write keys and values of pairs: tokens `ids` (n,) and the hidden states (n, width) before them, run by run.

        Args:
            held: pairs of each row that are there already.
        """
        rows, first = [], 0
        for run in runs:
            rows.append(Row(0, run.row, first, len(run.turns), run.place))
            first += len(run.turns)
        hidden = operand("hidden", hidden, (first, self._arguments.sizes.width), self._arguments.dtype)
        ids = operand("ids", ids, (first,), torch.int64)
        end = max(run.place + len(run.turns) for run in runs)
        with self._lock:
            ragged = len(set(held)) > 1
            state.reserve_places(min(run.place for run in runs), max(held), end, in_one=ragged)
            _kept = point_to_keys(self._kv, state)
            call, _held = call_of(rows, ids, [turn for run in runs for turn in run.turns], ())
            _before, address = readable(hidden)
            kernels().remember_pairs(*self._model(call), address, torch.get_num_threads())

    def _model(self, call: ctypes.Structure) -> tuple[object, ...]:
        arguments = self._arguments
        parts = arguments.sizes, arguments.layers[0], arguments.ends, call
        return tuple(ctypes.byref(part) for part in parts)


@dataclass
class Run:
    """Pairs at neighbouring places of a row, from `place` on; `turns` has the rotation of each."""

    row: int
    place: int
    turns: list[Turn]


@dataclass
class Noted:
    """The pairs of one call.

    Attributes:
        places: of each row's first pair, −1 where its first token has none before it.
        hidden: (b, t, width) before each of the call's tokens.
        turns: of each row's places.
    """

    places: tuple[int, ...]
    hidden: Tensor
    turns: list[list[Turn]]


class WaitingPairs:
    """Pairs of a cache that its tokens completed and that are not written yet, in the order of the calls.

    They are written by the plan of their calls, which keeps the weights of that time alive.
    """

    def __init__(self, plan: MTPPlan):
        self.plan, self._calls, self.tokens = plan, list[Noted](), 0

    def add(self, model: Decodable, segments: Segments, before: Tensor | None, hidden: Tensor) -> None:
        """Note a call's pairs.

        Args:
            before: (b, width) hidden states before the call, None before the first token.
            hidden: (b, t, width) of the call.
        """
        first = torch.zeros_like(hidden[:, :1]) if before is None else before[:, None]
        hidden = first if segments.length == 1 else torch.cat((first, hidden[:, :-1]), dim=1)
        places, t = tuple(n - 1 for n in segments.offsets), segments.length
        with self.plan._lock:
            turns = [[self.plan.rotations.at(model, max(p + j, 0)) for j in range(t)] for p in places]
        self._calls.append(Noted(places, hidden, turns))
        self.tokens += t

    def write(self, state: KVCache, lengths: Sequence[int], tokens: Tensor) -> None:
        """Write the pairs of the tokens that the cache still holds, `lengths` of `tokens` (b, max_len)."""
        ends = [max(n - 1, 0) for n in lengths]
        first, turns, hidden = ends.copy(), [list[Turn]() for _ in ends], [list[Tensor]() for _ in ends]
        for noted in reversed(self._calls):  # what a later call wrote replaces what was taken back
            for row, place in enumerate(noted.places):
                begin, end = max(place, 0), min(first[row], place + len(noted.turns[row]))
                if begin < end:
                    turns[row] = noted.turns[row][begin - place : end - place] + turns[row]
                    hidden[row].append(noted.hidden[row, begin - place : end - place])
                first[row] = min(first[row], begin)
        runs = [Run(row, first[row], turns[row]) for row in range(len(ends)) if turns[row]]
        if runs:
            ids = torch.cat([tokens[run.row, run.place + 1 : run.place + 1 + len(run.turns)] for run in runs])
            found = torch.cat([part for row in hidden for part in reversed(row)])
            self.plan.remember(state, first, runs, ids, found)


def note_pairs(model: Decodable, cache: HybridCache, segments: Segments, hidden: Tensor) -> bool:
    """Note the pairs that a step completes; whether compiled code can write them later. To be called before it ends."""
    state = cache.unwritten_mtp
    plan = None if state is None else available_mtp_plan(model)
    if plan is None or state is None or not plan.supports(state):
        return False
    waiting = cache.waiting_pairs
    if not isinstance(waiting, WaitingPairs) or waiting.plan is not plan or waiting.tokens >= MOST_TOKENS:
        cache.write_pairs()
        waiting = cache.waiting_pairs = WaitingPairs(plan)
    waiting.add(model, segments, cache.hidden, hidden)
    return True


class _Kept:
    """What a model keeps of its MTP layer as long as the guard holds: a plan, or why there is none."""

    def __init__(self, model: Decodable):
        assert model.mtp is not None
        self.guard = Guard(model, [*model.mtp.modules(), *(getattr(model, name) for name in ENDS)])
        self.plan: MTPPlan | None = None
        self.reason: str | None = None
        try:
            self.plan = MTPPlan(model, self.guard)
        except (Unsupported, ValueError) as reason:
            self.reason = str(reason).rstrip(".")


def _kept_or_reason(model: Decodable) -> _Kept | str:
    """What is kept of the layer, if compiled code can run it as it stands; else why not, without a full stop."""
    if model.mtp is None:
        return "the model has no MTP layer"
    weight, slot = like(model), model.plan_cache
    if model.decode_backend in ("torch", "graph"):
        return f"the backend of decode is {model.decode_backend}"
    if reason := backend_why_not("decode", "cpp", weight.device, weight.dtype):
        return reason
    if (MTP.remember, MTP._pairs) != _METHODS:
        return "a method of MTP was replaced"
    if slot.mtp is None or not slot.mtp.guard.is_valid(model):
        slot.mtp = None  # before another is made: what it keeps alive may be large
        slot.mtp = _Kept(model)
    kept: _Kept = slot.mtp
    if kept.reason:
        return kept.reason
    hooked = kept.guard.hooked(model) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return "hooks are attached, or a backend was chosen" if hooked else kept


def why_not_draft(model: Decodable) -> str | None:
    """Why the MTP layer cannot run in compiled code, as a sentence without a full stop, or None."""
    found = _kept_or_reason(model)
    return found if isinstance(found, str) else None


def available_mtp_plan(model: Decodable) -> MTPPlan | None:
    """The plan by which the MTP layer can run as it stands, None where it cannot."""
    found = _kept_or_reason(model)
    return None if isinstance(found, str) else found.plan
