"""The options of commands that choose tokens."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwen3next.generation.choice import check_range
from qwen3next.generation.generation_config import GenerationConfig
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.sampling_rules import SamplingRules

NEUTRAL = GenerationConfig()


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen. What is not given comes, in `chat` and `ask`, from generation_config.json.

    Attributes:
        temperature: 0, the default, always takes the most likely token; larger values are more varied.
        top_k: sample from the k most likely tokens; 0, the default, means all.
        top_p: sample from the most likely tokens with this total probability; by default 1, all.
        min_p: leave out tokens less likely than this fraction of the most likely one.
        repetition_penalty: above 1, tokens of the text so far are less likely.
        presence_penalty: subtracted from the logit of a token that was generated.
        frequency_penalty: subtracted from the logit of a token for every time that it was generated.
        logit_bias: TOKEN=NUMBER, added to the logit of a token id; may be repeated.
        ban: id of a token that is never generated; may be repeated.
        min_new_tokens: no end before this many tokens.
        seed: seed for a temperature above 0; the same seed gives the same text on one machine.
        json_schema: file with a JSON schema that the new text must follow.
        regex: regular expression that the new text must match.
        grammar: file with a grammar in Lark's form that the new text must match.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[str, ...] = ()
    ban: tuple[int, ...] = ()
    min_new_tokens: int | None = None
    seed: int | None = None
    json_schema: Path | None = None
    regex: str | None = None
    grammar: Path | None = None

    def options(
        self, tokenizer: Tokenizer, vocab_size: int, stops: tuple[int, ...], otherwise: GenerationConfig = NEUTRAL
    ) -> dict[str, Any]:
        """Options of `Generation` but for the stop tokens.

        Args:
            otherwise: what holds for options that are not given.
        Raises: ValueError for values out of range, several grammars, or one that cannot be read or followed.
        """
        options: dict[str, Any] = {
            "temperature": otherwise.temperature if self.temperature is None else self.temperature,
            "top_k": otherwise.top_k if self.top_k is None else self.top_k,
            "top_p": otherwise.top_p if self.top_p is None else self.top_p,
            "seed": self.seed,
            "logit_bias": self._bias(),
            "rules": self._rules(otherwise.rules),
            "grammar": self._grammar(tokenizer, vocab_size, stops),
        }
        check_range(options["temperature"], options["top_k"], options["top_p"])
        return options

    def _rules(self, otherwise: SamplingRules) -> SamplingRules:
        names = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(otherwise, suppress_tokens=(*otherwise.suppress_tokens, *self.ban), **given)

    def _bias(self) -> dict[int, float]:
        found = {}
        for entry in self.logit_bias:
            token, _, number = entry.partition("=")
            try:
                found[int(token)] = float(number)
            except ValueError:
                raise ValueError(f"--logit-bias {entry!r} is not TOKEN=NUMBER, such as 42=-3.5.") from None
        return found

    def _grammar(self, tokenizer: Tokenizer, vocab_size: int, stops: tuple[int, ...]) -> Grammar | None:
        makers = (Grammar.json_schema, self.json_schema), (Grammar.regex, self.regex), (Grammar.lark, self.grammar)
        given = [(make, source) for make, source in makers if source is not None]
        if len(given) > 1:
            raise ValueError("--json-schema, --regex and --grammar exclude each other: give one.")
        for make, source in given:
            try:
                text = source.read_text("utf-8") if isinstance(source, Path) else source
            except UnicodeDecodeError:
                raise ValueError(f"{source} is not UTF-8 text.") from None
            return make(text, tokenizer, vocab_size=vocab_size, stop_tokens=stops)
        return None
