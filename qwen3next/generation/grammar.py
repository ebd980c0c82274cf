"""Restrict a text to a JSON schema, a regular expression or a grammar, through llguidance.

grammar = Grammar.json_schema(schema, tokenizer)        # a tokenizers.Tokenizer
q.generate(model, ids, grammar=grammar)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grammar:
    """What a generated text must match, for a tokenizer.

    Attributes:
        source: the grammar in llguidance's form.
        tokens: llguidance's view of the tokenizer.
        after: the grammar begins behind these tokens, such as the id of `</think>`; what is generated before them is
            free. Empty if it begins with the first generated token.
    """

    source: str
    tokens: Any
    after: tuple[int, ...] = ()

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, tokenizer: Any, **options: Any) -> "Grammar":
        """JSON that a schema describes. Raises: ValueError for a schema that cannot be followed."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return cls._made("json_schema", text, tokenizer, **options)

    @classmethod
    def regex(cls, pattern: str, tokenizer: Any, **options: Any) -> "Grammar":
        """Text that matches a regular expression (Rust's syntax). Raises: ValueError for a pattern that is not one."""
        return cls._made("regex", pattern, tokenizer, **options)

    @classmethod
    def lark(cls, source: str, tokenizer: Any, **options: Any) -> "Grammar":
        """Text of a context-free grammar in Lark's form. Raises: ValueError for a grammar that is not one."""
        return cls._made("lark", source, tokenizer, **options)

    @classmethod
    def _made(
        cls,
        kind: str,
        text: str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        stop_tokens: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> "Grammar":
        """Args:
        tokenizer: a `tokenizers.Tokenizer`, or what `token_table` returned for one, to be used by several grammars.
        vocab_size: of the model, where its logits are wider than the tokenizer.
        stop_tokens: ids that end the text; possible where the grammar is complete.
        after: see the class.
        """
        llguidance = _llguidance()
        tokens = tokenizer
        if not isinstance(tokenizer, llguidance.LLTokenizer):
            tokens = token_table(tokenizer, vocab_size=vocab_size, stop_tokens=stop_tokens)
        made = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "lark": llguidance.LLMatcher.grammar_from_lark,
        }
        try:
            source = made[kind](text)
        except ValueError as error:
            raise ValueError(f"This is not a {kind.replace('_', ' ')}: {error}") from error
        if problem := llguidance.LLMatcher.validate_grammar(source, tokens):
            raise ValueError(f"This {kind.replace('_', ' ')} cannot be followed: {problem}")
        return cls(source, tokens, tuple(after))

    def start(self) -> "GrammarState":
        """The state before the first generated token."""
        return GrammarState(self, None if self.after else self._matcher(), ())

    def _matcher(self) -> Any:
        return _llguidance().LLMatcher(self.tokens, self.source, log_level=0)


@dataclass(frozen=True)
class GrammarState:
    """Where a text is in its grammar; never modified, so that drafts can be tried.

    Attributes:
        matcher: llguidance's, or None before the grammar begins.
        before: the last generated tokens before it begins, as many as `after` has.
    """

    grammar: Grammar
    matcher: Any
    before: tuple[int, ...]

    def allowed(self, vocab_size: int) -> Tensor | None:
        """(vocab_size,) True for tokens that may come next; None where all may."""
        if self.matcher is None:
            return None
        words = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten().bool()[:vocab_size]
        return torch.nn.functional.pad(allowed, (0, vocab_size - len(allowed)))

    def then(self, token: int) -> "GrammarState":
        """The state after one more token.

        Raises: ValueError for a token that is not allowed.
        """
        after = self.grammar.after
        if self.matcher is None:
            before = (*self.before, token)[-len(after) :]
            return GrammarState(self.grammar, self.grammar._matcher() if before == after else None, before)
        matcher = self.matcher.deep_copy()
        if not matcher.consume_token(token):
            raise ValueError(f"Token {token} is not in the grammar here: {matcher.get_error()}")
        return GrammarState(self.grammar, matcher, self.before)


def token_table(tokenizer: Any, *, vocab_size: int | None = None, stop_tokens: Sequence[int] = ()) -> Any:
    """llguidance's view of a `tokenizers.Tokenizer`: seconds for a large vocabulary, so make it once.

    Raises: ValueError where llguidance is not installed or there is no stop token.
    """
    if not stop_tokens:
        raise ValueError("A grammar needs a token that ends the text: give stop_tokens.")
    llguidance = _llguidance()
    return llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(stop_tokens))


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ValueError("Grammars need llguidance: pip install 'qwen3next[grammar]'.") from error
    return llguidance
