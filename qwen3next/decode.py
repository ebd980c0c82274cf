"""A step of decoding as one call into compiled code, for the CPU: the plan of a model's weights, and when it serves.

layers/native/decode.cpp has the arithmetic; here is what it is told, and the conditions under which it may stand in for
the modules: nobody looks inside, nothing was put in a module's place, and every part is one that it knows.
"""

import ctypes
import threading
from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter, contains
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layers.backends import why_not as choose_reason
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import DeltaNetState, GatedDeltaNet
from layers.hook_point import HookPoint
from layers.kv_state import KVState
from layers.linear import Linear
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from layers.native.step import DTYPES, Ends, Layer, Mat, Part, Sizes, kernels
from layers.norm import GatedRMSNorm, RMSNorm
from layers.segments import Segments
from qwen3next.block import Block
from qwen3next.cache import HybridCache

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

ASK_AGAIN = 256  # steps of a model that cannot run here, until it is looked at again
LOOK_EVERY = 16  # steps
MOST_TOKENS = 8  # new ones in a call, all rows together: beyond, matrix products in torch are faster
ARMED = attrgetter("armed")
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
)


def why_not(model: "Qwen3Next", device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why a model's steps cannot run in compiled code as it stands, in a sentence without a full stop, or None.

    Args:
        device, dtype: answer as if it were there and so.
    """
    weight = model.embed_tokens.weight
    where, kind = weight.device if device is None else device, weight.dtype if dtype is None else dtype
    if reason := choose_reason("decode", "cpp", where, kind):
        return reason
    if reason := unknown_module(model):
        return reason
    for name, module in model.blocks.named_modules():
        if isinstance(module, SparseMoE) and module.shared_expert is None:
            return f"blocks.{name} has no shared expert, and it knows experts with one"
    used = {id(weight) for block in model.blocks for weight in _weights(cast("Block", block)).values()}
    for name, parameter in model.blocks.named_parameters():
        if id(parameter) not in used:
            return f"blocks.{name} is a weight that it does not know"
        if not parameter.is_contiguous() or parameter.dtype not in DTYPES or parameter.device != weight.device:
            return f"blocks.{name} is not contiguous, elsewhere, or of a dtype that it does not know"
    return None


def unknown_module(model: "Qwen3Next") -> str | None:
    """The first module of the blocks that the default model does not have, in a sentence, or None."""
    for name, module in model.blocks.named_modules():
        if not isinstance(module, (nn.ModuleList, HookPoint)) and type(module) not in KNOWN:
            return f"blocks.{name} is a {type(module).__name__}, which it does not know"
    return None


class Sight:
    """A model as it was looked at, to notice when anything about it changes.

    Attributes:
        watched: somebody looks inside, or chose how something inside runs: then the modules themselves run.
        serves: the cache that was looked at last is of a kind that can be served.
    """

    def __init__(self, model: "Qwen3Next"):
        apart = set() if model.mtp is None else set(model.mtp.modules())
        everything = [m for m in model.modules() if m not in apart]
        points = [m for m in everything if isinstance(m, HookPoint)]
        modules = [m for m in everything if not isinstance(m, HookPoint)]
        self._parameters = [
            (cast("dict[str, Tensor]", m._parameters), name, parameter.data_ptr())
            for m in modules
            for name, parameter in m._parameters.items()
            if parameter is not None
        ]
        self._children = [
            (m._modules, name, child)
            for m in modules
            for name, child in m._modules.items()
            if not isinstance(child, HookPoint)
        ]
        self._points, self._dicts = points, [m.__dict__ for m in everything]
        self._hooks: list[dict] = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._chosen = [m.__dict__ for m in modules if hasattr(m, "backend")]
        self.watched, self.serves = False, False
        self._seen, self._steps = (-1, 0), 0  # when all was looked at

    def _serves(self, _cache: HybridCache) -> bool:
        return True

    def holds(self, cache: HybridCache) -> bool:
        """Whether modules and weights are those that were there at first; sets `watched`.

        Hooks are noticed at once. The rest, some hundred comparisons, is looked at when another cache comes and every
        few steps: a module that is replaced in the middle of a text acts from then on.
        """
        now = RemovableHandle.next_id, id(cache)  # the first grows with every hook that is registered anywhere
        self._steps += 1
        if now == self._seen and self._steps < LOOK_EVERY and not self.watched:
            return True
        self._seen, self._steps = now, 0
        self.serves = self._serves(cache)
        self.watched = (
            any(map(ARMED, self._points))
            or any(map(len, self._hooks))
            or any(map(contains, self._dicts, repeat("forward")))
            or any(
                [chosen.get("backend", "auto") != "auto" or chosen.get("exposed_pattern") for chosen in self._chosen]
            )
        )
        return all([children[name] is child for children, name, child in self._children]) and all(
            [parameters[name].data_ptr() == address for parameters, name, address in self._parameters]
        )


class Plan(Sight):
    """Where a model's weights lie; good as long as nothing about the model changes.

    `serves` is whether the cache is in dtypes that compiled code knows.
    """

    def __init__(self, model: "Qwen3Next"):
        super().__init__(model)
        blocks, c = list(model.blocks), model.config
        self.layers = (Layer * len(blocks))()
        for layer, block in zip(self.layers, blocks, strict=True):
            assert isinstance(block, Block)
            _fill(layer, block)
        self.ends = Ends(
            embedding=_mat(model.embed_tokens.weight),
            norm=_mat(model.norm.weight),
            head=_mat(model.lm_head.weight),
            vocab=c.vocab_size,
        )
        first = next((b.mlp for b in blocks if isinstance(b.mlp, SparseMoE)), None)
        experts = 0 if first is None else c.num_experts
        dense = next((b.mlp.gate_proj.out_features for b in blocks if isinstance(b.mlp, SwiGLU)), 0)
        self.sizes = Sizes(
            layers=len(blocks),
            width=c.hidden_size,
            dtype=DTYPES[model.embed_tokens.weight.dtype],
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            rotary=c.rotary_dim,
            zero_centred=c.zero_centred_norms,
            key_heads=c.linear_num_key_heads,
            value_heads=c.linear_num_value_heads,
            key_dim=c.linear_key_head_dim,
            value_dim=c.linear_value_head_dim,
            taps=c.linear_conv_kernel_dim,
            experts=experts,
            top_k=c.num_experts_per_tok if experts else 0,
            inner=c.moe_intermediate_size if experts else 0,
            shared_inner=c.shared_expert_intermediate_size if experts else 0,
            dense_inner=dense,
            renormalise=c.norm_topk_prob,
            eps=c.rms_norm_eps,
        )
        self._dtype = model.embed_tokens.weight.dtype
        self._lock = threading.Lock()  # the structures are filled anew for every call
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def _serves(self, cache: HybridCache) -> bool:
        return all([_served(state, self._dtype) for state in cache.layers])

    def rotation(self, model: "Qwen3Next", position: int, dtype: torch.dtype) -> tuple[int, int]:
        """Addresses of cos and sin of a position."""
        block, row = divmod(position, TABLE)
        key = (block, dtype, model.config.rope_scaling)
        if key not in self._tables:
            if len(self._tables) >= 64:
                self._tables.clear()
            places = torch.arange(block * TABLE, block * TABLE + TABLE)[None]
            rope = model._rotation(places, dtype)
            self._tables[key] = (rope.cos.contiguous(), rope.sin.contiguous())
        cos, sin = self._tables[key]
        offset = row * cos.shape[-1] * cos.element_size()
        return cos.data_ptr() + offset, sin.data_ptr() + offset

    def run(self, model: "Qwen3Next", ids: Tensor, segments: Segments, cache: HybridCache) -> tuple[Tensor, Tensor]:
        """Hidden states (b t width) after the final norm and logits (b, vocab); the cache's layers go on with ids."""
        b, t = ids.shape
        ids, weight = ids.contiguous(), model.embed_tokens.weight
        hidden, logits = weight.new_empty(b, t, weight.shape[1]), weight.new_empty(b, len(weight))
        places = [past + j for past in segments.past for j in range(t)]
        cos, sin = zip(*(self.rotation(model, place, weight.dtype) for place in places), strict=True)
        addresses = ctypes.c_void_p * len(places)
        with self._lock:
            self.sizes.b, self.sizes.t = b, t
            self.ends.ids, self.ends.hidden, self.ends.logits = ids.data_ptr(), hidden.data_ptr(), logits.data_ptr()
            after: list[tuple[DeltaNetState, Tensor, Tensor, list[Tensor]]] = []
            kept: list[object] = []  # what compiled code points to lives until it returns
            for layer, state in zip(self.layers, cache.layers, strict=True):
                if isinstance(state, KVState):
                    state.reserve(segments)
                    parts = state.parts(0, max(segments.ends))
                    array = (Part * len(parts))(*map(_part, parts))
                    layer.parts, layer.part_count = ctypes.addressof(array), len(parts)
                    layer.kv_dtype = DTYPES[state.dtype]
                    kept += [array, parts]
                else:
                    before = state.conv.contiguous(), state.memory.contiguous()
                    kept.append(before)
                    after.append((state, *self._after(layer, state, before, b, t)))
            kernels().decode_step(
                ctypes.byref(self.sizes),
                self.layers,
                ctypes.byref(self.ends),
                (ctypes.c_int64 * b)(*segments.past),
                addresses(*cos),
                addresses(*sin),
                ctypes.c_int64(torch.get_num_threads()),
            )
        for state, conv, memory, noted in after:
            if state.tape is not None:
                state.tape.note(*noted, compiled=True)
            state.conv, state.memory = conv, memory
        return hidden, logits

    def _after(
        self, layer: Layer, state: DeltaNetState, before: tuple[Tensor, Tensor], b: int, t: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Tensors for what comes after and for a tape, with the layer pointing to them and to what came before."""
        conv, memory = torch.empty_like(before[0]), torch.empty_like(before[1])
        layer.conv_before, layer.memory_before = before[0].data_ptr(), before[1].data_ptr()
        layer.conv_after, layer.memory_after = conv.data_ptr(), memory.data_ptr()
        layer.memory_dtype = DTYPES[memory.dtype]
        noted: list[Tensor] = []
        if state.tape is not None:
            s, real = self.sizes, torch.float64 if conv.dtype == torch.float64 else torch.float32
            shapes = ((s.key_heads, s.key_dim), (s.value_heads, s.value_dim), (s.value_heads,))
            noted = [conv.new_empty(b, t, conv.shape[2]), *(torch.empty(b, t, *shape, dtype=real) for shape in shapes)]
        addresses: list[int | None] = [x.data_ptr() for x in noted]
        layer.tape_inputs, layer.tape_k, layer.tape_u, layer.tape_decay = addresses or [None] * 4
        return conv, memory, noted

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (…, columns) times weight (rows, columns) transposed, as F.linear has it, for a few vectors."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = flat.new_empty(len(flat), len(weight))
        kernels().linear(
            ctypes.byref(_mat(weight)),
            *map(ctypes.c_int64, (len(weight), weight.shape[1], len(flat))),
            *map(ctypes.c_void_p, (flat.data_ptr(), out.data_ptr())),
            *map(ctypes.c_int64, (DTYPES[x.dtype], torch.get_num_threads())),
        )
        return out.view(*x.shape[:-1], -1)


class Slot:
    """Where a model keeps its plan. Addresses are no use to a copy or in another process: those begin without one."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.refused = 0  # steps since it was found that there can be none
        self.sight: Sight | None = None  # for CUDA graphs, which the caches keep,
        self.reason: str | None = None  # and why there can be none

    def __deepcopy__(self, _memo: dict) -> "Slot":
        return Slot()

    def __reduce__(self) -> tuple:
        return Slot, ()


def plan_for(model: "Qwen3Next", segments: Segments, cache: HybridCache) -> Plan | None:
    """The plan by which this step can run, None where it cannot.

    Raises: RuntimeError where compiled code was asked for by name and cannot run.
    """
    slot, named = model.decode_slot, model.decode_backend == "cpp"
    if (
        model.decode_backend in ("torch", "graph")
        or segments.batch * segments.length > MOST_TOKENS
        or not segments.plain
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    if slot.plan is None or not slot.plan.holds(cache):
        slot.refused = (slot.refused + 1) % ASK_AGAIN if slot.plan is None else 1
        slot.plan = None
        if slot.refused != 1 and not named:
            return None
        reason = why_not(model)
        if reason is not None and named:
            raise RuntimeError(f"The 'cpp' backend of decode cannot run here: {reason}.")
        if reason is not None:
            return None
        slot.plan = Plan(model)
        slot.plan.holds(cache)
    if slot.plan.watched and named:
        raise RuntimeError("Compiled decoding shows nothing inside: model.set_backend('decode', 'auto') lets hooks in.")
    return None if slot.plan.watched or not slot.plan.serves else slot.plan


def _served(state: KVState | DeltaNetState, dtype: torch.dtype) -> bool:
    if isinstance(state, KVState):
        return state.dtype in DTYPES
    return state.conv.dtype == dtype and state.memory.dtype in DTYPES


def _mat(x: Tensor | None) -> Mat:
    return Mat() if x is None else Mat(x.data_ptr(), DTYPES[x.dtype])


def _part(stored: tuple[Tensor, ...]) -> Part:
    k, v, *scales = stored
    part = Part(k.data_ptr(), v.data_ptr(), n=k.shape[2], row=k.stride(0), head=k.stride(1))
    if scales:
        part.k_scale, part.v_scale = (x.data_ptr() for x in scales)
        part.scale_row, part.scale_head = scales[0].stride(0), scales[0].stride(1)
    return part


def _fill(layer: Layer, block: Block) -> None:
    """Point a layer to a block's weights."""
    layer.softmax, layer.sparse = block.mixer == "full_attention", block.sparse
    if layer.softmax:
        gate = block.self_attn.gate_proj
        layer.gate_rows = 0 if gate is None else gate.out_features // block.self_attn.heads
    for name, weight in _weights(block).items():
        setattr(layer, name, _mat(weight))


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
