"""A step of decoding as one CUDA graph, on buffers of fixed size and with no value on the host.

What is captured is a `TokenStep`, a few kernels a layer, where it knows the model and its kernels run; else the modules
themselves. The step is the same function on every device; only CUDA captures it. Recurrent states stay in the graph's
memory and are lent to the cache (graph_states.py). Keys and values are written into the cache's own buffer: where that
moved, the step is captured again.
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
from qwen3next.decoding.graph_states import GraphStates
from qwen3next.decoding.guard import Guard
from qwen3next.decoding.protocol import Decodable
from qwen3next.decoding.token_step import TokenStep, cache_refused, why_not_kernels
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


def _cache_refused(model: Decodable, cache: HybridCache, *, kernels: bool) -> str | None:
    if cache.history:
        return "the cache notes what each step writes: make it without history"
    if cache.kv_dtype == torch.int8:
        return "keys and values are in int8"
    if kernels:
        return None
    experts = next((m for m in model.modules() if isinstance(m, Experts)), None)
    if experts is not None and cache.batch * model.config.num_experts_per_tok > GATHERED:
        x = like(model)
        if x.device.type == "cuda" and not grouped_serves(x, experts.down_proj):
            return f"so many rows' experts are grouped on the host in {x.dtype} on this GPU"
    return None


class GraphStep:
    """The step of one cache, one token a row. `prepare`, then `run`, at every step.

    Args:
        tokens: the operations to capture in the modules' place; None captures the modules.
    """

    @torch.inference_mode(False)  # memory made inside that mode could not be written to outside it
    def __init__(self, model: Decodable, cache: HybridCache, guard: Guard, tokens: TokenStep | None = None):
        self.model, self.guard, self.tokens, device = model, guard, tokens, cache.tokens.device
        states = [s for s in cache.layers if isinstance(s, DeltaNetState)]
        self._states = GraphStates(states) if states else None
        self._ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(cache.batch, dtype=torch.long, device=device)
        self._at: tuple[int, ...] | None = None  # what _position holds
        self._addresses: list[tuple[int, ...]] | None = None  # of the buffers that are bound
        self._kv: list[StaticKVCache] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, cache: HybridCache, segments: Segments) -> None:
        """Hold what the cache holds; captured anew where its buffers moved."""
        buffers = [_doubled(s, segments) for s in cache.layers if isinstance(s, KVCache)]
        addresses = [(*(x.data_ptr() for x in pair), pair[0].shape[2]) for pair in buffers]
        if addresses != self._addresses:
            self._bind(buffers)
            self._addresses = addresses
        if self._states is not None:
            self._states.hold([s for s in cache.layers if isinstance(s, DeltaNetState)])
        if segments.offsets != self._at:
            self._position.copy_(torch.tensor(segments.offsets))
        self._at = segments.offsets
        if self._graph is None and self._ids.device.type == "cuda":
            self._capture()

    def run(self, cache: HybridCache, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (b 1 width) after the final norm, good until the next step, and logits (b, vocab)."""
        assert self._at is not None
        after = tuple(n + 1 for n in self._at)
        self._at = None  # where this fails, nothing is known of the position
        if self._states is not None:
            self._states.begin()
        self._ids.copy_(ids)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self._at = after
        lent = iter(() if self._states is None else self._states.lend())
        cache.layers = [s if isinstance(s, KVCache) else next(lent) for s in cache.layers]
        return self.hidden, self.logits.clone()

    def _bind(self, buffers: list[tuple[Tensor, ...]]) -> None:
        self._graph = None
        self._kv = [StaticKVCache(pair[0], pair[1], self._position) for pair in buffers]
        places = buffers[0][0].shape[2] if buffers else 1
        everywhere = torch.arange(places, device=self._ids.device)[None]
        self._turns = self.model._rotation(everywhere, like(self.model).dtype)

    def _step(self) -> None:
        """What is captured: reads _ids, _position and the states, and leaves those of the next token."""
        if self.tokens is not None:
            buffers = [(kv.k, kv.v) for kv in self._kv]
            hidden, self.logits = self.tokens(self._ids, self._position, self._turns, self._states, buffers)
            self.hidden = hidden[:, None]
        else:
            self.hidden = self._by_modules()
            self.logits = self.model.lm_head(self.hidden)[:, 0]
        self._position.add_(1)
        if self._states is not None:
            self._states.side.bitwise_xor_(1)

    def _by_modules(self) -> Tensor:
        model, kv, i = self.model, iter(self._kv), 0
        place = self._position.clamp(max=self._turns.cos.shape[1] - 1)
        rope = Rotation(*(x[0].index_select(0, place)[:, None] for x in self._turns))
        segments = Segments.full(self._ids)
        x = model.embed_tokens(self._ids)
        for block in model.blocks:
            if block.mixer == "full_attention":
                x, _ = block(x, rope, segments=segments, state=next(kv), stats=False)
                continue
            assert self._states is not None
            state = self._states.present(i)
            x, _ = block(x, rope, segments=segments, state=state, stats=False)
            self._states.put(i, state)
            i += 1
        return model.norm(x)

    def _capture(self) -> None:
        kept = [self._position] + ([] if self._states is None else [self._states.side])
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


def _doubled(state: KVCache, segments: Segments) -> tuple[Tensor, ...]:
    """The buffer of a softmax layer with room for the step; one that is full doubles, as each move costs a capture."""
    end = max(segments.ends)
    if end > state.capacity > 0:
        room = min(state.max_len, 2 * state.capacity)
        if room > end:
            length = segments.length + room - end
            offsets = segments.offsets
            segments = Segments(segments.batch, length, segments.device, None, segments.batch, offsets)
    return state.whole(segments)


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
    if "kernels" not in slot.reasons:
        slot.reasons["kernels"] = why_not_kernels(model, weight.device, weight.dtype)
    kernels = slot.reasons["kernels"] is None and cache_refused(cache) is None
    reason = slot.reasons["graph"] or looks or _cache_refused(model, cache, kernels=kernels)
    if reason is None:
        reason = slot.reasons["graph"] = _prepared(model, segments, cache, guard, kernels=kernels)
        if reason is not None and not named:
            warnings.warn(f"Decoding runs without a CUDA graph: {reason}.", stacklevel=4)
    if reason is not None and named:
        raise RuntimeError(f"The 'graph' backend of decode cannot run here: {reason}.")
    return graph_of(cache) if reason is None else None


def _prepared(model: Decodable, segments: Segments, cache: HybridCache, guard: Guard, *, kernels: bool) -> str | None:
    """Prepare the cache's graph for a step, captured anew after a change of the model; or why that failed."""
    graph = graph_of(cache)
    if graph is None or graph.guard is not guard:
        graph = GraphStep(model, cache, guard, TokenStep(model, "triton") if kernels else None)
        _set_graph(cache, graph)
    try:
        graph.prepare(cache, segments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _set_graph(cache, None)
        return f"it could not be captured, as {str(error).splitlines()[0]}"
    return None
