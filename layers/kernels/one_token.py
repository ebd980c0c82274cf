"""A decoding step's operations on a few rows of one token each: in torch, the definitions, and as Triton kernels.

The torch functions join what layers/*.py define; qwen3next/decoding/token_step.py calls either kind. `side` (1,) is 0
or 1: the half of a state's memory that holds the present state; the state after the token goes to the other half.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from layers.causal_conv import convolve as causal_conv
from layers.delta_rule import recurrent
from layers.dispatch.registry import implements
from layers.expert_choices import top_experts
from layers.kernels import one_token_cases as cases
from layers.moe import in_turn, swiglu
from layers.norm import at_least_fp32, gated_rms_norm, l2_normalise, rms_norm
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.static_kv_cache import StaticKVCache

Rows = Float[Tensor, "b width"]
Position = Int[Tensor, "b"]
Side = Int[Tensor, "1"]
KVBuffer = Float[Tensor, "b kvh n d"]

MOST_ROWS = 16  # more rows share experts, which a kernel a choice reads again
MOST_STATE = 2**15  # numbers of a head's state that a program holds in registers, both sizes rounded up to powers of 2


@implements("one_token.add_rms_norm", "torch", definition=True)
def add_rms_norm(x: Rows, y: Rows | None, weight: Tensor, *, eps: float, zero_centred: bool) -> tuple[Rows, Rows]:
    """x + y (x alone where y is None), and its norm."""
    x = x if y is None else x + y
    return x, rms_norm(x, weight, eps=eps, zero_centred=zero_centred)


@implements("one_token.convolve", "torch", definition=True)
def convolve(
    x: Float[Tensor, "b channels"],
    weight: Float[Tensor, "channels taps"],
    state: Float[Tensor, "2 b carried channels"],
    side: Side,
    *,
    key_heads: int,
    value_heads: int,
    key_dim: int,
) -> tuple[Float[Tensor, "b kh k"], Float[Tensor, "b kh k"], Float[Tensor, "b h v"]]:
    """q and k, normalised and in fp32, q scaled, and v: after the convolution. Writes the state's other side."""
    before = state.index_select(0, side)[0]
    y, after = causal_conv(x[:, None], weight, state=before, segments=None)
    state.index_copy_(0, 1 - side, after[None].to(state.dtype))
    keys = key_heads * key_dim
    q, k, v = y[:, 0].split((keys, keys, y.shape[2] - 2 * keys), dim=-1)
    q, k = (x.unflatten(-1, (key_heads, -1)) for x in (q, k))
    q = l2_normalise(q, scale=key_dim**-0.5, backend="torch")
    return q, l2_normalise(k, backend="torch"), v.unflatten(-1, (value_heads, -1))


@implements("one_token.delta_rule", "torch", definition=True)
def delta_rule(
    q: Float[Tensor, "b kh k"],
    k: Float[Tensor, "b kh k"],
    v: Float[Tensor, "b h v"],
    b: Float[Tensor, "b h"],
    a: Float[Tensor, "b h"],
    z: Float[Tensor, "b hv"],
    a_log: Float[Tensor, "h"],
    dt_bias: Float[Tensor, "h"],
    norm_weight: Float[Tensor, "v"],
    state: Float[Tensor, "2 b h k v"],
    side: Side,
    *,
    eps: float,
) -> Float[Tensor, "b hv"]:
    """The gated delta rule from the logits of its gates, its norm and output gate. Writes the state's other side."""
    beta = at_least_fp32(b).sigmoid()
    log_decay = -at_least_fp32(a_log).exp() * F.softplus(at_least_fp32(a) + at_least_fp32(dt_bias))
    before = state.index_select(0, side)[0]
    parts = (x[:, None] for x in (q, k, v, log_decay, beta))
    o, after = recurrent(*parts, state=before, segments=None)
    state.index_copy_(0, 1 - side, after[None].to(state.dtype))
    return gated_rms_norm(o[:, 0], norm_weight, z.view_as(v), eps=eps).flatten(1)


@implements("one_token.rotate_and_store", "torch", definition=True)
def rotate_and_store(
    q: Float[Tensor, "b h d"],
    k: Float[Tensor, "b kvh d"],
    v: Float[Tensor, "b kvh d"],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Float[Tensor, "n rotary"],
    sin: Float[Tensor, "n rotary"],
    keys: KVBuffer,
    values: KVBuffer,
    position: Position,
    *,
    eps: float,
    zero_centred: bool,
) -> Float[Tensor, "b h d"]:
    """q after its norm (where it has one) and RoPE at `position`; k likewise and v go to that place of the buffers."""
    rope = Rotation(cos[position][:, None, None], sin[position][:, None, None])
    q = q if q_weight is None else rms_norm(q, q_weight, eps=eps, zero_centred=zero_centred)
    k = k if k_weight is None else rms_norm(k, k_weight, eps=eps, zero_centred=zero_centred)
    StaticKVCache(keys, values, position).append(rope(k[:, None]), v[:, None], Segments.full(q))
    return rope(q[:, None])[:, 0]


@implements("one_token.attend", "torch", definition=True)
def attend(
    q: Float[Tensor, "b h d"], keys: KVBuffer, values: KVBuffer, position: Position, gate: Float[Tensor, "b g"] | None
) -> Float[Tensor, "b h d"]:
    """softmax(q kᵀ / √d) v over the places up to `position`, times σ(gate) of one number a head or d of them."""
    y = StaticKVCache(keys, values, position).attend(q[:, None])[:, 0]
    return y if gate is None else y * gate.unflatten(1, (q.shape[1], -1)).sigmoid()


@implements("one_token.route", "torch", definition=True)
def route(
    logits: Float[Tensor, "b e"], x: Rows, gate_weight: Float[Tensor, "1 width"], *, top_k: int, norm_topk_prob: bool
) -> tuple[Float[Tensor, "b top_k"], Int[Tensor, "b top_k"], Float[Tensor, "b 1"]]:
    """Weights and numbers of the chosen experts, as `SparseMoE.forward`, and the shared expert's gate."""
    numbers = top_experts(logits, top_k)
    weights = at_least_fp32(logits).softmax(-1).gather(-1, numbers)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(x.dtype), numbers.to(torch.int32), F.linear(x, gate_weight).sigmoid()


@implements("one_token.experts", "torch", definition=True)
def experts(
    x: Rows,
    weights: Float[Tensor, "b top_k"],
    numbers: Int[Tensor, "b top_k"],
    gates: Float[Tensor, "b 1"],
    gate_up: Float[Tensor, "e inner2 width"],
    down: Float[Tensor, "e width inner"],
    shared: tuple[Tensor, Tensor, Tensor],
) -> Rows:
    """The chosen experts, weighted, and the shared one (weights of gate, up and down), scaled by its gate."""
    y = in_turn(x, weights, numbers.long(), gate_up, down, linear_backend="torch", elementwise_backend="torch")
    joined = torch.cat(shared[:2])
    return y + gates * swiglu(x, joined, shared[2], linear_backend="torch", elementwise_backend="torch")


# The kernels, each imported at its first call: importing them imports triton.


@implements("one_token.add_rms_norm", "triton", checked_by=cases.add_rms_norm)
def add_rms_norm_triton(
    x: Rows, y: Rows | None, weight: Tensor, *, eps: float, zero_centred: bool
) -> tuple[Rows, Rows]:
    from layers.triton.norm import add_rms_norm

    return add_rms_norm(x, y, weight, eps=eps, zero_centred=zero_centred)


@implements("one_token.convolve", "triton", checked_by=cases.convolve)
def convolve_triton(
    x: Tensor, weight: Tensor, state: Tensor, side: Tensor, *, key_heads: int, value_heads: int, key_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    from layers.triton.deltanet import convolve

    return convolve(x, weight, state, side, key_heads=key_heads, value_heads=value_heads, key_dim=key_dim)


@implements("one_token.delta_rule", "triton", checked_by=cases.delta_rule)
def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    side: Tensor,
    *,
    eps: float,
) -> Tensor:
    from layers.triton.deltanet import delta_rule

    return delta_rule(q, k, v, b, a, z, a_log, dt_bias, norm_weight, state, side, eps=eps)


@implements("one_token.rotate_and_store", "triton", checked_by=cases.rotate_and_store)
def rotate_and_store_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    eps: float,
    zero_centred: bool,
) -> Tensor:
    from layers.triton.attention import rotate_and_store

    norms, buffers = (q_weight, k_weight), (keys, values)
    return rotate_and_store(q, k, v, *norms, cos, sin, *buffers, position, eps=eps, zero_centred=zero_centred)


@implements("one_token.attend", "triton", checked_by=cases.attend)
def attend_triton(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, gate: Tensor | None) -> Tensor:
    from layers.triton.attention import attend

    return attend(q, keys, values, position, gate)


@implements("one_token.route", "triton", checked_by=cases.route)
def route_triton(
    logits: Tensor, x: Tensor, gate_weight: Tensor, *, top_k: int, norm_topk_prob: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from layers.triton.experts import route

    return route(logits, x, gate_weight, top_k=top_k, norm_topk_prob=norm_topk_prob)


@implements("one_token.experts", "triton", checked_by=cases.experts)
def experts_triton(
    x: Tensor,
    weights: Tensor,
    numbers: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    from layers.triton.experts import experts

    return experts(x, weights, numbers, gates, gate_up, down, shared)
