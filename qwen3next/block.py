"""One block: norm → token mixer → residual, norm → feed-forward → residual."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from layers.gated_attention import AttentionState
from layers.gated_deltanet import DeltaNetState
from layers.hook_point import HookPoint
from layers.mlp import SwiGLU
from layers.moe import RouterStats, SparseMoE
from layers.norm import RMSNorm
from layers.recompute import recomputing
from layers.rope import Rotation
from layers.segments import Segments
from qwen3next.config import ModelConfig
from qwen3next.mixers import linear_attention, softmax_attention

BlockState = AttentionState | DeltaNetState | None  # what a block's mixer keeps between calls; None: nothing


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
                intermediate_size=c.moe_intermediate_size,
                shared_intermediate_size=c.shared_expert_intermediate_size,
                norm_topk_prob=c.norm_topk_prob,
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
        state: BlockState = None,
        counted: Bool[Tensor, "b t"] | None = None,
        stats: bool = True,
    ) -> tuple[Float[Tensor, "b t width"], RouterStats | None]:
        """The residual stream after this block; router statistics over `counted` tokens where it is sparse."""
        return self.feed_forward(self.mix(x, rope, segments, state), counted, stats=stats)

    def mix(self, x: Tensor, rope: Rotation, segments: Segments, state: BlockState) -> Tensor:
        """The residual stream after the token mixer."""
        x = self.hook_resid_pre(x)
        y = self.input_layernorm(x)
        if self.mixer == "linear_attention":
            y = recomputing(self.linear_attn, y, segments=segments, state=state)
        else:
            y = recomputing(self.self_attn, y, rope, segments=segments, state=state)
        y = self.attn_out_norm(y) if self.sandwich else y
        return self.hook_resid_mid(x + self.hook_attn_out(y))

    def feed_forward(self, x: Tensor, counted: Tensor | None, *, stats: bool) -> tuple[Tensor, RouterStats | None]:
        """The residual stream after the feed-forward, which acts on each token by itself."""
        y, router = self.post_attention_layernorm(x), None
        if self.sparse:
            y, router = self.mlp(y, mask=counted, stats=stats)
        else:
            y = recomputing(self.mlp, y)
        y = self.mlp_out_norm(y) if self.sandwich else y
        return self.hook_resid_post(x + self.hook_mlp_out(y)), router
