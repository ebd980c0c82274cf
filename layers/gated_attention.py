"""Softmax attention with a sigmoid gate on its output: every fourth token mixer of Qwen3-Next."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layers.backends import choose
from layers.fused_attention import NAMES as FUSED
from layers.fused_attention import attend_fused, fused_attention
from layers.hook_point import HookPoint
from layers.kv_state import KVState
from layers.linear import Linear
from layers.norm import RMSNorm, at_least_fp32
from layers.rope import Rotation
from layers.segments import Run, Segments
from layers.static_kv import StaticKV
from layers.tiled_attention import tiled_attention
from layers.wild import GradientsApart, one_by_one, wild

Heads = Float[Tensor, "b t h d"]
KVHeads = Float[Tensor, "b t kvh d"]
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
    t, s = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, time, d)
    square = mask is None and t == s
    if backend == "cpp":
        raise RuntimeError(
            'The "cpp" backend of attention is part of tiled_attention, and "attend" is not: choose "sdpa".'
        )
    choice = choose("attention", backend, q, head_dim=q.shape[-1])
    fused = choice != "eager"
    if fused:
        _refuse(tuple(point for point in (hook_scores, hook_pattern) if point is not None))
    if choice == "flash" and mask is not None:
        if backend == "flash":
            raise RuntimeError('The "flash" backend of attention takes no mask: choose "sdpa_flash".')
        choice = "sdpa_flash"
    if choice in FUSED:
        return attend_fused(choice, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
    if mask is None and 1 < t < s:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    if fused:
        # is_causal aligns the first query with the first key, so it serves only where t == s.
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, enable_gqa=k.shape[1] != q.shape[1]
        ).transpose(1, 2)
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, dim=1).mT * q.shape[-1] ** -0.5
    if square:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    scores = scores if hook_scores is None else hook_scores(scores)
    pattern = at_least_fp32(scores).softmax(-1).to(v.dtype)
    pattern = pattern if hook_pattern is None else hook_pattern(pattern)
    return (pattern @ v.repeat_interleave(share, dim=1)).transpose(1, 2)


class GatedAttention(nn.Module):
    """Grouped-query attention with normed q and k, partial RoPE, and y · σ(gate_proj(x)) before the output projection.

    Args:
        gate: "elementwise", "headwise" (one number a head) or "none".
        qk_norm: whether q and k are normed a head at a time, before RoPE.
        zero_centred: the kind of those norms, see `RMSNorm`.
        bias: whether all projections have one.
    Source: arXiv:2505.06708, the gates on the attention's output (G1).
    """

    def __init__(
        self,
        width: int,
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
        self.q_proj = Linear(width, heads * head_dim, bias=bias)
        gate_rows = GATE_ROWS[gate](head_dim)
        self.gate_proj = Linear(width, heads * gate_rows, bias=bias) if gate_rows else None
        self.k_proj = Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, width, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred) if qk_norm else nn.Identity()

        self.exposed_pattern = False  # `model.expose(pattern=…)`: run "eager" whatever the backend
        queries, keys = "b t h d", "b t kh d"
        self.hook_q_pre, self.hook_k_pre = HookPoint(queries), HookPoint(keys)  # before their norms
        self.hook_q, self.hook_k, self.hook_v = HookPoint(queries), HookPoint(keys), HookPoint(keys)
        self.hook_rot_q, self.hook_rot_k = HookPoint(queries), HookPoint(keys)  # after RoPE
        eager = 'model.set_backend("attention", "eager") or model.expose(pattern=[LAYER])'
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
        state: KVState | StaticKV | None = None,
    ) -> Float[Tensor, "b t width"]:
        """Mix tokens. `state`, where given, holds the tokens before, and takes those of this call."""
        x = x if segments is None else segments.real(x)
        q = self.hook_q_pre(self.q_proj(x).unflatten(-1, (self.heads, -1)))  # (b, t, heads, head_dim)
        q = self.hook_rot_q(rope(self.hook_q(self.q_norm(q))))
        k, v = self.keys_and_values(x, rope)
        y = self.hook_o(self._mix(q, k, v, Segments.full(x) if segments is None else segments, state))
        if self.gate_proj is not None:
            logit = self.hook_gate_logit(self.gate_proj(x).unflatten(-1, (self.heads, -1)))
            y = y * self.hook_gate(logit.sigmoid())
        return self.o_proj(self.hook_gated(y).flatten(-2))

    def keys_and_values(self, x: Float[Tensor, "b t width"], rope: Rotation) -> tuple[KVHeads, KVHeads]:
        """What later tokens will look at: keys, normed and rotated, and values."""
        k = self.hook_k(self.k_norm(self.hook_k_pre(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)))))
        v = self.hook_v(self.v_proj(x).unflatten(-1, (self.kv_heads, -1)))
        return self.hook_rot_k(rope(k)), v

    def _mix(self, q: Heads, k: KVHeads, v: KVHeads, segments: Segments, state: KVState | StaticKV | None) -> Heads:
        """Attention over the tokens of this call and those before, sequence by sequence."""
        if isinstance(state, StaticKV):
            return state.attend(q, k, v)
        q, k, v = (segments.real(x) for x in (q, k, v))
        if state is not None:
            state.append(k, v, segments)
        points = (self.hook_scores, self.hook_pattern)
        backend = "eager" if self.exposed_pattern else self.backend
        if q.device.type == "cuda" and torch.is_autocast_enabled("cuda"):  # kernels that it does not see
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        choice = choose("attention", backend, q, head_dim=self.head_dim)
        if choice in FUSED:
            _refuse(points)
            return fused_attention(choice, q, k, v, segments=segments, state=state)
        if q.device.type == "cpu" and not torch.is_grad_enabled() and choice != "eager":
            _refuse(points)
            if torch.is_autocast_enabled("cpu"):  # the kernel below is asked for by name, which autocast does not see
                q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
            if state is None and torch.compiler.is_compiling():
                return _in_tiles_whole(q, k, v, None if segments.plain else segments.number, backend)
            return _in_tiles(q, k, v, segments, state, backend)
        if state is None:
            if wild(segments, q, k, v):
                _refuse(points)

                def alone(_: Tensor | None, *parts: Tensor) -> tuple[Tensor, None]:
                    return attend(*parts, backend=backend), None

                return one_by_one(segments, None, alone, q, k, v)[0]
            mask, apart = None if segments.plain else segments.attention_mask, GradientsApart(segments)
            q, k, v = apart.inputs(q, k, v)
            y = attend(q, k, v, mask=mask, backend=backend, hook_scores=points[0], hook_pattern=points[1])
            return apart.output(y)
        if segments.packed:
            _refuse(points)
            y = torch.zeros_like(q)
            for n, row, begin, end, past in segments.runs:
                k, v = (x.transpose(1, 2) for x in state.read(0, past + end - begin, row=n, dtype=q.dtype))
                y[row : row + 1, begin:end] = attend(q[row : row + 1, begin:end], k, v, backend=backend)
            return y
        k, v = (x.transpose(1, 2) for x in state.read(0, max(segments.ends), dtype=q.dtype))
        mask = None
        if not segments.aligned:  # rows end at different places
            places = torch.arange(k.shape[1], device=k.device)
            mask = segments.positions[:, None, :, None] >= places
            stale = places >= torch.tensor(segments.ends, device=k.device)[:, None]  # of who stood there before
            k, v = (x.masked_fill(stale[..., None, None], 0.0) for x in (k, v))
        return attend(q, k, v, mask=mask, backend=backend, hook_scores=points[0], hook_pattern=points[1])


def _refuse(points: tuple[HookPoint, ...]) -> None:
    for point in points:
        if point.armed:
            point.refuse()


def _in_tiles(q: Heads, k: KVHeads, v: KVHeads, segments: Segments, state: KVState | None, backend: str) -> Heads:
    """`tiled_attention` over all rows at once where they stand at the same place, else a sequence at a time."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, time, d)
    if segments.aligned:

        def read_all(first: int, last: int) -> tuple[Tensor, Tensor]:
            return (
                (k[:, :, first:last], v[:, :, first:last]) if state is None else state.read(first, last, dtype=q.dtype)
            )

        return tiled_attention(q, read_all, past=segments.past[0], backend=backend).transpose(1, 2)
    y = torch.zeros_like(q)
    for run in segments.runs:

        def read(first: int, last: int, run: Run = run) -> tuple[Tensor, Tensor]:
            if state is not None:
                return state.read(first, last, row=run.sequence, dtype=q.dtype)
            here = slice(run.row, run.row + 1), slice(None), slice(run.begin + first, run.begin + last)
            return k[here], v[here]

        rows = slice(run.row, run.row + 1), slice(None), slice(run.begin, run.end)
        y[rows] = tiled_attention(q[rows], read, past=run.past, backend=backend)
    return y.transpose(1, 2)


@torch.library.custom_op("qwen3next::attend_in_tiles", mutates_args=(), device_types="cpu")
def _in_tiles_whole(q: Tensor, k: Tensor, v: Tensor, number: Tensor | None, backend: str) -> Tensor:
    """`_in_tiles` as an operator of torch, whose loops over tiles and sequences a traced graph need not unroll."""
    segments = Segments.full(q) if number is None else Segments.from_document_ids(number)
    return _in_tiles(q, k, v, segments, None, backend).contiguous()


@_in_tiles_whole.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, _number: Tensor | None, _backend: str) -> Tensor:
    return q.new_empty(q.shape)
