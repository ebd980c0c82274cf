"""Multi-token prediction: one more block that looks a token further ahead."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.norm import RMSNorm
from layers.rope import Rotation
from layers.segments import Segments
from qwen3next.block import Block
from qwen3next.config import ModelConfig


class MTP(nn.Module):
    """From the main model's hidden state at token t and the embedding of token t + 1, predict token t + 2.

    norm(block(fc([norm_e(embed(x_{t+1})) ; norm_h(h_t)]))), then the main model's head. h_t is taken **after** the main
    model's final norm: taken before it, text still looks fluent and half of the accepted drafts are lost.
    Source: arXiv:2412.19437 section 2.2, tensors of Qwen3-Next-80B-A3B.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        self.fc = Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.blocks = nn.ModuleList(
            Block(c, mixer="full_attention", sparse=c.num_experts > 0) for _ in range(c.mtp_num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, zero_centred=c.zero_centred_norms)
        self.hook_embed = HookPoint("b t width")  # of the next token, before its norm
        self.hook_hidden = HookPoint("b t width")  # the main model's, before its norm here
        self.hook_final_norm = HookPoint("b t width")
        self.hook_logits = HookPoint("n vocab")  # of the n places that have a target

    def forward(
        self,
        hidden: Float[Tensor, "b t width"],
        next_embedding: Float[Tensor, "b t width"],
        rope: Rotation,
        segments: Segments,
    ) -> tuple[Float[Tensor, "b t width"], list]:
        """Hidden states for the head, and the router statistics of the block."""
        next_embedding, hidden = self.hook_embed(next_embedding), self.hook_hidden(hidden)
        x = torch.cat((self.pre_fc_norm_embedding(next_embedding), self.pre_fc_norm_hidden(hidden)), dim=-1)
        x, aux = self.fc(x), []
        # A sequence's last token has no next one: what it computes is read by nobody and counted nowhere.
        counted = segments.next_is_same()
        for block in self.blocks:
            x, stats = block(x, rope, segments=segments, counted=counted)
            aux += [] if stats is None else [stats]
        return self.hook_final_norm(self.norm(x)), aux
