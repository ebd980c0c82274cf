"""A conversation with a checkpoint: history, the cache between turns, streamed replies."""

import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache, common_prefix
from qwen3next.chat.messages import Content, History, Message, check_messages
from qwen3next.chat.reply import ReplyReader, Stats
from qwen3next.chat.template import ChatTemplate
from qwen3next.chat.thinking import CLOSE, OPEN, Piece, ThinkingSplitter
from qwen3next.generation.generate import drafting, stream
from qwen3next.generation.generation_config import GenerationConfig
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.sampling_rules import SamplingRules

SNAPSHOTS = 4  # snapshots kept between turns; each holds a copy of the recurrent states
HISTORY = 64  # tokens at the end of a reply that can be rolled back if the next prompt tokenizes them differently
# Replies and questions that start differently: the common prefix of their prompts starts every next prompt.
PROBES = (("A reply", "A question"), ("1", "?"))

__all__ = ["ChatTemplate", "Conversation", "GenerationConfig", "Stats", "ThinkingSplitter"]


class Conversation(History):
    """A history, and a model that continues it.

    Args:
        generation: how to sample and where to stop; None uses the model's generation_config.json. The template's
            eos_token always stops a reply.
        system: the system prompt; None leaves it to the template.
        variables: other variables of the template, e.g. {"enable_thinking": False}.
        max_context: largest number of tokens of prompt and reply; None means the model's max_position_embeddings.
        draft_tokens: tokens to guess and check at a time, or "auto", as in `Generation`: replies are the same.
    Attributes:
        stats: those of the last reply.
    Raises: ValueError for max_context below 1.
    """

    def __init__(
        self,
        model: Qwen3Next,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        generation: GenerationConfig | None = None,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_context: int | None = None,
        draft_tokens: int | str = 0,
    ):
        super().__init__(system=system)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        if generation is None:
            model.generation_config.warn()
        self.generation = model.generation_config if generation is None else generation
        self.variables = dict(variables or {})
        self.draft_tokens, (_, drafter) = draft_tokens, drafting(model, draft_tokens, "auto")
        self._mtp = drafter is not None and model.mtp is not None
        self.max_context = model.config.max_position_embeddings if max_context is None else max_context
        if self.max_context < 1:
            raise ValueError(f"max_context must be at least 1, got {max_context}.")
        self.stats: Stats | None = None
        self._cache: HybridCache | None = None
        self._stop_text = template.special_tokens.get("eos_token")
        self._stop_strings = (*self.generation.stop_strings, *([self._stop_text] if self._stop_text else []))
        given = self.generation.stop_tokens
        self._stop_tokens = set(model.stop_tokens if given is None else given)
        if self._stop_text and (token := tokenizer.token_to_id(self._stop_text)) is not None:
            self._stop_tokens.add(token)

    @property
    def stop_tokens(self) -> list[int]:
        """The ids that end a reply."""
        return sorted(self._stop_tokens)

    def reply(
        self,
        text: Content,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        rules: SamplingRules | None = None,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | None = None,
        seed: int | None = None,
    ) -> Generator[Piece, None, None]:
        """Reply to a message: yields ("thinking", text) and ("answer", text) as they are generated.

        The message and the reply are added to the history when the reply ends. Close the generator to stop early: the
        text so far is added; without any text, the history is unchanged.

        Args:
            max_new_tokens, temperature, top_k, top_p, rules: None uses `generation`; if that gives no max_new_tokens,
                2048.
            logit_bias: added to the logits of tokens, by id.
            grammar: what the answer must match. It begins behind the thinking that the prompt opens, if it does.
            seed: for sampling; None uses torch's global generator.
        Raises: ValueError for a conversation that is too long or that the template refuses; the history is unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        check_messages(messages)
        prompt = self.template.render(messages, variables=self.variables)
        ids = self._encode(prompt)
        if not ids:
            raise ValueError("The chat template gives an empty prompt for this conversation: check the template.")
        if len(ids) >= self.max_context:
            raise ValueError(
                f"The conversation has {len(ids)} tokens, which leaves no room for a reply in a context of "
                f"{self.max_context}: remove messages, or start a new conversation."
            )
        g = self.generation
        most = (g.max_new_tokens or 2048) if max_new_tokens is None else max_new_tokens
        options = {
            "max_new_tokens": min(most, self.max_context - len(ids)),
            "temperature": g.temperature if temperature is None else temperature,
            "top_k": g.top_k if top_k is None else top_k,
            "top_p": g.top_p if top_p is None else top_p,
            "rules": g.rules if rules is None else rules,
            "logit_bias": logit_bias,
            "grammar": grammar,
            "seed": seed,
            "stop_tokens": self.stop_tokens,
            "draft_tokens": self.draft_tokens,
        }
        opened = prompt.rstrip().endswith(OPEN)
        if grammar is not None and opened:
            options["grammar"] = replace(grammar, after=tuple(self._encode(CLOSE)))
        reader = ReplyReader(self.tokenizer, stop_tokens=self._stop_tokens, stop=self._stop_strings, opened=opened)
        return self._answer(messages, ids, reader, options)

    def _answer(
        self, messages: list[Message], ids: list[int], reader: ReplyReader, options: dict[str, Any]
    ) -> Generator[Piece, None, None]:
        cache, reused = self._take_cache(ids)
        self.stats = stats = Stats(len(ids), reused)
        said = {"thinking": "", "answer": ""}
        try:
            for kind, text in self._pieces(messages, cache, ids, reader, stats, options):
                said[kind] += text
                # Keep the cache only between forwards: Ctrl-C inside one leaves layers at different positions.
                self._cache = cache
                yield kind, text
                self._cache = None
            self._cache = cache
        finally:
            if any(said.values()) or stats.ended != "interrupted":
                thinking = {"reasoning_content": said["thinking"]} if said["thinking"] else {}
                self.messages = [*messages, {"role": "assistant", "content": said["answer"], **thinking}]

    def _pieces(
        self,
        messages: list[Message],
        cache: HybridCache,
        ids: list[int],
        reader: ReplyReader,
        stats: Stats,
        options: dict[str, Any],
    ) -> Generator[Piece, None, None]:
        began = time.perf_counter()
        prompt, kept = torch.tensor([ids], device=cache.tokens.device), self._kept(messages, ids)
        for begin, end in ((stats.reused, kept), (max(stats.reused, kept), len(ids))):
            if begin < end:
                for _ in self.model.prefill(prompt[:, begin:end], cache):
                    pass
            if end == kept:  # the next prompt shares this prefix, however the template writes the reply
                cache.snapshot(f"turn {len(messages)}")
        for name in list(cache.snapshots)[:-SNAPSHOTS]:
            del cache.snapshots[name]
        for token in stream(self.model, prompt, cache=cache, **options):
            pieces = reader.push(int(token))
            stats.new += 1
            stats.seconds = time.perf_counter() - began
            stats.prompt_seconds = stats.prompt_seconds or stats.seconds
            yield from pieces
            if reader.ended:
                break
        stats.ended = "stop" if reader.ended else "length"
        yield from reader.finish()

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def _kept(self, messages: list[Message], ids: list[int]) -> int:
        """Number of tokens of this prompt that the next prompt starts with; a thinking tag at the end may change."""
        kept, now = len(ids), torch.tensor(ids)
        for reply, question in PROBES:
            further = [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
            try:
                prompt = self.template.render([*messages, *further], variables=self.variables)
            except ValueError:  # the template refuses another message
                return len(ids)
            kept = min(kept, common_prefix(now, torch.tensor(self._encode(prompt))))
        return kept

    def _take_cache(self, ids: list[int]) -> tuple[HybridCache, int]:
        """The cache of the last turn, rolled back to the common prefix, or a new one; and the tokens it holds."""
        cache, self._cache = self._cache, None
        held = 0 if cache is None else cache.rewind_to(ids)
        if cache is None or not held:
            return self.model.new_cache(max_len=self.max_context, history=HISTORY, mtp=self._mtp), 0
        return cache, held
