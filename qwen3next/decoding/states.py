"""What a compiled step reads and writes of its caches: recurrent states, and keys and values.

A recurrent state is shared with forks, snapshots and marks, so that the step writes the next one into new memory. Keys
and values are written into the buffer that the cache has reserved for them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from layers.cpp.operands import address, readable
from layers.cpp.step import DTYPES, KeysAndValues, Part, RecurrentState
from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.arguments import Arguments
from qwen3next.decoding.describe_model import FLOATS

# Bytes of the states of all layers that are allocated together. What is larger, the C library takes from the system and
# gives back at every step: 12,000 page faults, a third of the time, for 16 rows of 3 MB.
AT_ONCE = 4 * 2**20
OTHER_CACHE = "The cache was made for a model of other layers or sizes: make one with model.new_cache()."


class CacheStep(NamedTuple):
    """One cache's part of a step: token ids (b, t), the same number in each of its rows, behind what it holds."""

    cache: HybridCache
    segments: Segments
    ids: Tensor


class Written(NamedTuple):
    """What a step writes for a recurrent layer. It becomes the state once the step has succeeded."""

    state: DeltaNetState
    conv: Tensor
    memory: Tensor
    log: list[Tensor]  # what the update log takes: inputs, keys, deltas, decay; empty without one

    def commit(self) -> None:
        if self.state.update_log is not None:
            self.state.update_log.note(*self.log, compiled=True)
        self.state.conv, self.state.recurrent = self.conv, self.memory


class States:
    """Points a model's structures to the states of caches, call by call."""

    def __init__(self, arguments: Arguments):
        s, self._dtype = arguments.sizes, arguments.dtype
        self._layers = arguments.layers
        self._kv_size = s.kv_heads, s.head_dim
        self._conv_size = s.kernel_size - 1, 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim
        self._memory_size = s.value_heads, s.key_dim, s.value_dim
        self._log_shapes = (s.key_heads, s.key_dim), (s.value_heads, s.value_dim), (s.value_heads,)
        self._softmax = [bool(layer.softmax) for layer in self._layers]
        self._arrays: list[Any] = []  # a layer's states, one a cache
        self._make_room(1)

    def _make_room(self, caches: int) -> None:
        """Structures for so many caches, to which the layers point."""
        kinds = [KeysAndValues if softmax else RecurrentState for softmax in self._softmax]
        self._arrays = [(kind * caches)() for kind in kinds]
        for layer, softmax, array in zip(self._layers, self._softmax, self._arrays, strict=True):
            setattr(layer, "kv" if softmax else "recurrent", ctypes.addressof(array))

    def supports(self, cache: HybridCache) -> bool:
        """Whether compiled code knows the dtypes of a cache.

        Raises: ValueError for one whose states are of other kinds or sizes than this model's.
        """
        if len(cache.layers) != len(self._softmax):
            raise ValueError(OTHER_CACHE)
        b, known = cache.batch, True
        kv_size, conv_size, memory_size = (b, *self._kv_size), (b, *self._conv_size), (b, *self._memory_size)
        for state, softmax in zip(cache.layers, self._softmax, strict=True):
            if isinstance(state, KVCache):
                fits = softmax and state.size == kv_size
                known = known and state.dtype in DTYPES
            else:
                fits = not softmax and (state.conv.shape, state.recurrent.shape) == (conv_size, memory_size)
                known = known and state.conv.dtype == self._dtype and state.recurrent.dtype in FLOATS
            if not fits:
                raise ValueError(OTHER_CACHE)
        return known

    def point_to(self, steps: Sequence[CacheStep]) -> tuple[list[Written], list[object]]:
        """Fill the structures for one call.

        Returns: what the call writes for each recurrent layer, and what must stay alive until it returns.
        """
        if len(steps) > len(self._arrays[0]):
            self._make_room(2 * len(steps))
        written: list[Written] = []
        alive: list[object] = []
        for number, step in enumerate(steps):
            next_states = self._next_states(step.cache)
            for state, array in zip(step.cache.layers, self._arrays, strict=True):
                if isinstance(state, KVCache):
                    state.reserve(step.segments)
                    alive.append(point_to_keys(array[number], state))
                else:
                    after = next(next_states)
                    arguments, segments = array[number], step.segments
                    written.append(self._point_to_state(arguments, state, after, alive))
                    written[-1].log.extend(self._log(arguments, state, segments))
        return written, alive

    @staticmethod
    def _point_to_state(
        arguments: RecurrentState, state: DeltaNetState, after: tuple[Tensor, Tensor], alive: list[object]
    ) -> Written:
        before, arguments.conv_before = readable(state.conv)
        alive.append(before)
        before, arguments.before = readable(state.recurrent)
        alive.append(before)
        conv, memory = after
        arguments.conv_after, arguments.after = conv.data_ptr(), memory.data_ptr()
        arguments.dtype = DTYPES[memory.dtype]
        return Written(state, conv, memory, [])

    def _next_states(self, cache: HybridCache) -> Iterator[tuple[Tensor, Tensor]]:
        """New memory for the convolution and recurrent state of each layer that has them."""
        before = [state.recurrent for state in cache.layers if isinstance(state, DeltaNetState)]
        if not before:
            return iter(())
        b, dtype = cache.batch, before[0].dtype
        conv = torch.empty(len(before), b, *self._conv_size, dtype=self._dtype).unbind()
        if before[0].nbytes * len(before) > AT_ONCE or any([memory.dtype != dtype for memory in before]):
            return zip(conv, [memory.new_empty(memory.shape) for memory in before], strict=True)
        return zip(conv, torch.empty(len(before), b, *self._memory_size, dtype=dtype).unbind(), strict=True)

    def _log(self, arguments: RecurrentState, state: DeltaNetState, segments: Segments) -> list[Tensor]:
        """Tensors that the step fills for the update log, with the structure pointing to them; none without a log."""
        if state.update_log is None:
            arguments.log_inputs = arguments.log_keys = arguments.log_deltas = arguments.log_decay = None
            return []
        b, t = segments.batch, segments.length
        exact = torch.float64 if self._dtype == torch.float64 else torch.float32
        inputs = torch.empty(b, t, self._conv_size[1], dtype=self._dtype)
        log = [inputs, *(torch.empty(b, t, *shape, dtype=exact) for shape in self._log_shapes)]
        arguments.log_inputs, arguments.log_keys, arguments.log_deltas, arguments.log_decay = (
            x.data_ptr() for x in log
        )
        return log


def point_to_keys(arguments: KeysAndValues, state: KVCache) -> object:
    """Point a structure to a state that has room for a call. Returns: what must stay alive until that call returns."""
    if state.native is None:
        state.native = Parts(state)
    parts = cast("Parts", state.native)
    arguments.parts, arguments.count, arguments.dtype = parts.address, parts.count, DTYPES[state.dtype]
    return parts


class Parts:
    """A state's keys and values as C++ finds them. Valid while the state has the same buffers; keeps them alive."""

    def __init__(self, state: KVCache):
        self._held = state.parts(0, state.capacity)
        self._array = (Part * len(self._held))(*(_part(stored, state) for stored in self._held))
        self.address, self.count = ctypes.addressof(self._array), len(self._array)

    def __deepcopy__(self, _memo: dict) -> None:
        """Addresses are no use to a copy."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def _part(stored: tuple[Tensor, ...], state: KVCache) -> Part:
    k, v, *scales = stored
    batch, kv_heads, d = state.size
    n = k.shape[2]
    part = Part(address(k), address(v), n=n, row=k.stride(0), head=k.stride(1))
    good = k.shape == v.shape == (batch, kv_heads, n, d) and k.stride() == v.stride() and k.stride()[2:] == (d, 1)
    if scales:
        part.k_scale, part.v_scale = map(address, scales)
        part.scale_row, part.scale_head = scales[0].stride(0), scales[0].stride(1)
        good = good and all(x.shape == (batch, kv_heads, n, 1) and x.dtype == torch.float32 for x in scales)
        good = good and scales[0].stride() == scales[1].stride() and scales[0].stride(2) == 1
    assert good
    assert k.dtype == v.dtype == state.dtype
    return part
