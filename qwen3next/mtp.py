"""Multi-token prediction: one more block that looks a token further ahead."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.dispatch.attached import attached
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.norm import RMSNorm
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.block import Block
from qwen3next.config import ModelConfig
from qwen3next.hooks.wrappers import unwrapped


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
        state: KVCache | None = None,
    ) -> tuple[Float[Tensor, "b t width"], list]:
        """Hidden states for the head, and the router statistics of the block; `state` holds the pairs before."""
        # A sequence's last token has no next one: its result is not used and not counted. With a state each has one.
        cached = None if segments.unpadded else segments.mask
        counted = segments.next_is_same() if state is None else cached
        if not segments.unpadded:  # elsewhere stands another sequence's token, or none
            assert counted is not None
            next_embedding = next_embedding.masked_fill(~counted[..., None], 0.0)
        x, aux = self._pairs(hidden, next_embedding), []
        for block in self.blocks:
            x, stats = block(x, rope, segments=segments, state=state, counted=counted, stats=state is None)
            aux += [] if stats is None else [stats]
        return self.hook_final_norm(self.norm(x)), aux

    def remember(
        self,
        hidden: Float[Tensor, "b t width"],
        waiting: Float[Tensor, "n width"],
        embedding: Float[Tensor, "b t width"],
        rope: Rotation,
        segments: Segments,
        state: KVCache,
    ) -> None:
        """Add the pairs that these tokens complete: their keys and values, which is all that later ones need of them.

        Args:
            hidden: the main model's after these tokens, after its final norm; `waiting` after each sequence's last
                token before them.
            embedding: of these tokens.
            rope: of the places before theirs.
            state: a place for each token with its next, so one fewer than a sequence has tokens.
        """
        before, runs = F.pad(hidden[:, :-1], (0, 0, 1, 0)), segments.runs
        before[[run.row for run in runs], [run.begin for run in runs]] = waiting[[run.sequence for run in runs]]
        pairs, first = segments.pairs()
        if pairs is not None:
            before, embedding, block = before[:, first:], embedding[:, first:], unwrapped(self.blocks[0])
            assert isinstance(block, Block)
            rope = Rotation(rope.cos[:, first:], rope.sin[:, first:])
            called = (self, self.blocks[0], block, block.self_attn, unwrapped(block.self_attn))
            if attached(*called):  # whatever that is acts when they are called
                self(before, embedding, rope, pairs, state)
                return
            x = self._pairs(before, embedding)
            k, v = block.self_attn.keys_and_values(block.input_layernorm(x), rope)
            state.append(k, v, pairs)

    def _pairs(self, hidden: Tensor, next_embedding: Tensor) -> Tensor:
        next_embedding, hidden = self.hook_embed(next_embedding), self.hook_hidden(hidden)
        return self.fc(torch.cat((self.pre_fc_norm_embedding(next_embedding), self.pre_fc_norm_hidden(hidden)), dim=-1))
