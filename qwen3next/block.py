"""One block: norm → token mixer → residual, norm → feed-forward → residual."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layers.dispatch.attached import attached
from layers.gated_deltanet import DeltaNetState
from layers.hook_point import HookPoint
from layers.kernels.linear import FEW, spans
from layers.kernels.tiled_attention import TILE
from layers.mlp import SwiGLU
from layers.moe import RouterStats, SparseMoE
from layers.norm import RMSNorm, at_least_fp32
from layers.recompute import recomputing
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.kv_cache import KVState
from layers.state.static_kv_cache import StaticKV
from layers.state.update_log import Tape
from qwen3next.config import ModelConfig
from qwen3next.mixers import linear_attention, softmax_attention

TOKENS = 2048  # of a long prompt that a block takes at a time; whole chunks of the delta rule, whole tiles of attention


class Block(nn.Module):
    """`mixer` is "linear_attention" (Gated DeltaNet, named linear_attn) or "full_attention" (named self_attn)."""

    def __init__(self, config: ModelConfig, *, mixer: str, sparse: bool):
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        if mixer == "linear_attention":
            self.linear_attn = linear_attention(c)
        else:
            self.self_attn = softmax_attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        self.mlp: SparseMoE | SwiGLU
        if sparse:
            self.mlp = SparseMoE(
                c.hidden_size,
                experts=c.num_experts,
                top_k=c.num_experts_per_tok,
                inner=c.moe_intermediate_size,
                shared_inner=c.shared_expert_intermediate_size,
                renormalise=c.norm_topk_prob,
            )
        else:
            self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)
        self.mixer, self.sparse, self.sandwich = mixer, sparse, c.sandwich_norm
        if self.sandwich:
            self.attn_out_norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
            self.mlp_out_norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        stream = "b t width"
        self.hook_resid_pre, self.hook_resid_mid = HookPoint(stream), HookPoint(stream)
        self.hook_resid_post = HookPoint(stream)
        self.hook_attn_out, self.hook_mlp_out = HookPoint(stream), HookPoint(stream)

    def forward(
        self,
        x: Float[Tensor, "b t width"],
        rope: Rotation,
        *,
        segments: Segments,
        state: KVState | StaticKV | DeltaNetState | None = None,
        counted: Bool[Tensor, "b t"] | None = None,
        stats: bool = True,
    ) -> tuple[Float[Tensor, "b t width"], RouterStats | None]:
        """The residual stream after this block; router statistics over `counted` tokens where it is sparse."""
        split = not (stats or torch.compiler.is_compiling()) and x.shape[1] >= TOKENS + FEW and self._may_split(x)
        if split and segments.plain and segments.aligned and isinstance(state, (KVState, DeltaNetState)):
            return self._in_parts(x, rope, segments, state), None
        x = self.hook_resid_pre(x)
        y = self.input_layernorm(x)
        if self.mixer == "linear_attention":
            y = recomputing(self.linear_attn, y, segments=segments, state=state)
        else:
            y = recomputing(self.self_attn, y, rope, segments=segments, state=state)
        y = self.attn_out_norm(y) if self.sandwich else y
        x = self.hook_resid_mid(x + self.hook_attn_out(y))
        if split:
            parts = [self._feed(x[:, a:b], None, stats=False)[0] for a, b in spans(x.shape[1], TOKENS)]
            return torch.cat(parts, dim=1), None
        return self._feed(x, counted, stats=stats)

    def _feed(self, x: Tensor, counted: Tensor | None, *, stats: bool) -> tuple[Tensor, RouterStats | None]:
        """What the feed-forward makes of the stream, a token at a time."""
        y, router = self.post_attention_layernorm(x), None
        if self.sparse:
            y, router = self.mlp(y, mask=counted, stats=stats)
        else:
            y = recomputing(self.mlp, y)
        y = self.mlp_out_norm(y) if self.sandwich else y
        return self.hook_resid_post(x + self.hook_mlp_out(y)), router

    def _in_parts(self, x: Tensor, rope: Rotation, segments: Segments, state: KVState | DeltaNetState) -> Tensor:
        """TOKENS at a time, the memory carried in full precision: the same bits, and temporaries that do not grow."""
        past, t, noted, lead = segments.past[0], x.shape[1], 0, 0
        own = state if isinstance(state, KVState) else DeltaNetState(state.conv, at_least_fp32(state.memory))
        if isinstance(state, KVState):
            lead = past % TILE  # attention's tiles, which lie on a grid of all positions, stay whole
            state.reserve(segments)  # once for all
        y = torch.empty_like(x)
        for place, stop in spans(lead + t, TOKENS):
            begin, end = max(place - lead, 0), stop - lead
            if isinstance(state, DeltaNetState) and isinstance(own, DeltaNetState):
                noted += _noted(state, own, begin, end)
            here = Segments.full(x[:, begin:end]).after([past + begin] * len(x))
            turn = Rotation(rope.cos[:, begin:end], rope.sin[:, begin:end])
            y[:, begin:end] = self(x[:, begin:end], turn, segments=here, state=own, stats=False)[0]
        if isinstance(state, DeltaNetState) and isinstance(own, DeltaNetState):
            if own.tape is not None:
                own.tape.join(noted)
                own.tape.dtype = state.memory.dtype
            state.conv, state.memory, state.tape = own.conv, own.memory.to(state.memory.dtype), own.tape
        return y

    def _may_split(self, x: Tensor) -> bool:
        """Whether nobody could tell: no gradients, no hook of any kind inside."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return False
        return not attached(*self.modules())


def _noted(state: DeltaNetState, own: DeltaNetState, begin: int, end: int) -> bool:
    """Whether the part from `begin` to `end` of a call is noted; its own state then has a tape to note it on."""
    if state.tape is None or state.cut >= end:
        return False
    own.cut = max(state.cut - begin, 0)  # notes begin here, or go on
    if state.cut == begin and begin:
        own.tape = Tape(own.conv, own.memory, own.memory.dtype)
    elif own.tape is None:
        own.tape = state.tape
    return True
