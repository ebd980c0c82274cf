"""Softmax attention with a sigmoid gate on its output: every fourth token mixer of Qwen3-Next."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layers.deprecation import renamed_arguments
from layers.dispatch.autocast import as_multiplied
from layers.dispatch.backends import Like, run
from layers.dispatch.registry import implements
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.norm import RMSNorm, at_least_fp32
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.draft_keys import DraftKeys
from layers.state.kv_cache import KVCache
from layers.state.static_kv_cache import StaticKVCache

Heads = Float[Tensor, "b t h d"]
KVHeads = Float[Tensor, "b t kvh d"]
AttentionState = KVCache | StaticKVCache | DraftKeys
# Rows of the gate's projection a head, given head_dim.
GATE_ROWS: dict[str, Callable[[int], int]] = {"elementwise": lambda d: d, "headwise": lambda _: 1, "none": lambda _: 0}


def attend(
    q: Heads,
    k: Float[Tensor, "b s kvh d"],
    v: Float[Tensor, "b s kvh d"],
    *,
    mask: Bool[Tensor, "#b 1 t s"] | None = None,
    backend: str = "auto",
    hook_scores: HookPoint | None = None,
    hook_pattern: HookPoint | None = None,
) -> Heads:
    """softmax(q kᵀ / √d) v, with h / kvh query heads sharing a key head.

    Args:
        mask: True where a query may look; None means causal, the queries being the last t of the s tokens.
        backend: "eager" (scores and pattern as tensors, both pass their hook points), "sdpa", and on CUDA "flash"
            (flash-attn, which takes no mask) and "sdpa_flash" (torch's fused kernels alone); "auto" picks of these.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here, or a hook waits for
        scores or pattern and "eager" does not run.
    """
    points = {"hook_scores": hook_scores, "hook_pattern": hook_pattern}
    return run("attention", backend, Like(q.device, q.dtype, q.shape[-1]), q, k, v, mask=mask, **points)


@implements("attention", "eager", definition=True)
def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    hook_scores: HookPoint | None = None,
    hook_pattern: HookPoint | None = None,
) -> Tensor:
    """The definition: all scores, then all shares, then their sums of values."""
    t, s, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, time, d)
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    if mask is None:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    scores = scores if hook_scores is None else hook_scores(scores)
    pattern = at_least_fp32(scores).softmax(-1).to(v.dtype)
    pattern = pattern if hook_pattern is None else hook_pattern(pattern)
    return (pattern @ v).transpose(1, 2)


class GatedAttention(nn.Module):
    """Grouped-query attention with normed q and k, partial RoPE, and y · σ(gate_proj(x)) before the output projection.

    Args:
        gate: "elementwise", "headwise" (one number a head) or "none".
        qk_norm: whether q and k are normed a head at a time, before RoPE.
        zero_centred: the kind of those norms, see `RMSNorm`.
        bias: whether all projections have one.
    Source: arXiv:2505.06708, the gates on the attention's output (G1).
    """

    @renamed_arguments(width="hidden_size")
    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float = 1e-6,
        gate: str = "elementwise",
        qk_norm: bool = True,
        zero_centred: bool = True,
        bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads: make it a multiple.")
        if gate not in GATE_ROWS:
            raise ValueError(f"There is no gate {gate!r}: choose {', '.join(GATE_ROWS)}.")
        self.heads, self.kv_heads, self.head_dim, self.backend = heads, kv_heads, head_dim, backend
        self.q_proj = Linear(hidden_size, heads * head_dim, bias=bias)
        gate_rows = GATE_ROWS[gate](head_dim)
        self.gate_proj = Linear(hidden_size, heads * gate_rows, bias=bias) if gate_rows else None
        self.k_proj = Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred) if qk_norm else nn.Identity()

        self.materialized_pattern = False  # `model.materialize(pattern=…)`: run "eager" whatever the backend
        queries, keys = "b t h d", "b t kh d"
        self.hook_q_pre, self.hook_k_pre = HookPoint(queries), HookPoint(keys)  # before their norms
        self.hook_q, self.hook_k, self.hook_v = HookPoint(queries), HookPoint(keys), HookPoint(keys)
        self.hook_rot_q, self.hook_rot_k = HookPoint(queries), HookPoint(keys)  # after RoPE
        eager = 'model.set_backend("attention", "eager") or model.materialize(pattern=[LAYER])'
        self.hook_scores, self.hook_pattern = HookPoint("b h t s", route=eager), HookPoint("b h t s", route=eager)
        self.hook_o = HookPoint(queries)  # attention's answer before the gate
        if self.gate_proj is not None:
            shape = f"b t h {'d' if gate == 'elementwise' else 1}"
            self.hook_gate_logit, self.hook_gate = HookPoint(shape), HookPoint(shape)
        self.hook_gated = HookPoint(queries)  # the input of o_proj

    def forward(
        self,
        x: Float[Tensor, "b t width"],
        rope: Rotation,
        *,
        segments: Segments | None = None,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "b t width"]:
        """Mix tokens. `state`, where given, holds the tokens before, and takes those of this call."""
        x = x if segments is None else segments.real(x)
        q = self.hook_q_pre(self.q_proj(x).unflatten(-1, (self.heads, -1)))  # (b, t, heads, head_dim)
        q = self.hook_rot_q(rope(self.hook_q(self.q_norm(q))))
        k, v = self.keys_and_values(x, rope)
        y = self.hook_o(self.attend(q, k, v, Segments.full(x) if segments is None else segments, state))
        if self.gate_proj is not None:
            logit = self.hook_gate_logit(self.gate_proj(x).unflatten(-1, (self.heads, -1)))
            y = y * self.hook_gate(logit.sigmoid())
        return self.o_proj(self.hook_gated(y).flatten(-2))

    def keys_and_values(self, x: Float[Tensor, "b t width"], rope: Rotation) -> tuple[KVHeads, KVHeads]:
        """What later tokens will look at: keys, normed and rotated, and values."""
        k = self.hook_k(self.k_norm(self.hook_k_pre(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)))))
        v = self.hook_v(self.v_proj(x).unflatten(-1, (self.kv_heads, -1)))
        return self.hook_rot_k(rope(k)), v

    def attend(self, q: Heads, k: KVHeads, v: KVHeads, segments: Segments, state: AttentionState | None) -> Heads:
        """`attend` in every sequence: over its keys and values of this call, behind those that `state` holds."""
        q, k, v = (segments.real(x) for x in (q, k, v))
        if state is not None:
            state.append(k, v, segments)
        backend = "eager" if self.materialized_pattern else self.backend
        points = {"hook_scores": self.hook_scores, "hook_pattern": self.hook_pattern}
        like = as_multiplied(q, head_dim=self.head_dim)
        return run("attention.sequences", backend, like, q, k, v, segments=segments, state=state, **points)
