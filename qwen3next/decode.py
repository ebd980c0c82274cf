"""A step of decoding as one call into compiled code, for the CPU: the plan of a model's weights, and when it serves.

layers/decode.cpp has the arithmetic; here is what it is told, and the conditions under which it may stand in for the
modules: nobody looks inside, nothing was put in a module's place, and every part is one that it knows.
"""

import ctypes
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import repeat
from operator import attrgetter, contains
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from layers import native
from layers.backends import why_not as choose_reason
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import DeltaNetState, GatedDeltaNet
from layers.hook_point import HookPoint
from layers.kv_state import KVState
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from layers.native import DTYPES, Layer, Mat, Part, Sizes
from layers.norm import GatedRMSNorm, RMSNorm
from layers.segments import Segments
from qwen3next.block import Block
from qwen3next.cache import HybridCache

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

ASK_AGAIN = 256  # steps of a model that cannot run here, until it is looked at again
MOST_TOKENS = 8  # new ones in a call, all rows together: beyond, matrix products in torch are faster
ARMED = attrgetter("armed")
TABLE = 64  # positions whose rotation is computed at a time
KNOWN = (
    nn.Linear,
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
    if reason := choose_reason("decode", "native", where, kind):
        return reason
    for name, module in model.blocks.named_modules():
        if not isinstance(module, (nn.ModuleList, HookPoint)) and type(module) not in KNOWN:
            return f"blocks.{name} is a {type(module).__name__}, which it does not know"
    for name, parameter in model.blocks.named_parameters():
        if not parameter.is_contiguous() or parameter.dtype not in DTYPES or parameter.device != weight.device:
            return f"blocks.{name} is not contiguous, elsewhere, or of a dtype that it does not know"
    return None


class Plan:
    """Where a model's weights lie; good as long as nothing about the model changes."""

    def __init__(self, model: "Qwen3Next"):
        blocks, c = list(model.blocks), model.config
        everything = [*model.blocks.modules(), model.lm_head]
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
        self.layers = (Layer * len(blocks))()
        for layer, block in zip(self.layers, blocks, strict=True):
            assert isinstance(block, Block)
            _fill(layer, block)
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
        self._lock = threading.Lock()  # the structures are filled anew for every call
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def holds(self) -> bool:
        """Whether modules and weights are those that the plan was made for."""
        return all([children[name] is child for children, name, child in self._children]) and all(
            [parameters[name].data_ptr() == address for parameters, name, address in self._parameters]
        )

    def watched(self) -> bool:
        """Whether somebody looks inside, or chose how something inside runs: then the modules themselves run."""
        return (
            any(map(ARMED, self._points))
            or any(map(len, self._hooks))
            or any(map(contains, self._dicts, repeat("forward")))
            or any([chosen["backend"] != "auto" or chosen.get("exposed_pattern") for chosen in self._chosen])
        )

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

    def run(self, model: "Qwen3Next", x: Tensor, segments: Segments, cache: HybridCache) -> Tensor:
        """The residual stream after the last layer, from that before the first; the cache's layers go on with it."""
        b, t, _ = x.shape
        x = x.contiguous().clone()
        places = [past + j for past in segments.past for j in range(t)]
        cos, sin = zip(*(self.rotation(model, place, x.dtype) for place in places), strict=True)
        addresses = ctypes.c_void_p * len(places)
        with self._lock:
            self.sizes.b, self.sizes.t = b, t
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
            native.load("decode").decode_step(
                ctypes.byref(self.sizes),
                self.layers,
                (ctypes.c_int64 * b)(*segments.past),
                addresses(*cos),
                addresses(*sin),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_int64(torch.get_num_threads()),
            )
        for state, conv, memory, noted in after:
            if state.tape is not None:
                state.tape.note(*noted, compiled=True)
            state.conv, state.memory = conv, memory
        return x

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
        addresses = addresses or [None] * 4
        layer.tape_inputs, layer.tape_k, layer.tape_u, layer.tape_decay = addresses
        return conv, memory, noted

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (…, columns) times weight (rows, columns) transposed, as F.linear has it, for a few vectors."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = flat.new_empty(len(flat), len(weight))
        native.load("decode").linear(
            ctypes.byref(_mat(weight)),
            *map(ctypes.c_int64, (len(weight), weight.shape[1], len(flat))),
            *map(ctypes.c_void_p, (flat.data_ptr(), out.data_ptr())),
            *map(ctypes.c_int64, (DTYPES[x.dtype], torch.get_num_threads())),
        )
        return out.view(*x.shape[:-1], -1)


_plans: "WeakKeyDictionary[Qwen3Next, Plan | None]" = WeakKeyDictionary()
_asked: "WeakKeyDictionary[Qwen3Next, int]" = WeakKeyDictionary()


def plan_for(model: "Qwen3Next", segments: Segments, cache: HybridCache | None, *, step: bool) -> Plan | None:
    """The plan by which this call can run, None where it cannot.

    On "auto" only steps of generation do: a forward runs the modules, so that a hook which changes nothing leaves every
    bit as it was.
    Raises: RuntimeError where compiled code was asked for by name and cannot run.
    """
    named = model.decode_backend == "native"
    if (
        cache is None
        or not (named or (step and model.decode_backend == "auto"))
        or segments.batch * segments.length > MOST_TOKENS
        or not segments.plain
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or not all([_served(state, model.embed_tokens.weight.dtype) for state in cache.layers])
    ):
        return None
    plan = _plans.get(model)
    if plan is None or not plan.holds():
        asked = _asked[model] = _asked.get(model, -1) + 1
        if plan is None and asked % ASK_AGAIN and not named:
            return None
        reason = why_not(model)
        if reason is not None and named:
            raise RuntimeError(f"The 'native' backend of decode cannot run here: {reason}.")
        plan = _plans[model] = None if reason else Plan(model)
        if reason is not None and reason == native.missing():
            _say_once(reason)
    if plan is not None and plan.watched():
        if named:
            raise RuntimeError(
                "Compiled decoding shows nothing inside: model.set_backend('decode', 'auto') lets hooks in."
            )
        return None
    return plan


@cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"Decoding runs in plain torch, several times slower than it could, because {reason}: install one, or "
        "model.set_backend('decode', 'torch') to be content with it.",
        stacklevel=6,
    )


def _served(state: KVState | DeltaNetState, dtype: torch.dtype) -> bool:
    if isinstance(state, KVState):
        return state.dtype in DTYPES
    return state.conv.dtype == dtype and state.memory.dtype in DTYPES


def watched(module: nn.Module) -> bool:
    """Whether somebody put hooks on a module as a whole, or something in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(len, hooks)) or "forward" in module.__dict__


def forget(model: "Qwen3Next") -> None:
    """Look at a model anew at its next step."""
    _plans.pop(model, None)
    _asked.pop(model, None)


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
    found: dict[str, Tensor | None] = {"norm_in": block.input_layernorm.weight}
    found["norm_post"] = block.post_attention_layernorm.weight
    if layer.softmax:
        found |= dict(_attention(block.self_attn))
        gate = block.self_attn.gate_proj
        layer.gate_rows = 0 if gate is None else gate.out_features // block.self_attn.heads
    else:
        m = block.linear_attn
        found |= {"in_qkv": m.in_proj_qkv.weight, "in_z": m.in_proj_z.weight, "in_b": m.in_proj_b.weight}
        found |= {"in_a": m.in_proj_a.weight, "conv": m.conv_weight, "a_log": m.A_log, "dt_bias": m.dt_bias}
        found |= {"out_norm": m.norm.weight, "out": m.out_proj.weight}
    mlp = block.mlp
    shared = mlp.shared_expert if isinstance(mlp, SparseMoE) else mlp
    found |= {"shared_gate": shared.gate_proj.weight, "shared_up": shared.up_proj.weight}
    found |= {"shared_down": shared.down_proj.weight}
    if isinstance(mlp, SparseMoE):
        assert isinstance(mlp.experts, Experts)
        found |= {"router": mlp.router.weight, "shared_weight": mlp.shared_expert_gate.weight}
        found |= {"experts_in": mlp.experts.gate_up_proj, "experts_out": mlp.experts.down_proj}
    for name, weight in found.items():
        setattr(layer, name, _mat(weight))


def _attention(m: GatedAttention) -> Iterator[tuple[str, Tensor | None]]:
    for name, linear in (("q", m.q_proj), ("k", m.k_proj), ("v", m.v_proj), ("gate", m.gate_proj), ("o", m.o_proj)):
        if linear is not None:
            yield name, linear.weight
            yield f"{name}_bias", linear.bias
    for name, norm in (("q_norm", m.q_norm), ("k_norm", m.k_norm)):
        if isinstance(norm, RMSNorm):
            yield name, norm.weight
