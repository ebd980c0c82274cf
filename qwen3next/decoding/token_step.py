"""A step of one token a row in few operations: products by torch, and between them one kernel each.

With the norm before it a Gated DeltaNet mixer is 8 launches, softmax attention 9 and a sparse feed-forward 5. The
modules of a described model (describe_model.py) hold the weights; hooks are not passed, and `why_not_kernels` says
which models a step cannot run.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.dispatch.availability import one_token_kernels
from layers.dispatch.registry import function_of
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.kernels.one_token import MOST_ROWS, MOST_STATE
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from layers.norm import RMSNorm
from layers.rope import Rotation
from qwen3next.block import Block
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.describe_model import Unsupported, describe
from qwen3next.decoding.description import Description
from qwen3next.decoding.graph_states import GraphStates
from qwen3next.decoding.protocol import Decodable
from qwen3next.inputs import like

# Weights whose dtype may be another than the model's; kernels convert them.
_ANY_DTYPE = ("norm", "norm_in", "norm_post", "attention.q_norm", "attention.k_norm", "delta_net.out_norm",
              "delta_net.conv", "delta_net.a_log", "delta_net.dt_bias")  # fmt: skip
MOST_HEAD_DIM, MOST_SHARE = 256, 64  # of softmax attention: a tile of keys and one of queries fit on chip
MOST_WIDTH, MOST_CHOICES = 2**14, 16  # a row's numbers, and its experts, in one program


def why_not_kernels(model: Decodable, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run a model's steps on a device in a dtype, without a full stop, or None."""
    return one_token_kernels(device, dtype) or unknown_form(model)


def unknown_form(model: Decodable) -> str | None:
    """What of a model the step does not know, in a sentence without a full stop, or None."""
    try:
        found = describe(model)
    except Unsupported as reason:
        return str(reason)
    return _odd_weights(model, found) or _odd_norms(model) or _too_large(model, found)


def cache_refused(cache: HybridCache) -> str | None:
    """Why these kernels cannot step a cache, or None."""
    return None if cache.batch <= MOST_ROWS else f"{cache.batch} rows are more than {MOST_ROWS}"


def _odd_weights(model: Decodable, found: Description) -> str | None:
    dtype = like(model).dtype
    for held in found.weights:
        if held.field not in _ANY_DTYPE and held.tensor.dtype != dtype:
            return f"{held.name} has another dtype than the model"
        if held.field.startswith("feed_forward.") and held.field.endswith("_bias"):
            return f"{held.name} is a bias that it does not add"
    return None


def _odd_norms(model: Decodable) -> str | None:
    for i, block in enumerate(model.blocks):
        m = getattr(block, "self_attn", None)
        if m is not None and isinstance(m.q_norm, RMSNorm) != isinstance(m.k_norm, RMSNorm):
            return f"blocks.{i}.self_attn has a norm for one of q and k only"
    return None


def _too_large(model: Decodable, found: Description) -> str | None:
    def up(name: str) -> int:  # the size as a tile has it; 1 where no layer has such a size
        return 1 << (int(found.sizes.get(name, 1)) - 1).bit_length()

    if up("key_dim") * up("value_dim") > MOST_STATE:
        return f"a state of {found.sizes['key_dim']} x {found.sizes['value_dim']} does not fit into registers"
    if found.sizes.get("head_dim", 0) > MOST_HEAD_DIM:
        return f"heads of {found.sizes['head_dim']} are wider than {MOST_HEAD_DIM}"
    if found.sizes.get("heads", 0) > MOST_SHARE * found.sizes.get("kv_heads", 1):
        return f"more than {MOST_SHARE} query heads share a key head"
    if up("top_k") > MOST_CHOICES or max(len(like(model)[0]), int(found.sizes.get("experts", 1))) > MOST_WIDTH:
        return "its hidden size, experts or choices are too many for one program"
    return None


class TokenStep:
    """The operations of a model's step, bound to its weights.

    Args:
        backend: "triton", or "torch" for the definitions.
    """

    def __init__(self, model: Decodable, backend: str):
        self._model, self.backend = model, backend
        names = ("add_rms_norm", "convolve", "delta_rule", "rotate_and_store", "attend", "route", "experts")
        self._run: dict[str, Callable[..., Any]] = {n: function_of(f"one_token.{n}", backend) for n in names}

    def __call__(
        self,
        ids: Tensor,
        position: Tensor,
        turns: Rotation,
        states: GraphStates | None,
        kv: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Extend all states by a token a row. Nothing here waits for the device.

        Args:
            ids: (b, 1). position: (b,) of these tokens.
            turns: cos and sin of all places (1 n 1 rotary).
            states: of the Gated DeltaNet layers, whose other side is written; `side` stays.
            kv: buffers of each softmax layer (b kvh n d), written at `position`.
        Returns: hidden states after the final norm (b width) and logits (b vocab).
        """
        model, buffers, i = self._model, iter(kv), 0
        x: Tensor = F.embedding(ids[:, 0], model.embed_tokens.weight)
        y: Tensor | None = None
        cos, sin = turns.cos[0, :, 0], turns.sin[0, :, 0]
        for module in model.blocks:
            block = cast(Block, module)
            x, h = self._add_norm(x, y, block.input_layernorm)
            if block.mixer == "full_attention":
                y = self._attend(block.self_attn, h, cos, sin, *next(buffers), position)
            else:
                assert states is not None
                y = self._delta_rule(block.linear_attn, h, states.conv[:, i], states.recurrent[:, i], states.side)
                i += 1
            x, h = self._add_norm(x, y, block.post_attention_layernorm)
            y = self._experts(block.mlp, h) if isinstance(block.mlp, SparseMoE) else _dense(block.mlp, h)
        _, hidden = self._add_norm(x, y, model.norm)
        return hidden, _linear(model.lm_head, hidden)

    def _add_norm(self, x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        return self._run["add_rms_norm"](x, y, norm.weight, eps=norm.eps, zero_centred=norm.zero_centred)

    def _delta_rule(self, m: GatedDeltaNet, x: Tensor, conv: Tensor, recurrent: Tensor, side: Tensor) -> Tensor:
        sizes = {"key_heads": m.key_heads, "value_heads": m.value_heads, "key_dim": m.key_dim}
        q, k, v = self._run["convolve"](_linear(m.in_proj_qkv, x), m.conv_weight, conv, side, **sizes)
        b, a, z = (_linear(p, x) for p in (m.in_proj_b, m.in_proj_a, m.in_proj_z))
        weights = m.A_log, m.dt_bias, m.norm.weight
        y = self._run["delta_rule"](q, k, v, b, a, z, *weights, recurrent, side, eps=m.norm.eps)
        return _linear(m.out_proj, y)

    def _attend(
        self, m: GatedAttention, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
    ) -> Tensor:
        q = _linear(m.q_proj, x).unflatten(-1, (m.heads, -1))
        k, v = (_linear(p, x).unflatten(-1, (m.kv_heads, -1)) for p in (m.k_proj, m.v_proj))
        norms = [n.weight if isinstance(n, RMSNorm) else None for n in (m.q_norm, m.k_norm)]
        kind = {"eps": 1e-6, "zero_centred": True}  # of no effect without a norm
        if isinstance(m.q_norm, RMSNorm):
            kind = {"eps": m.q_norm.eps, "zero_centred": m.q_norm.zero_centred}
        q = self._run["rotate_and_store"](q, k, v, *norms, cos, sin, keys, values, position, **kind)
        gate = None if m.gate_proj is None else _linear(m.gate_proj, x)
        return _linear(m.o_proj, self._run["attend"](q, keys, values, position, gate).flatten(1))

    def _experts(self, m: SparseMoE, x: Tensor) -> Tensor:
        experts, shared = cast(Experts, m.experts), m.shared_expert
        assert shared is not None
        logits, gate = _linear(m.router, x), m.shared_expert_gate.weight
        chosen = self._run["route"](logits, x, gate, top_k=m.top_k, norm_topk_prob=m.norm_topk_prob)
        own = shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight
        return self._run["experts"](x, *chosen, experts.gate_up_proj, experts.down_proj, own)


def _linear(m: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, m.weight, m.bias)


def _dense(m: SwiGLU, x: Tensor) -> Tensor:
    return _linear(m.down_proj, F.silu(_linear(m.gate_proj, x)) * _linear(m.up_proj, x))
