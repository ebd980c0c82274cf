"""Questions about a document that is prefilled once."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import common_prefix
from qwen3next.chat.reply import ReplyReader, Stats
from qwen3next.chat.template import ChatTemplate
from qwen3next.chat.thinking import CLOSE, OPEN, Piece
from qwen3next.generation.generate import stream
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.sampling_rules import SamplingRules
from qwen3next.generation.text import TextStream
from qwen3next.prefix.store import Prefill, PrefixStore

# Questions that start differently: the common prefix of their prompts is the document.
PROBES = ("A question", "1", "\u201c", "?")


class Document:
    """A text in front of every question. Its KV cache and states are computed once and kept in a prefix store.

    With a chat template, a prompt is one user message: the document, an empty line and the question. Without one, it is
    the document followed by the question, and the model continues this text.

    Args:
        text: the document.
        template: the checkpoint's chat template; None continues plain text.
        store: the prefix store; None makes one in memory.
        system: the system prompt; None leaves it to the template.
        variables: other variables of the template, e.g. {"enable_thinking": False}.
        chunk_size, max_memory: as for `model.prefill`.
    Attributes:
        tokens: number of tokens that all prompts start with: the document and the template's text before it.
        stats: those of the last answer.
    Raises: ValueError for an empty document, or a system prompt without a template.
    """

    def __init__(
        self,
        model: Qwen3Next,
        tokenizer: Tokenizer,
        text: str,
        *,
        template: ChatTemplate | None = None,
        store: PrefixStore | None = None,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        chunk_size: int = 4096,
        max_memory: int | str | None = None,
    ):
        if not text.strip():
            raise ValueError("The document is empty: give a text.")
        if template is None and (system is not None or variables):
            raise ValueError("system and variables need a chat template: give one, or leave them out.")
        self.model, self.tokenizer, self.text, self.template = model, tokenizer, text, template
        model.generation_config.warn()
        self.store = PrefixStore(model) if store is None else store
        self.system, self.variables = system, dict(variables or {})
        self._bounds: dict[str, Any] = {"chunk_size": chunk_size, "max_memory": max_memory}
        first, *others = (self._encode(self._prompt(probe)) for probe in PROBES)
        self.tokens = min(common_prefix(first, other) for other in others)
        self._ids = first[: self.tokens]
        self.stats: Stats | None = None
        self._stop_text = None if template is None else template.special_tokens.get("eos_token")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        end = None if self._stop_text is None else self.tokenizer.token_to_id(self._stop_text)
        return tuple(sorted({*self.model.stop_tokens, *(() if end is None else (end,))}))

    def read(self) -> Prefill:
        """A prefill of the document's tokens that the store does not hold; iterate over it to run it."""
        return self.store.prefill(self._ids, **self._bounds)

    def answer(
        self,
        question: str,
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
        """Yield ("thinking", text) and ("answer", text) as they are generated. Questions are independent.

        Args:
            max_new_tokens, temperature, top_k, top_p, rules: None uses the checkpoint's generation_config.json; if that
                gives no max_new_tokens, 512.
            logit_bias: added to the logits of tokens, by id.
            grammar: what the answer must match. It begins behind the thinking that the prompt opens, if it does.
            seed: for sampling; None uses torch's global generator.
        Raises: ValueError for an empty question with a template, or a prompt that the template refuses.
        """
        if self.template is not None and not question.strip():
            raise ValueError("The question is empty: give a text.")
        prompt = self._prompt(question)
        ids, began = self._encode(prompt), time.perf_counter()
        g = self.model.generation_config
        max_new_tokens = (g.max_new_tokens or 512) if max_new_tokens is None else max_new_tokens
        opened = self.template is not None and prompt.rstrip().endswith(OPEN)
        reader = self._reader(opened=opened)
        if grammar is not None and opened:
            grammar = replace(grammar, after=tuple(self.tokenizer.encode(CLOSE, add_special_tokens=False).ids))
        points = [self.tokens] if self.tokens < len(ids) else []
        run = self.store.prefill(ids, max_len=len(ids) + max_new_tokens, points=points, **self._bounds)
        for _ in run:
            pass
        self.stats = stats = Stats(len(ids), run.matched_tokens)
        tokens: Iterator[torch.Tensor] = stream(
            self.model,
            ids[None].to(run.cache.tokens.device),
            cache=run.cache,
            max_new_tokens=max_new_tokens,
            temperature=g.temperature if temperature is None else temperature,
            top_k=g.top_k if top_k is None else top_k,
            top_p=g.top_p if top_p is None else top_p,
            rules=g.rules if rules is None else rules,
            logit_bias=logit_bias,
            grammar=grammar,
            stop_tokens=self.stop_tokens,
            seed=seed,
        )
        for token in tokens:
            pieces = reader.push(int(token))
            stats.new += 1
            stats.seconds = time.perf_counter() - began
            stats.prompt_seconds = stats.prompt_seconds or stats.seconds
            yield from pieces
            if reader.ended:
                break
        stats.ended = "stop" if reader.ended else "length"
        yield from reader.finish()

    def _prompt(self, question: str) -> str:
        if self.template is None:
            return self.text + question
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages.append({"role": "user", "content": f"{self.text.rstrip()}\n\n{question.strip()}"})
        return self.template.render(messages, variables=self.variables)

    def _encode(self, prompt: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer.encode(prompt, add_special_tokens=self.template is None).ids)

    def _reader(self, *, opened: bool) -> "ReplyReader | PlainReader":
        stops, texts = set(self.stop_tokens), self.model.generation_config.stop_strings
        if self.template is None:
            return PlainReader(self.tokenizer, stop_tokens=stops, stop=texts)
        texts = (*texts, self._stop_text) if self._stop_text else texts
        return ReplyReader(self.tokenizer, stop_tokens=stops, stop=texts, opened=opened)


class PlainReader:
    """As `ReplyReader`, for text without markup."""

    def __init__(self, tokenizer: Tokenizer, *, stop_tokens: set[int], stop: Sequence[str] = ()):
        self._text, self._stop = TextStream(lambda ids: tokenizer.decode(ids), stop=stop), stop_tokens
        self.ended = False

    def push(self, token: int) -> list[Piece]:
        self.ended = token in self._stop
        if self.ended:
            return []
        text = self._text.push(token)
        self.ended = self._text.stopped
        return [("answer", text)]

    def finish(self) -> list[Piece]:
        return [("answer", self._text.finish())]
