"""One decoding step as one call into compiled code, on the CPU.

layers/cpp/decode.cpp does the arithmetic. A plan holds what it reads: the C structures that were filled from
the model's description (describe_model.py). It is kept in the model's `PlanCache`. Before every step a guard compares
the model with the state in which the plan was made (guard.py), so that a change acts on the next step.
"""

import ctypes
import threading

import torch
from torch import Tensor

from layers.cpp.operands import address, operand
from layers.cpp.step import DTYPES, kernels
from layers.segments import Segments
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.arguments import Arguments
from qwen3next.decoding.describe_model import describe
from qwen3next.decoding.guard import Guard
from qwen3next.decoding.protocol import Decodable
from qwen3next.decoding.rotations import Rotations
from qwen3next.decoding.states import States
from qwen3next.decoding.why_not import why_not
from qwen3next.inputs import like

MOST_TOKENS = 8  # new ones in a call, all rows together: beyond, matrix products in torch are faster


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

    def run(self, model: Decodable, ids: Tensor, segments: Segments, cache: HybridCache) -> tuple[Tensor, Tensor]:
        """Hidden states (b t width) after the final norm and logits (b, vocab); the cache's layers go on with ids."""
        b, t = ids.shape
        sizes, ends, dtype = self._arguments.sizes, self._arguments.ends, self._arguments.dtype
        ids = operand("input_ids", ids, (b, t), torch.int64)
        hidden = torch.empty(b, t, sizes.width, dtype=dtype)
        logits = torch.empty(b, ends.vocab, dtype=dtype)
        addresses = ctypes.c_void_p * (b * t)
        with self._lock:
            turns = [self.rotations.at(model, past + j) for past in segments.offsets for j in range(t)]
            sizes.b, sizes.t = b, t
            ends.ids, ends.hidden, ends.logits = ids.data_ptr(), hidden.data_ptr(), logits.data_ptr()
            written, _alive = self._states.point_to(cache, segments)
            kernels().decode_step(
                ctypes.byref(sizes),
                self._arguments.layers,
                ctypes.byref(ends),
                (ctypes.c_int64 * b)(*segments.offsets),
                addresses(*(cos.data_ptr() + offset for cos, _, offset in turns)),
                addresses(*(sin.data_ptr() + offset for _, sin, offset in turns)),
                torch.get_num_threads(),
            )
        for state in written:
            state.commit()
        return hidden, logits

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


class PlanCache:
    """Where a model keeps what its fast steps were made from. Addresses are no use to a copy: those begin without."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.plan: Plan | None = None
        self.reasons: dict[str, str | None] = {}  # by backend: why it cannot run, as long as the guard holds

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

    Raises: RuntimeError where compiled code was asked for by name and cannot run; ValueError for another model's cache.
    """
    slot: PlanCache = model.plan_cache
    named = model.decode_backend == "cpp"
    if (
        model.decode_backend in ("torch", "graph")
        or segments.batch * segments.length > MOST_TOKENS
        or not segments.unpadded
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or (like(model).device.type != "cpu" and not named)
    ):
        return None
    guard, refused = slot.current(model), "The 'cpp' backend of decode cannot run here:"
    if "cpp" not in slot.reasons:
        reason = why_not(model, "cpp")
        slot.plan = None if reason else Plan(model, guard)
        slot.reasons["cpp"] = reason
    if slot.plan is None:
        if named:
            raise RuntimeError(f"{refused} {slot.reasons['cpp']}.")
        return None
    if guard.hooked(model):
        if named:
            raise RuntimeError(
                "Compiled decoding shows nothing inside: model.set_backend('decode', 'auto') lets hooks in."
            )
        return None
    if slot.plan.supports(cache):
        return slot.plan
    if named:
        raise RuntimeError(f"{refused} the cache has a dtype that it does not know.")
    return None
