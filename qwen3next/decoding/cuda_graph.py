"""A step of decoding as one CUDA graph: the modules themselves, on buffers of fixed size and with no value on the host.

The step is the same function on every device; only CUDA captures it. It owns its buffers of recurrent states, updates
them in place and hands the cache a copy, because what a cache holds is shared with forks, snapshots and marks and never
changed. Keys and values are written into the cache's own buffer: where that moved, the step is captured again.
"""

import warnings
import weakref

import torch
from torch import Tensor

from layers.dispatch.backends import why_not as backend_why_not
from layers.gated_deltanet import DeltaNetState
from layers.kernels.experts import GATHERED, grouped_serves
from layers.moe import Experts
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from layers.state.static_kv_cache import StaticKVCache
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.guard import Guard
from qwen3next.decoding.protocol import Decodable
from qwen3next.decoding.why_not import why_not
from qwen3next.inputs import like

WARM_UP = 3  # runs before a capture, in which kernels are compiled and tuned

# By the id of a cache, which is not hashable: a graph is bound to its buffers and goes when the cache goes.
_graphs: "dict[int, tuple[weakref.ref[HybridCache], GraphStep]]" = {}


def graph_of(cache: HybridCache) -> "GraphStep | None":
    """The graph of a cache's steps, None where there is none. Copies of a cache begin without one."""
    found = _graphs.get(id(cache))
    return None if found is None or found[0]() is not cache else found[1]


def _set_graph(cache: HybridCache, graph: "GraphStep | None") -> None:
    if graph is None:
        _graphs.pop(id(cache), None)
        return
    key = id(cache)
    _graphs[key] = weakref.ref(cache, lambda _gone: _graphs.pop(key, None)), graph


def _cache_refused(model: Decodable, cache: HybridCache) -> str | None:
    if cache.history:
        return "the cache notes what each step writes: make it without history"
    if cache.kv_dtype == torch.int8:
        return "keys and values are in int8"
    experts = next((m for m in model.modules() if isinstance(m, Experts)), None)
    if experts is not None and cache.batch * model.config.num_experts_per_tok > GATHERED:
        x = like(model)
        if x.device.type == "cuda" and not grouped_serves(x, experts.down_proj):
            return f"so many rows' experts are grouped on the host in {x.dtype} on this GPU"
    return None


class GraphStep:
    """The step of one cache, one token a row. `prepare`, then `run`, at every step."""

    def __init__(self, model: Decodable, cache: HybridCache, guard: Guard):
        self.model, self.guard, device = model, guard, cache.tokens.device
        states = [s for s in cache.layers if isinstance(s, DeltaNetState)]
        # All layers' states in two tensors, so that a copy is two kernels.
        self._conv = torch.stack([s.conv for s in states]) if states else None
        self._memory = torch.stack([s.recurrent for s in states]) if states else None
        self._ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(cache.batch, dtype=torch.long, device=device)
        self._at: tuple[int, ...] | None = None  # what _position holds
        self._given: list[tuple[Tensor, Tensor]] = []  # what the buffers of states hold, as the cache got it
        self._buffers: list[tuple[Tensor, ...]] = []
        self._kv: list[StaticKVCache] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, cache: HybridCache, segments: Segments) -> None:
        """Hold what the cache holds; captured anew where its buffers moved."""
        buffers = [s.whole(segments) for s in cache.layers if isinstance(s, KVCache)]
        addresses = [[x.data_ptr() for x in pair] + [pair[0].shape[2]] for pair in buffers]
        if self._at is None or addresses != [[x.data_ptr() for x in p] + [p[0].shape[2]] for p in self._buffers]:
            self._bind(buffers)
        states = [s for s in cache.layers if isinstance(s, DeltaNetState)]
        same = len(self._given) == len(states) and all(
            s.conv is conv and s.recurrent is memory for s, (conv, memory) in zip(states, self._given, strict=True)
        )
        if not same and self._conv is not None and self._memory is not None:
            torch.stack([s.conv for s in states], out=self._conv)
            torch.stack([s.recurrent for s in states], out=self._memory)
        if segments.offsets != self._at:
            self._position.copy_(torch.tensor(segments.offsets))
        self._at, self._given = segments.offsets, [(s.conv, s.recurrent) for s in states]
        if self._graph is None and self._ids.device.type == "cuda":
            self._capture()

    def run(self, cache: HybridCache, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (b 1 width) after the final norm, good until the next step, and logits (b, vocab)."""
        assert self._at is not None
        after = tuple(n + 1 for n in self._at)
        self._at, self._given = None, []  # where this fails, nothing is known of the buffers
        self._ids.copy_(ids)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self._at = after
        if self._conv is not None and self._memory is not None:
            self._given = list(zip(self._conv.clone().unbind(), self._memory.clone().unbind(), strict=True))
        given = iter(self._given)
        cache.layers = [s if isinstance(s, KVCache) else DeltaNetState(*next(given)) for s in cache.layers]
        return self.hidden, self.logits[:, 0].clone()

    def _bind(self, buffers: list[tuple[Tensor, ...]]) -> None:
        self._graph, self._buffers = None, buffers
        self._kv = [StaticKVCache(pair[0], pair[1], self._position) for pair in buffers]
        places = buffers[0][0].shape[2] if buffers else 1
        everywhere = torch.arange(places, device=self._ids.device)[None]
        self._turns = self.model._rotation(everywhere, like(self.model).dtype)

    def _step(self) -> None:
        """What is captured: reads _ids, _position and the states, and leaves those of the next token."""
        model, kv, i = self.model, iter(self._kv), 0
        place = self._position.clamp(max=self._turns.cos.shape[1] - 1)
        rope = Rotation(*(x[0].index_select(0, place)[:, None] for x in self._turns))
        segments = Segments.full(self._ids)
        x = model.embed_tokens(self._ids)
        for block in model.blocks:
            if block.mixer == "full_attention":
                x, _ = block(x, rope, segments=segments, state=next(kv), stats=False)
                continue
            assert self._conv is not None
            assert self._memory is not None
            state = DeltaNetState(self._conv[i], self._memory[i])
            x, _ = block(x, rope, segments=segments, state=state, stats=False)
            self._conv[i].copy_(state.conv)
            self._memory[i].copy_(state.recurrent)
            i += 1
        self.hidden = model.norm(x)
        self.logits = model.lm_head(self.hidden)
        self._position.add_(1)

    def _capture(self) -> None:
        kept = [x for x in (self._conv, self._memory, self._position) if x is not None]
        before = [x.clone() for x in kept]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
                for x, old in zip(kept, before, strict=True):
                    x.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph


def graph_for(model: Decodable, segments: Segments, cache: HybridCache) -> GraphStep | None:
    """The graph, prepared, by which this step can run, None where it cannot.

    Raises: RuntimeError where a graph was asked for by name and cannot run.
    """
    slot, named, weight = model.plan_cache, model.decode_backend == "graph", like(model)
    if model.decode_backend not in ("auto", "graph") or segments.length != 1 or not segments.unpadded:
        return None
    if backend_why_not("decode", "graph", weight.device, weight.dtype) and not named:
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(weight.device.type):
        return None
    guard = slot.current(model)
    if "graph" not in slot.reasons:
        slot.reasons["graph"] = why_not(model, "graph")
    looks = "hooks are attached: model.set_backend('decode', 'auto') lets hooks in" if guard.hooked(model) else None
    reason = slot.reasons["graph"] or looks or _cache_refused(model, cache)
    if reason is None:
        reason = slot.reasons["graph"] = _prepared(model, segments, cache, guard)
        if reason is not None and not named:
            warnings.warn(f"Decoding runs without a CUDA graph: {reason}.", stacklevel=4)
    if reason is not None and named:
        raise RuntimeError(f"The 'graph' backend of decode cannot run here: {reason}.")
    return graph_of(cache) if reason is None else None


def _prepared(model: Decodable, segments: Segments, cache: HybridCache, guard: Guard) -> str | None:
    """Prepare the cache's graph for a step, captured anew after a change of the model; or why that failed."""
    graph = graph_of(cache)
    if graph is None or graph.guard is not guard:
        graph = GraphStep(model, cache, guard)
        _set_graph(cache, graph)
    try:
        graph.prepare(cache, segments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _set_graph(cache, None)
        return f"it could not be captured, as {str(error).splitlines()[0]}"
    return None
