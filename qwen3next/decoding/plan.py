"""One decoding step as one call into compiled code, on the CPU: the plan of a model's weights, and when it applies.

layers/kernels/cpp/decode.cpp does the arithmetic. This file describes the model to it, and states when it may replace
the modules: no hook or tracer is attached, no module was replaced, and every part is of a kind that it knows. A guard
(qwen3next/decoding/guard.py) compares the model with the plan before every step.
"""

import ctypes
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import why_not as choose_reason
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import DeltaNetState, GatedDeltaNet
from layers.hook_point import HookPoint
from layers.kernels.cpp.operands import address, operand, side_by_side
from layers.kernels.cpp.step import DTYPES, Ends, Layer, Mat, Part, Sizes, kernels
from layers.linear import Linear
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from layers.norm import GatedRMSNorm, RMSNorm
from layers.segments import Segments
from layers.state.kv_cache import KVState
from qwen3next.block import Block
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.guard import CALLS, Guard

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

MOST_TOKENS = 8  # new ones in a call, all rows together: beyond, matrix products in torch are faster
OTHER_CACHE = "The cache was made for a model of other layers or sizes: make one with model.new_cache()."
TABLE = 64  # positions whose rotation is computed at a time
KNOWN = (
    nn.Linear,
    Linear,
    RMSNorm,
    GatedRMSNorm,
    GatedDeltaNet,
    GatedAttention,
    SwiGLU,
    SparseMoE,
    Experts,
    Block,
    nn.Identity,
    nn.ModuleList,
    HookPoint,
)
FLOATS = (torch.float32, torch.bfloat16, torch.float64)
# How their classes were called when this was loaded: who replaces that wants to be called.
CALLED = {kind: CALLS(kind) for kind in (*KNOWN, nn.Embedding)}
LINEAR, EMBEDDING, NORM = (nn.Linear, Linear), (nn.Embedding,), (RMSNorm,)
PARTS = {"embed_tokens": EMBEDDING, "norm": NORM, "lm_head": LINEAR}


def why_not(model: "Qwen3Next", device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why a model's steps cannot run in compiled code as it stands, in a sentence without a full stop, or None.

    Args:
        device, dtype: answer as if it were there and so.
    """
    weight = like(model)
    where, kind = weight.device if device is None else device, weight.dtype if dtype is None else dtype
    if reason := choose_reason("decode", "cpp", where, kind):
        return reason
    try:
        return unknown_module(model) or _unlike(model) or _unknown_weight(model)
    except (AttributeError, AssertionError, IndexError) as error:  # what a module of that name has here, another lacks
        return f"a module is not in its place ({error})"


def _unknown_weight(model: "Qwen3Next") -> str | None:
    """The first weight that a step would leave out or misread, in a sentence, or None."""
    used = {id(x.tensor): x for x in _all_weights(model)}
    for name, parameter in (*model.blocks.named_parameters(prefix="blocks"), *_outer_parameters(model)):
        if id(parameter) not in used:
            return f"{name} is a weight that it does not know"
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, and it knows nn.Parameter alone"
        device = like(model).device
        if not parameter.is_contiguous() or parameter.dtype not in FLOATS or parameter.device != device:
            return f"{name} is not contiguous, elsewhere, or of a dtype that it does not know"
        if parameter.is_floating_point() and parameter.is_neg():
            return f"{name} is a view that negates"
    sizes = _sizes(model)
    for x in _all_weights(model):
        if x.gate_rows not in (0, 1, sizes.head_dim):
            return f"{x.where} is beside a gate of {x.gate_rows} rows a head"
        expected = _shapes(sizes, x.gate_rows, x.sparse)[x.name]
        if x.tensor is not None and not _fits(x.tensor.shape, expected):
            return f"{x.where} has the shape {tuple(x.tensor.shape)} where it expects {expected}"
    if sizes.rotary > sizes.head_dim or sizes.rotary % 2:
        return f"RoPE turns {sizes.rotary} of {sizes.head_dim} numbers a head"
    if len(model.embed_tokens.weight) < model.vocab_size:
        return f"embed_tokens has {len(model.embed_tokens.weight)} rows and the vocabulary {model.vocab_size} tokens"
    return None


def like(model: "Qwen3Next") -> Tensor:
    """A tensor of the model's device and dtype, whatever stands in the place of its embedding."""
    weight = getattr(model.embed_tokens, "weight", None)
    return weight if isinstance(weight, Tensor) else next(model.parameters())


def unknown_module(model: "Qwen3Next") -> str | None:
    """The first module that the default model does not have in its place, in a sentence, or None."""
    for name, kinds in PARTS.items():
        module = getattr(model, name)
        if type(module) not in kinds:
            return f"{name} is a {type(module).__name__}, which it does not know"
        if CALLS(type(module)) != CALLED[type(module)]:
            return f"the forward of {type(module).__name__} was replaced"
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if type(module) not in KNOWN:
            return f"{name} is a {type(module).__name__}, which it does not know"
        if CALLS(type(module)) != CALLED[type(module)]:
            return f"the forward of {type(module).__name__} was replaced"
    return None


def _unlike(model: "Qwen3Next") -> str | None:
    """Where a setting differs from what a step takes for all layers, in a sentence, or None."""
    if model.lm_head.bias is not None:
        return "lm_head has a bias"
    if model.embed_tokens.max_norm is not None:
        return "embed_tokens limits its norms"
    blocks = [module for module in model.blocks.modules() if isinstance(module, Block)]
    if len(blocks) != len(model.blocks) or not blocks:
        return "blocks holds something else than blocks"
    modules = [*model.blocks.modules(), model.norm]
    alike: dict[type, tuple[str, ...]] = {
        RMSNorm: ("eps", "zero_centred"),
        GatedRMSNorm: ("eps", "activation"),
        GatedDeltaNet: ("key_heads", "value_heads", "key_dim", "value_dim", "rule"),
        GatedAttention: ("heads", "kv_heads", "head_dim"),
        SparseMoE: ("top_k", "renormalise"),
    }
    for kind, names in alike.items():
        for name in names:
            found = {getattr(module, name) for module in modules if type(module) is kind}
            if len(found) > 1:
                return f"{kind.__name__}.{name} is not the same in all layers"
    for module in modules:
        if isinstance(module, SparseMoE) and module.shared_expert is None:
            return "a layer has no shared expert, and it knows experts with one"
        if isinstance(module, SparseMoE) and not 1 <= module.top_k <= len(module.router.weight):
            return f"a layer routes to {module.top_k} of {len(module.router.weight)} experts"
        if isinstance(module, GatedDeltaNet) and module.rule is not gated_delta_rule:
            return "a layer has another rule than the gated delta rule"
        if isinstance(module, GatedDeltaNet) and module.value_heads % module.key_heads:
            return "value heads cannot share key heads"
        if isinstance(module, GatedAttention) and module.heads % module.kv_heads:
            return "query heads cannot share key heads"
        if isinstance(module, GatedRMSNorm) and (module.activation != "silu" or module.eps != model.norm.eps):
            return "a gated norm has another activation or eps"
        if isinstance(module, (Linear, nn.Linear)) and module.weight.ndim != 2:
            return "a linear map's weight is no matrix"
    return None


def _outer_parameters(model: "Qwen3Next") -> Iterator[tuple[str, nn.Parameter]]:
    for part in PARTS:
        yield from getattr(model, part).named_parameters(prefix=part)


class Weight(NamedTuple):
    """A weight as compiled code knows it: `name` of `Layer` or `Ends`, and `where` it is in the model."""

    name: str
    where: str
    tensor: Tensor | None
    gate_rows: int = 0
    sparse: bool = False


def _all_weights(model: "Qwen3Next") -> Iterator[Weight]:
    """All weights that a step multiplies with."""
    yield Weight("embedding", "embed_tokens.weight", model.embed_tokens.weight)
    yield Weight("norm", "norm.weight", model.norm.weight)
    yield Weight("head", "lm_head.weight", model.lm_head.weight)
    for i, module in enumerate(model.blocks):
        block = cast("Block", module)
        rows, sparse = _gate_rows(block), isinstance(block.mlp, SparseMoE)
        for name, tensor in _weights(block).items():
            yield Weight(name, f"{name} of blocks.{i}", tensor, rows, sparse)


def _gate_rows(block: Block) -> int:
    """Rows of the gate's projection a head."""
    if block.mixer != "full_attention" or block.self_attn.gate_proj is None:
        return 0
    return len(block.self_attn.gate_proj.weight) // block.self_attn.heads


def _sizes(model: "Qwen3Next") -> Sizes:
    """What all layers have in common, read off the modules."""

    def first(kind: type) -> Any:
        return next((module for module in model.blocks.modules() if type(module) is kind), None)

    attention, mixer, moe = first(GatedAttention), first(GatedDeltaNet), first(SparseMoE)
    dense = next((b.mlp for b in cast("Iterable[Block]", model.blocks) if isinstance(b.mlp, SwiGLU)), None)
    sizes = Sizes(
        layers=len(model.blocks),
        width=model.embed_tokens.weight.shape[1],
        dtype=DTYPES.get(model.embed_tokens.weight.dtype, 0),
        zero_centred=model.norm.zero_centred,
        dense_inner=0 if dense is None else len(dense.gate_proj.weight),
        eps=model.norm.eps,
    )
    if attention is not None:
        sizes.heads, sizes.kv_heads, sizes.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        sizes.rotary = model.config.rotary_dim
    if mixer is not None:
        sizes.key_heads, sizes.value_heads = mixer.key_heads, mixer.value_heads
        sizes.key_dim, sizes.value_dim, sizes.taps = mixer.key_dim, mixer.value_dim, mixer.conv_weight.shape[1]
    if moe is not None:
        sizes.experts, sizes.top_k, sizes.renormalise = len(moe.router.weight), moe.top_k, moe.renormalise
        sizes.inner, sizes.shared_inner = moe.experts.down_proj.shape[2], len(moe.shared_expert.gate_proj.weight)
    return sizes


def _shapes(s: Sizes, gate_rows: int, sparse: bool) -> dict[str, tuple[int | None, ...]]:
    """The shape of each weight; None where any number of rows will do."""
    keys, values = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    query, kv, inner = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.shared_inner if sparse else s.dense_inner
    linear = {
        "in_qkv": (2 * keys + values, s.width), "in_z": (values, s.width), "in_b": (s.value_heads, s.width),
        "in_a": (s.value_heads, s.width), "out": (s.width, values), "conv": (2 * keys + values, s.taps),
        "q": (query, s.width), "k": (kv, s.width), "v": (kv, s.width), "o": (s.width, query),
        "gate": (s.heads * gate_rows, s.width), "router": (s.experts, s.width), "shared_weight": (1, s.width),
        "shared_gate": (inner, s.width), "shared_up": (inner, s.width), "shared_down": (s.width, inner),
        "experts_in": (s.experts, 2 * s.inner, s.width), "experts_out": (s.experts, s.width, s.inner),
        "embedding": (None, s.width), "head": (None, s.width),
    }  # fmt: skip
    vectors = {
        "norm_in": s.width, "norm_post": s.width, "norm": s.width, "a_log": s.value_heads, "dt_bias": s.value_heads,
        "out_norm": s.value_dim, "q_norm": s.head_dim, "k_norm": s.head_dim, "q_bias": query, "k_bias": kv,
        "v_bias": kv, "gate_bias": s.heads * gate_rows, "o_bias": s.width,
    }  # fmt: skip
    return linear | {name: (n,) for name, n in vectors.items()}


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(b is None or a == b for a, b in zip(shape, expected, strict=True))


class Plan:
    """Where a model's weights lie. Good as long as the guard with which it was made holds, which keeps them alive."""

    def __init__(self, model: "Qwen3Next", guard: Guard):
        self.guard, self.sizes = guard, _sizes(model)
        self.layers = (Layer * len(model.blocks))()
        for layer, block in zip(self.layers, cast("Iterable[Block]", model.blocks), strict=True):
            layer.softmax, layer.sparse = block.mixer == "full_attention", isinstance(block.mlp, SparseMoE)
            layer.gate_rows = _gate_rows(block)
            for name, weight in _weights(block).items():
                setattr(layer, name, _mat(weight))
        self.ends = Ends(
            embedding=_mat(model.embed_tokens.weight),
            norm=_mat(model.norm.weight),
            head=_mat(model.lm_head.weight),
            vocab=len(model.lm_head.weight),
        )
        self._dtype = model.embed_tokens.weight.dtype
        s = self.sizes
        self._softmax = [bool(layer.softmax) for layer in self.layers]
        self._kv_size = s.kv_heads, s.head_dim
        self._conv_size = s.taps - 1, 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim
        self._memory_size = s.value_heads, s.key_dim, s.value_dim
        self._lock = threading.Lock()  # the structures are filled anew for every call
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def serves(self, cache: HybridCache) -> bool:
        """Whether a cache is in dtypes that compiled code knows.

        Raises: ValueError for one whose states are of other kinds or sizes than this model's.
        """
        if len(cache.layers) != len(self._softmax):
            raise ValueError(OTHER_CACHE)
        b, known = cache.batch, True
        for state, softmax in zip(cache.layers, self._softmax, strict=True):
            if isinstance(state, KVState):
                fits = softmax and state.size == (b, *self._kv_size)
                known = known and state.dtype in DTYPES
            else:
                sizes = (b, *self._conv_size), (b, *self._memory_size)
                fits = not softmax and (state.conv.shape, state.memory.shape) == sizes
                known = known and state.conv.dtype == self._dtype and state.memory.dtype in FLOATS
            if not fits:
                raise ValueError(OTHER_CACHE)
        return known

    def rotation(self, model: "Qwen3Next", position: int) -> tuple[Tensor, Tensor, int]:
        """cos and sin of TABLE positions, one of them this, and how many bytes before it."""
        block, row = divmod(position, TABLE)
        table = self._tables.get((block, self._dtype))
        if table is None:
            if len(self._tables) >= 64:
                self._tables.clear()  # a call under way holds on to those that it uses
            rope = model._rotation(torch.arange(block * TABLE, block * TABLE + TABLE)[None], self._dtype)
            table = self._tables[block, self._dtype] = rope.cos[0].contiguous(), rope.sin[0].contiguous()
        return *table, row * table[0].shape[-1] * table[0].element_size()

    def run(self, model: "Qwen3Next", ids: Tensor, segments: Segments, cache: HybridCache) -> tuple[Tensor, Tensor]:
        """Hidden states (b t width) after the final norm and logits (b, vocab); the cache's layers go on with ids."""
        b, t = ids.shape
        ids = operand("input_ids", ids, (b, t), torch.int64)
        hidden = torch.empty(b, t, self.sizes.width, dtype=self._dtype)
        logits = torch.empty(b, self.ends.vocab, dtype=self._dtype)
        addresses = ctypes.c_void_p * (b * t)
        after: list[tuple[DeltaNetState, Tensor, Tensor, list[Tensor]]] = []
        kept: list[object] = []  # what compiled code points to lives until it returns
        with self._lock:
            turns = [self.rotation(model, past + j) for past in segments.past for j in range(t)]
            states = self._states(cache)
            self.sizes.b, self.sizes.t = b, t
            self.ends.ids, self.ends.hidden, self.ends.logits = ids.data_ptr(), hidden.data_ptr(), logits.data_ptr()
            for layer, state in zip(self.layers, cache.layers, strict=True):
                if isinstance(state, KVState):
                    state.reserve(segments)
                    if state.native is None:
                        state.native = Parts(state)
                    parts = cast("Parts", state.native)
                    layer.parts, layer.part_count = parts.address, parts.count
                    layer.kv_dtype = DTYPES[state.dtype]
                    kept.append(parts)
                else:
                    conv, memory = next(states)
                    before = side_by_side(state.conv), side_by_side(state.memory)
                    kept.append(before)
                    layer.conv_before, layer.memory_before = map(address, before)
                    layer.conv_after, layer.memory_after = conv.data_ptr(), memory.data_ptr()
                    layer.memory_dtype = DTYPES[memory.dtype]
                    after.append((state, conv, memory, self._notes(layer, state, b, t)))
            kernels().decode_step(
                ctypes.byref(self.sizes),
                self.layers,
                ctypes.byref(self.ends),
                (ctypes.c_int64 * b)(*segments.past),
                addresses(*(cos.data_ptr() + offset for cos, _, offset in turns)),
                addresses(*(sin.data_ptr() + offset for _, sin, offset in turns)),
                torch.get_num_threads(),
            )
        for state, conv, memory, noted in after:
            if state.tape is not None:
                state.tape.note(*noted, compiled=True)
            state.conv, state.memory = conv, memory
        return hidden, logits

    def _states(self, cache: HybridCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Memory for what comes after a step, convolution and recurrent state of each layer that has them."""
        before = [state.memory for state in cache.layers if isinstance(state, DeltaNetState)]
        if not before:
            return iter(())
        b, dtype = cache.batch, before[0].dtype
        conv = torch.empty(len(before), b, *self._conv_size, dtype=self._dtype).unbind()
        if any([memory.dtype != dtype for memory in before]):
            return zip(conv, map(torch.empty_like, before), strict=True)
        return zip(conv, torch.empty(len(before), b, *self._memory_size, dtype=dtype).unbind(), strict=True)

    def _notes(self, layer: Layer, state: DeltaNetState, b: int, t: int) -> list[Tensor]:
        """Tensors for what a tape wants to know, with the layer pointing to them; none where there is no tape."""
        if state.tape is None:
            layer.tape_inputs = layer.tape_k = layer.tape_u = layer.tape_decay = None
            return []
        s, real = self.sizes, torch.float64 if self._dtype == torch.float64 else torch.float32
        shapes = ((s.key_heads, s.key_dim), (s.value_heads, s.value_dim), (s.value_heads,))
        inputs = torch.empty(b, t, self._conv_size[1], dtype=self._dtype)
        noted = [inputs, *(torch.empty(b, t, *shape, dtype=real) for shape in shapes)]
        layer.tape_inputs, layer.tape_k, layer.tape_u, layer.tape_decay = (x.data_ptr() for x in noted)
        return noted

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (b, vocab) of hidden states (b, width) after the final norm."""
        if hidden.shape[1:] != (self.sizes.width,) or hidden.dtype != self._dtype:
            raise ValueError(
                f"The head reads hidden states (b, {self.sizes.width}) in {self._dtype}, "
                f"not {tuple(hidden.shape)} in {hidden.dtype}."
            )
        hidden = hidden.contiguous()
        logits = hidden.new_empty(len(hidden), self.ends.vocab)
        kernels().linear(
            ctypes.byref(self.ends.head),
            self.ends.vocab,
            self.sizes.width,
            len(hidden),
            address(hidden),
            logits.data_ptr(),
            DTYPES[self._dtype],
            torch.get_num_threads(),
        )
        return logits


class Slot:
    """Where a model keeps what its fast steps were made from. Addresses are no use to a copy: those begin without."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.plan: Plan | None = None
        self.reasons: dict[str, str | None] = {}  # by backend: why it cannot run, as long as the guard holds

    def current(self, model: "Qwen3Next") -> Guard:
        """The guard of the model as it is; what was made for another is forgotten."""
        if self.guard is None or not self.guard.holds(model):
            self.guard = self.plan = None  # before another is made: what they keep alive may be large
            self.reasons = {}
            self.guard = Guard(model)
        return self.guard

    def __deepcopy__(self, _memo: dict) -> "Slot":
        return Slot()

    def __reduce__(self) -> tuple:
        return Slot, ()


def plan_for(model: "Qwen3Next", segments: Segments, cache: HybridCache) -> Plan | None:
    """The plan by which this step can run, None where it cannot.

    Raises: RuntimeError where compiled code was asked for by name and cannot run; ValueError for another model's cache.
    """
    slot, named, weight = model.decode_slot, model.decode_backend == "cpp", like(model)
    if (
        model.decode_backend in ("torch", "graph")
        or segments.batch * segments.length > MOST_TOKENS
        or not segments.plain
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or (weight.device.type != "cpu" and not named)
    ):
        return None
    guard = slot.current(model)
    if "cpp" not in slot.reasons:
        reason = why_not(model)
        slot.plan = None if reason else Plan(model, guard)
        slot.reasons["cpp"] = reason
    if slot.plan is None:
        if named:
            raise RuntimeError(f"The 'cpp' backend of decode cannot run here: {slot.reasons['cpp']}.")
        return None
    if guard.watched(model):
        if named:
            raise RuntimeError(
                "Compiled decoding shows nothing inside: model.set_backend('decode', 'auto') lets hooks in."
            )
        return None
    if slot.plan.serves(cache):
        return slot.plan
    if named:
        raise RuntimeError("The 'cpp' backend of decode cannot run here: the cache has a dtype that it does not know.")
    return None


def _mat(x: Tensor | None) -> Mat:
    return Mat() if x is None else Mat(address(x), DTYPES[x.dtype])


class Parts:
    """A state's keys and values as compiled code finds them: good as long as it has the same buffers, kept alive."""

    def __init__(self, state: KVState):
        self._held = state.parts(0, state.capacity)
        self._array = (Part * len(self._held))(*(_part(stored, state) for stored in self._held))
        self.address, self.count = ctypes.addressof(self._array), len(self._array)

    def __deepcopy__(self, _memo: dict) -> None:
        """Addresses are no use to a copy."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def _part(stored: tuple[Tensor, ...], state: KVState) -> Part:
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


def _weights(block: Block) -> dict[str, Tensor | None]:
    """All weights that a step multiplies with, by the names that `Layer` has for them."""
    found: dict[str, Tensor | None] = {"norm_in": block.input_layernorm.weight}
    found["norm_post"] = block.post_attention_layernorm.weight
    if block.mixer == "full_attention":
        found |= dict(_attention(block.self_attn))
    else:
        m = block.linear_attn
        found |= {"in_qkv": m.in_proj_qkv.weight, "in_z": m.in_proj_z.weight, "in_b": m.in_proj_b.weight}
        found |= {"in_a": m.in_proj_a.weight, "conv": m.conv_weight, "a_log": m.A_log, "dt_bias": m.dt_bias}
        found |= {"out_norm": m.norm.weight, "out": m.out_proj.weight}
    mlp = block.mlp
    shared = mlp.shared_expert if isinstance(mlp, SparseMoE) else mlp
    assert shared is not None
    found |= {"shared_gate": shared.gate_proj.weight, "shared_up": shared.up_proj.weight}
    found |= {"shared_down": shared.down_proj.weight}
    if isinstance(mlp, SparseMoE):
        assert isinstance(mlp.experts, Experts)
        found |= {"router": mlp.router.weight, "shared_weight": mlp.shared_expert_gate.weight}
        found |= {"experts_in": mlp.experts.gate_up_proj, "experts_out": mlp.experts.down_proj}
    return found


def _attention(m: GatedAttention) -> Iterator[tuple[str, Tensor | None]]:
    for name, linear in (("q", m.q_proj), ("k", m.k_proj), ("v", m.v_proj), ("gate", m.gate_proj), ("o", m.o_proj)):
        if linear is not None:
            yield name, linear.weight
            yield f"{name}_bias", linear.bias
    for name, norm in (("q_norm", m.q_norm), ("k_norm", m.k_norm)):
        if isinstance(norm, RMSNorm):
            yield name, norm.weight
