"""One decoding step as one call into compiled code, on the CPU.

layers/cpp/decode.cpp does the arithmetic. A plan holds what it reads: the C structures that were filled from
the model's description (describe_model.py). It is kept in the model's `PlanCache`. Before every step a guard compares
the model with the state in which the plan was made (guard.py), so that a change acts on the next step.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layers.cpp.operands import address, operand
from layers.cpp.step import DTYPES, Call, Row, kernels
from layers.segments import Segments
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.arguments import Arguments
from qwen3next.decoding.describe_model import describe
from qwen3next.decoding.guard import Guard
from qwen3next.decoding.protocol import Decodable
from qwen3next.decoding.rotations import Rotations
from qwen3next.decoding.states import CacheStep, States
from qwen3next.decoding.why_not import why_not
from qwen3next.inputs import like

REFUSED = "The 'cpp' backend of decode cannot run here:"
MOST_TOKENS = 64  # new ones of a row: beyond, chunks and larger matrix products in torch are faster


class Plan:
    """A model's step in compiled code. Valid while its guard is, which keeps the weights alive."""

    def __init__(self, model: Decodable, guard: Guard):
        """Raises: Unsupported where compiled code cannot run the model; ValueError for a weight without its memory."""
        self.guard, self._arguments = guard, Arguments(describe(model))
        self._states = States(self._arguments)
        self.rotations = Rotations(self._arguments.dtype)
        self._lock = threading.Lock()  # the structures are filled anew for every call

    def supports(self, cache: HybridCache) -> bool:
        """Whether a cache is in dtypes that compiled code knows. Raises: ValueError for another model's cache."""
        return self._states.supports(cache)

    def run(
        self, model: Decodable, steps: Sequence[CacheStep], *, all_logits: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Extend the states of caches by tokens of theirs; each weight is read once for all of them.

        A row's results are the same, to the bit, whatever the other rows are and however its tokens are divided over
        calls (but for recurrent states kept in less than the arithmetic's dtype, which every call rounds).

        Returns: hidden states (b t width) of each cache after the final norm, and logits (n, vocab) after each row's
            last token, or with `all_logits` after every token, row by row.
        """
        ids = [operand("input_ids", step.ids, tuple(step.ids.shape), torch.int64) for step in steps]
        joined = ids[0] if len(ids) == 1 else torch.cat([x.flatten() for x in ids])
        rows, n = _rows(steps), joined.numel()
        wanted = range(n) if all_logits else [row.first + row.count - 1 for row in rows]
        hidden = torch.empty(n, self._arguments.sizes.width, dtype=self._arguments.dtype)
        logits = torch.empty(len(wanted), self._arguments.ends.vocab, dtype=self._arguments.dtype)
        with self._lock:
            turns = [self.rotations.at(model, row.past + j) for row in rows for j in range(row.count)]
            written, _alive = self._states.point_to(steps)
            call, _held = call_of(rows, joined, turns, wanted)
            call.hidden, call.logits = hidden.data_ptr(), logits.data_ptr()
            kernels().decode_step(
                ctypes.byref(self._arguments.sizes),
                self._arguments.layers,
                ctypes.byref(self._arguments.ends),
                ctypes.byref(call),
                torch.get_num_threads(),
            )
        for state in written:
            state.commit()
        parts = hidden.split([x.numel() for x in ids])
        return [part.view(*x.shape, -1) for part, x in zip(parts, ids, strict=True)], logits

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (b, vocab) of hidden states (b, width) after the final norm."""
        width, ends, dtype = self._arguments.sizes.width, self._arguments.ends, self._arguments.dtype
        if hidden.shape[1:] != (width,) or hidden.dtype != dtype:
            raise ValueError(
                f"The head reads hidden states (b, {width}) in {dtype}, not {tuple(hidden.shape)} in {hidden.dtype}."
            )
        hidden = hidden.contiguous()
        logits = hidden.new_empty(len(hidden), ends.vocab)
        kernels().linear(
            ctypes.byref(ends.head),
            ends.vocab,
            width,
            len(hidden),
            address(hidden),
            logits.data_ptr(),
            DTYPES[dtype],
            torch.get_num_threads(),
        )
        return logits


def _rows(steps: Sequence[CacheStep]) -> list[Row]:
    """The rows of all caches."""
    rows: list[Row] = []
    first = 0
    for number, step in enumerate(steps):
        count = step.segments.length
        for index, past in enumerate(step.segments.offsets):
            rows.append(Row(number, index, first, count, past))
            first += count
    return rows


def call_of(
    rows: list[Row], ids: Tensor, turns: list[tuple[Tensor, Tensor, int]], wanted: Sequence[int]
) -> tuple[Call, object]:
    """The arguments of a call but for its results, and what must stay alive until it returns."""
    addresses = ctypes.c_void_p * len(turns)
    array, numbers = (Row * len(rows))(*rows), (ctypes.c_int64 * len(wanted))(*wanted)
    cos = addresses(*(table.data_ptr() + offset for table, _, offset in turns))
    sin = addresses(*(table.data_ptr() + offset for _, table, offset in turns))
    at_rows, at_cos, at_sin, at_wanted = (ctypes.addressof(x) for x in (array, cos, sin, numbers))
    call = Call(at_rows, len(rows), ids.data_ptr(), at_cos, at_sin, at_wanted, len(wanted))
    return call, (array, ids, turns, cos, sin, numbers)


class PlanCache:
    """Where a model keeps what its fast steps were made from. Addresses are no use to a copy: those begin without."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.plan: Plan | None = None
        self.reasons: dict[str, str | None] = {}  # by backend: why it cannot run, as long as the guard holds
        self.mtp: Any = None  # the same for the MTP layer (mtp_plan.py)

    def current(self, model: Decodable) -> Guard:
        """The guard of the model as it is; what was made for another is forgotten."""
        if self.guard is None or not self.guard.is_valid(model):
            self.guard = self.plan = None  # before another is made: what they keep alive may be large
            self.reasons = {}
            self.guard = Guard(model)
        return self.guard

    def __deepcopy__(self, _memo: dict) -> "PlanCache":
        return PlanCache()

    def __reduce__(self) -> tuple:
        return PlanCache, ()


def plan_for(model: Decodable, segments: Segments, cache: HybridCache) -> Plan | None:
    """The plan by which this step can run, None where it cannot.

    Raises: as `available_plan`; RuntimeError also for a cache of a dtype that compiled code does not know.
    """
    if segments.length > MOST_TOKENS or not segments.unpadded:
        return None
    plan = available_plan(model)
    if plan is None or plan.supports(cache):
        return plan
    if model.decode_backend == "cpp":
        raise RuntimeError(f"{REFUSED} the cache has a dtype that it does not know.")
    return None


def available_plan(model: Decodable) -> Plan | None:
    """The plan by which the model can run steps as it stands, None where it cannot.

    Raises: RuntimeError where compiled code was asked for by name and cannot run.
    """
    slot: PlanCache = model.plan_cache
    named = model.decode_backend == "cpp"
    if (
        model.decode_backend in ("torch", "graph")
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or (like(model).device.type != "cpu" and not named)
    ):
        return None
    guard = slot.current(model)
    if "cpp" not in slot.reasons:
        reason = why_not(model, "cpp")
        slot.plan = None if reason else Plan(model, guard)
        slot.reasons["cpp"] = reason
    if slot.plan is None:
        if named:
            raise RuntimeError(f"{REFUSED} {slot.reasons['cpp']}.")
        return None
    if guard.hooked(model):
        if named:
            raise RuntimeError(
                "Compiled decoding shows nothing inside: model.set_backend('decode', 'auto') lets hooks in."
            )
        return None
    return slot.plan
