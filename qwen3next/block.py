"""One block: norm → token mixer → residual, norm → feed-forward → residual."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layers.gated_attention import GatedAttention
from layers.gated_deltanet import DeltaNetState, GatedDeltaNet
from layers.hook_point import HookPoint
from layers.kv_state import KVState
from layers.mlp import SwiGLU
from layers.moe import RouterStats, SparseMoE
from layers.norm import RMSNorm, at_least_fp32
from layers.rope import Rotation
from layers.segments import Segments
from qwen3next.config import ModelConfig

TOKENS = 2048  # of a long prompt that a Gated DeltaNet block takes at a time; whole chunks of the delta rule


class Block(nn.Module):
    """`mixer` is "linear_attention" (Gated DeltaNet, named linear_attn) or "full_attention" (named self_attn)."""

    def __init__(self, config: ModelConfig, *, mixer: str, sparse: bool):
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        if mixer == "linear_attention":
            self.linear_attn = GatedDeltaNet(
                c.hidden_size,
                key_heads=c.linear_num_key_heads,
                value_heads=c.linear_num_value_heads,
                key_dim=c.linear_key_head_dim,
                value_dim=c.linear_value_head_dim,
                conv_taps=c.linear_conv_kernel_dim,
                eps=c.rms_norm_eps,
            )
        else:
            self.self_attn = GatedAttention(
                c.hidden_size,
                heads=c.num_attention_heads,
                kv_heads=c.num_key_value_heads,
                head_dim=c.head_dim,
                eps=c.rms_norm_eps,
                gate=c.attention_gate,
                qk_norm=c.use_qk_norm,
                zero_centred=c.zero_centred_norms,
                bias=c.attention_bias,
            )
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
        self.mixer, self.sparse = mixer, sparse
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
        state: KVState | DeltaNetState | None = None,
        counted: Bool[Tensor, "b t"] | None = None,
        stats: bool = True,
    ) -> tuple[Float[Tensor, "b t width"], RouterStats | None]:
        """The residual stream after this block; router statistics over `counted` tokens where it is sparse."""
        if isinstance(state, DeltaNetState) and x.shape[1] > TOKENS and not stats and self._may_split(x, segments):
            return self._in_parts(x, rope, state), None
        x = self.hook_resid_pre(x)
        y = self.input_layernorm(x)
        if self.mixer == "linear_attention":
            y = self.linear_attn(y, segments=segments, state=state)
        else:
            y = self.self_attn(y, rope, segments=segments, state=state)
        x = self.hook_resid_mid(x + self.hook_attn_out(y))
        y, router = self.post_attention_layernorm(x), None
        y, router = self.mlp(y, mask=counted, stats=stats) if self.sparse else (self.mlp(y), None)
        return self.hook_resid_post(x + self.hook_mlp_out(y)), router

    def _in_parts(self, x: Tensor, rope: Rotation, state: DeltaNetState) -> Tensor:
        """TOKENS at a time, the memory carried in full precision: the same bits, and temporaries that do not grow."""
        own = DeltaNetState(state.conv, at_least_fp32(state.memory))
        y = torch.empty_like(x)
        for part, into in zip(x.split(TOKENS, dim=1), y.split(TOKENS, dim=1), strict=True):
            into.copy_(self(part, rope, segments=Segments.full(part), state=own, stats=False)[0])
        state.conv, state.memory = own.conv, own.memory.to(state.memory.dtype)
        return y

    def _may_split(self, x: Tensor, segments: Segments) -> bool:
        """Whether nobody could tell: whole rows, no gradients, no graph being traced, no hook of any kind inside."""
        if x.device.type != "cpu" or not segments.plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not any(
            m._forward_hooks or m._forward_pre_hooks or (isinstance(m, HookPoint) and m.active) for m in self.modules()
        )
