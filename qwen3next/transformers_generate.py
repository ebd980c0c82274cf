"""`generate` of the classes in qwen3next/hf.py: caches, steps, and drafts of the MTP layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode

from layers.dispatch.attached import attached
from qwen3next.api import Qwen3Next
from qwen3next.cache.transformers_cache import HybridLayers, adopted
from qwen3next.decoding.plan import available_plan
from qwen3next.generation.drafts import DraftLength, measured
from qwen3next.generation.generate import MOST_DRAFTS

# The default of `num_assistant_tokens`. With it the MTP layer drafts up to MOST_DRAFTS tokens, by measured times.
UNSET = GenerationConfig()._get_default_generation_params()["num_assistant_tokens"]
MOST_STEPPED = 16  # tokens that run as a step; for more, matrix products of the modules are as fast


def stepped(
    model: Any, cache: Any, tokens: Tensor | None, mask: Tensor | None, logits_to_keep: int | Tensor
) -> Tensor | None:
    """Logits (b, t, vocab) where a call of real tokens (b, t) behind a cache can run as a step; else None.

    Args:
        model: the backbone, with `core`.
    """
    if not isinstance(cache, HybridLayers) or cache.columns is None or tokens is None or torch.is_grad_enabled():
        return None
    if mask is not None and (mask.ndim != 2 or not bool((mask[:, -tokens.shape[1] :] != 0).all())):
        return None
    if tokens.shape[1] > 1:
        t = tokens.shape[1]
        if t > MOST_STEPPED or isinstance(logits_to_keep, Tensor) or logits_to_keep not in (0, t):
            return None
        plan = available_plan(model.core)  # without one, the modules run all tokens at once
        if plan is None or cache.hybrid is None or not plan.supports(cache.hybrid):
            return None
    return None if attached(model) else cache.step(model.core, tokens)


class Generates(GenerationMixin):
    """transformers' `generate` over a HybridCache, with `use_mtp=True` for drafts of the checkpoint's MTP layer."""

    _held = 0  # tokens that the cache of a run with drafts holds when it begins

    @property
    def core(self) -> Qwen3Next:
        raise NotImplementedError

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict:
        """transformers'; without the tokens that a cache holds, which its assisted decoding (5.23) would run again."""
        if self._held and is_first_iteration and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - self._held
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if (cache := model_kwargs.get("past_key_values")) is not None:
            adopted(cache)  # before masks are made for it

    def _validate_generation_mode(self, mode: Any, generation_config: GenerationConfig, options: dict) -> None:
        if mode == GenerationMode.ASSISTED_GENERATION and generation_config.use_mtp and self.core.mtp is None:
            raise ValueError("This checkpoint has no MTP layer, which use_mtp=True needs: leave it out.")
        super()._validate_generation_mode(mode, generation_config, options)

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *, logits_processor: list, model_kwargs: dict, **options: Any
    ) -> CandidateGenerator:
        if generation_config.use_mtp:
            return MTPCandidates(lambda: self.core, model_kwargs["past_key_values"], generation_config)
        rules = LogitsProcessorList([rule for rule in logits_processor if not isinstance(rule, InOrder)])
        return super()._get_candidate_generator(
            generation_config, logits_processor=rules, model_kwargs=model_kwargs, **options
        )

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: list,
        stopping_criteria: list,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        """transformers'; drafts without probabilities leave the sampled tokens of a seed as they are."""
        drafted = generation_config.use_mtp or generation_config.prompt_lookup_num_tokens is not None
        draws = InOrder() if generation_config.do_sample and drafted else None
        if draws is not None:
            generation_config.do_sample = False  # of this call's copy
            logits_processor = LogitsProcessorList([*logits_processor, draws])
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        if cache is not None and (mask is None or mask.shape[1] == input_ids.shape[1]):  # else new tokens alone
            self._held = cache.get_seq_length()
        try:
            out = super()._assisted_decoding(
                input_ids, logits_processor, stopping_criteria, generation_config, **options
            )
        finally:
            self._held = 0
        if draws is not None and not isinstance(out, Tensor) and out.scores is not None:
            out.scores = tuple(draws.scores)
        return out


class InOrder(LogitsProcessor):
    """Draws tokens as `generate` does without drafts: one call of torch.multinomial a token, in the text's order.

    transformers asks for scores at every draft at once. Behind a draft that was not drawn nothing is drawn, so that
    torch's generator stands where it would stand without drafts. The score of a drawn token is infinite.

    Attributes:
        scores: (1, vocab) each, from which the tokens were drawn.
    """

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self._token: Tensor | None = None
        self._length = -1  # of the text with that token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._token is not None and (
            input_ids.shape[1] != self._length or not torch.equal(input_ids[:, -1:], self._token)
        ):
            return scores  # not used
        self._token = torch.multinomial(scores.softmax(-1), num_samples=1)
        self._length = input_ids.shape[1] + 1
        self.scores.append(scores)
        return torch.full_like(scores, -torch.inf).scatter(1, self._token, torch.inf)


class MTPCandidates(CandidateGenerator):
    """The drafts of `q.generate(drafts="mtp")` for transformers' assisted decoding.

    Args:
        core: gives the model.
        cache: of this run; empty, or one that an earlier run with use_mtp filled.
        settings: `num_assistant_tokens` are drafted a round; where it is not set, as many as promise the most tokens a
            second, up to 4.
    Raises: ValueError for a cache without the MTP layer's keys and values, or fewer than one draft.
    """

    def __init__(self, core: Callable[[], Qwen3Next], cache: HybridLayers, settings: GenerationConfig):
        self.core, self.cache, self.longest = core, cache, settings.max_length
        if cache.hybrid is not None and cache.hybrid.unwritten_mtp is None:
            raise ValueError(
                "This cache was filled without use_mtp=True, so it lacks the MTP layer's part: pass an empty cache."
            )
        cache.drafting = True
        count = settings.num_assistant_tokens
        if count < 1:
            raise ValueError(f"num_assistant_tokens must be at least 1, got {count}.")
        most = MOST_DRAFTS if count == UNSET else int(count)
        known = measured(core(), "mtp", 1, sampled=bool(settings.do_sample))
        self._length = DraftLength(most, adapt=count == UNSET, known=known)
        self._drafted = -1  # tokens of this round; -1 in the first, which may have to run the prompt
        self._timed = False  # whether it is a round whose time counts

    def get_candidates(self, input_ids: Tensor, **_options: Any) -> tuple[Tensor, None]:
        """The text (1, t) and its drafts behind it; none before the prompt has run."""
        first, self._timed, self._drafted = self._drafted < 0, False, 0
        if self.cache.hybrid is None or (first and self.cache.get_seq_length() != input_ids.shape[1] - 1):
            return input_ids, None
        self._timed = True
        self._drafted = max(min(self._length.begin(), self.longest - input_ids.shape[1] - 1), 0)
        if not self._drafted:
            return input_ids, None
        drafts = self.core().draft_tokens(self.cache.hybrid, input_ids[:, -1], self._drafted)
        return torch.cat((input_ids, drafts), dim=1), None

    def update_candidate_strategy(self, _input_ids: Tensor, _scores: Tensor, num_matches: int) -> None:
        """Note the time of the round, and how many of its drafts were accepted."""
        if self._timed:
            self._length.end(self._drafted, [int(num_matches)])
