"""The model: embeddings, blocks, final norm, head, and the multi-token prediction head.

`Qwen3Next` here is the definition: init, forward, loss. `q.Qwen3Next` (qwen3next/api.py) is this class with fast
decoding, prefill in chunks, hooks by name, choice of backends and saving around it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.cross_entropy import summed
from layers.gated_deltanet import GatedDeltaNet
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.moe import Experts, RouterStats
from layers.norm import GatedRMSNorm, RMSNorm
from layers.rope import Rotation, rotation
from layers.segments import Segments
from layers.variants.attention import AttentionVariant
from qwen3next.block import Block, BlockState
from qwen3next.cache.hybrid import Extension, HybridCache
from qwen3next.config import ModelConfig
from qwen3next.inputs import as_ids, as_tokens, check_segments, check_vocabulary, like
from qwen3next.losses import Losses, loss_sums, stacked
from qwen3next.mtp import MTP


@dataclass
class Output:
    """What a forward gives.

    Attributes:
        logits: (b, t or logits_to_keep, vocab).
        hidden: (b, t, width) after the final norm: what the heads read.
        aux: router statistics stacked over the sparse layers; None with a cache or in a dense model.
    """

    logits: Tensor
    hidden: Tensor
    aux: RouterStats | None


class Qwen3Next(nn.Module):
    """The hybrid language model with random weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, mixer=kind, sparse=config.is_sparse(i)) for i, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, zero_centred=config.zero_centred_norms)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.mtp_num_hidden_layers else None
        self.hook_embed = HookPoint("b t width")
        self.hook_final_normalized = HookPoint("b t width", dtype="fp32")  # before the final norm's scale
        self.hook_final_norm = HookPoint("b t width")
        self.hook_logits = HookPoint("b t vocab")
        self.hook_call: dict[str, Any] = {"position": 0}  # what the present call tells hooks
        self._warned_of_length = False
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear maps, experts, router and embeddings N(0, initializer_range); norms and decay as their modules say."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std)
            elif isinstance(module, (RMSNorm, GatedRMSNorm, GatedDeltaNet, AttentionVariant)):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        segments: Segments | None = None,
        cache: HybridCache | None = None,
        logits_to_keep: int = 0,
        *,
        inputs_embeds: Float[Tensor, "b t width"] | None = None,
    ) -> Output:
        """Predict the next token after each one.

        Args:
            input_ids: token ids; None where `inputs_embeds` says all.
            segments: where sequences begin and end (packed or padded rows); None means every row is one sequence. Where
                tokens are absent within a row, those behind them are moved up, as hooks see it.
            cache: what came before; extended by these tokens, without gradients.
            logits_to_keep: compute logits for the last so many columns only; 0 means all.
            inputs_embeds: what enters the first block in place of the embeddings of input_ids.
        Raises: ValueError for ids outside the vocabulary, an empty batch, or tokens that do not fit the cache.
        """
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must not be negative, got {logits_to_keep}: 0 keeps all of them.")
        tokens = as_tokens(input_ids, inputs_embeds)
        hidden, aux, _ = self.hidden_states(tokens, segments, cache, stats=cache is None, embeds=inputs_embeds)
        logits = self.hook_logits(self.lm_head(hidden[:, -logits_to_keep:]))
        return Output(logits, hidden, stacked(aux))

    def residual(
        self,
        stop_at_layer: int,
        input_ids: Int[Tensor, "b t"],
        segments: Segments | None = None,
        cache: HybridCache | None = None,
    ) -> Float[Tensor, "b t width"]:
        """The residual stream before block `stop_at_layer`, which may count from the end; later blocks do not run.

        Raises: as forward; ValueError for a block that is not there, or a cache, whose later layers would miss tokens.
        """
        count = len(self.blocks)
        if not -count <= stop_at_layer <= count:
            raise ValueError(f"Cannot stop before block {stop_at_layer} of {count}: choose {-count} to {count}.")
        if cache is not None:
            raise ValueError("Stopping at a layer would leave the cache half-filled: run without a cache.")
        stop = stop_at_layer + count if stop_at_layer < 0 else stop_at_layer
        input_ids = as_ids(input_ids)
        given = Segments.full(input_ids) if segments is None else segments
        check_segments(input_ids, given, cached=False)
        input_ids, segments = given.closed(input_ids)
        check_vocabulary(input_ids, self.vocab_size)
        return given.reopened(self._run_blocks(input_ids, segments, [None] * stop, stats=False)[0])

    def hidden_states(
        self,
        input_ids: Tensor,
        segments: Segments | None,
        cache: HybridCache | None,
        *,
        stats: bool,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats], Segments]:
        """Hidden states after the final norm, router statistics of the sparse layers, and where the sequences are."""
        check_segments(input_ids, segments, cached=cache is not None)
        if segments is not None and segments.gapped:
            ids, together = segments.closed(input_ids)
            embeds = None if embeds is None else segments.closed(embeds)[0]
            hidden, aux, _ = self.hidden_states(ids, together, cache, stats=stats, embeds=embeds)
            return segments.reopened(hidden), aux, segments
        if embeds is None:
            check_vocabulary(input_ids, self.vocab_size)
        if cache is None:
            segments = Segments.full(input_ids) if segments is None else segments
            states: list[BlockState] = [None] * len(self.blocks)
            return *self._run(input_ids, segments, states, stats=stats, embeds=embeds), segments
        with cache.extend(input_ids, segments, self) as call:
            hidden, aux = self._run(input_ids, call.segments, call.layers, stats=stats, embeds=embeds)
            self._complete(call, input_ids, hidden, embeds=embeds)
        return hidden, aux, call.segments

    def _run(
        self,
        input_ids: Tensor,
        segments: Segments,
        states: Sequence[BlockState],
        *,
        stats: bool,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        x, aux = self._run_blocks(input_ids, segments, states, stats=stats, embeds=embeds)
        return self.hook_final_norm(self.norm(x, hook_normalized=self.hook_final_normalized)), aux

    def _run_blocks(
        self,
        input_ids: Tensor,
        segments: Segments,
        states: Sequence[BlockState],
        *,
        stats: bool,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """The residual stream after as many blocks as there are states, and router statistics of the sparse ones."""
        self._warn_of_length(segments)
        same = len(set(segments.offsets)) == 1
        self.hook_call["position"] = segments.offsets[0] if same else segments.offsets
        x = segments.real(self.hook_embed(self.embed_tokens(input_ids) if embeds is None else embeds))
        rope = self._rotation(segments.positions, x.dtype)
        counted, aux = None if segments.unpadded else segments.mask, []
        for block, state in zip(self.blocks, states, strict=False):
            x, router = self._run_block(block, x, rope, segments=segments, state=state, counted=counted, stats=stats)
            aux += [] if router is None else [router]
        return x, aux

    def _run_block(
        self,
        block: nn.Module,
        x: Tensor,
        rope: Rotation,
        *,
        segments: Segments,
        state: BlockState,
        counted: Tensor | None,
        stats: bool,
    ) -> tuple[Tensor, RouterStats | None]:
        return block(x, rope, segments=segments, state=state, counted=counted, stats=stats)

    def _complete(self, call: Extension, input_ids: Tensor, hidden: Tensor, *, embeds: Tensor | None = None) -> None:
        """Finish a call that extends a cache: the MTP layer adds the pairs of tokens that it completes."""
        if call.mtp is not None and self.mtp is not None:
            before = call.hidden_before
            before = hidden.new_zeros(call.segments.sequences, hidden.shape[-1]) if before is None else before
            rope = self._rotation(call.segments.positions - 1, hidden.dtype)
            embeds = self.embed_tokens(input_ids) if embeds is None else embeds
            self.mtp.remember(hidden, before, embeds, rope, call.segments, call.mtp)
        call.hidden = hidden

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        c = self.config
        return rotation(positions, rotary_dim=c.rotary_dim, theta=c.rope_theta, dtype=dtype, yarn=c.rope_scaling)

    def _warn_of_length(self, segments: Segments) -> None:
        if torch.compiler.is_compiling() or self._warned_of_length or not segments.unpadded:
            return
        if (longest := max(segments.ends)) > self.config.longest_context:
            self._warned_of_length = True
            warnings.warn(
                f"Positions up to {longest} lie beyond the {self.config.longest_context} of this model: "
                "its answers may be noise. model.extend_context(factor) stretches them (YaRN).",
                stacklevel=6,
            )

    def loss(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        segments: Segments | None = None,
        labels: Tensor | None = None,
        mtp_depths: int = 1,
    ) -> Losses:
        """Training losses; nothing is predicted across a boundary of `segments`.

        Args:
            labels: (b, t) the tokens to predict, −100 where none is, aligned with input_ids (a token is predicted from
                the one before it); None means input_ids themselves.
            mtp_depths: how many tokens the MTP layer drafts in the MTP loss (qwen3next/mtp_depths.py).
        Raises: ValueError where no token has a target.
        """
        sums = loss_sums(self, input_ids, segments=segments, labels=labels, mtp_depths=mtp_depths)
        if not torch.compiler.is_compiling() and not sums.targets:
            if labels is not None and bool(
                (Segments.full(input_ids) if segments is None else segments).next_is_same().any()
            ):
                raise ValueError(
                    "The labels of all tokens that have one before them are -100: give at least one of them its id."
                )
            raise ValueError("No token here has a next one to predict: give sequences of at least two tokens.")
        return sums.losses(self.config)

    def _summed_cross_entropy(
        self, hidden: Tensor, place: Tensor, target: Tensor, segments: Segments, hook: HookPoint, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Σ −ln p(target) + z_loss · logsumexp², and Σ logsumexp² without gradient, over the places that have a target.

        `hook` sees the logits. The second sum is zero where z_loss is.
        """
        if hook is self.hook_logits:  # of all tokens, as in a forward; nothing at padding reaches a gradient
            logits = hook(self.lm_head(segments.real(hidden)))[place]
        else:
            logits = hook(self.lm_head(hidden[place]))
        return summed(logits, target, z_loss)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights; see `like`."""
        return like(self).dtype
