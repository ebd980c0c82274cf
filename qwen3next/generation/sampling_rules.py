"""The sampling options of a generation_config.json besides temperature, top_k and top_p."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """Rules that change which token is sampled. Names, arithmetic and order are those of transformers' processors.

    Attributes:
        repetition_penalty: positive logits of tokens in the text, including the prompt, are divided by it; others are
            multiplied by it.
        presence_penalty, frequency_penalty: subtracted from the logit of a generated token, once and once per
            occurrence; the prompt does not count. As in OpenAI's API and vLLM.
        no_repeat_ngram_size: no n-gram of this size occurs twice in a text; 0 allows all.
        bad_words_ids: sequences of tokens that are never completed.
        min_length, min_new_tokens: stop tokens are excluded until the text, or its new part, has this many tokens.
        suppress_tokens, begin_suppress_tokens: tokens never sampled, or not as the first new token.
        min_p: excludes tokens whose probability is below this fraction of the largest. This and the following apply
            after temperature, top_k and top_p, and not at temperature 0.
        typical_p: keeps the tokens whose surprise is nearest to the entropy, up to this total probability.
        epsilon_cutoff, eta_cutoff: exclude tokens below this probability; eta's threshold is lower at high entropy.
    Raises: ValueError, on construction, for a value outside its range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        if problem := wrong(vars(self)):
            raise ValueError(problem)
        for name in ("suppress_tokens", "begin_suppress_tokens"):  # so that rules with equal ids compare equal
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "bad_words_ids", tuple(map(tuple, self.bad_words_ids)))

    @property
    def reads_text(self) -> bool:
        """Whether `apply` depends on the previous tokens."""
        return self != SamplingRules(**{name: getattr(self, name) for name in WITHOUT_TEXT})

    def check(self, vocab_size: int) -> None:
        """Check token ids against the vocabulary. Raises: ValueError for one outside 0 to vocab_size - 1."""
        for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
            ids = getattr(self, name) if name != "bad_words_ids" else [i for word in self.bad_words_ids for i in word]
            if ids and max(ids) >= vocab_size:
                raise ValueError(f"{name} has token {max(ids)}: this model's ids are 0 to {vocab_size - 1}.")

    def apply(
        self, logits: Float[Tensor, "b vocab"], texts: Sequence[Sequence[int]], new: int, stops: Sequence[int]
    ) -> Float[Tensor, "b vocab"]:
        """Apply the rules that depend on the text. Returns new logits (b, vocab); the input is not modified.

        Args:
            texts: the tokens of each row, prompt first; may be empty if `reads_text` is False.
            new: number of generated tokens at the end of each text.
            stops: tokens that end a text.
        """
        logits = logits.clone()
        for row, text in zip(logits, texts, strict=True):
            self._penalise(row, text, new)
            row[self._completing(text, stops)] = -torch.inf
            if len(text) < self.min_length or new < self.min_new_tokens:
                row[list(stops)] = -torch.inf
        logits[:, list(self.suppress_tokens)] = -torch.inf
        if not new:
            logits[:, list(self.begin_suppress_tokens)] = -torch.inf
        return logits

    def keep(self, scores: Float[Tensor, "b vocab"]) -> Float[Tensor, "b vocab"]:
        """Set the scores of improbable tokens to −∞; the most likely token is always kept.

        Args:
            scores: logits divided by the temperature.
        """
        most = scores.amax(-1, keepdim=True)
        if self.min_p:
            p = scores.softmax(-1)
            scores = scores.masked_fill((p < self.min_p * p.amax(-1, keepdim=True)) & (scores < most), -torch.inf)
        if self.typical_p < 1:
            scores = _typical(scores, self.typical_p)
        if self.epsilon_cutoff:
            scores = scores.masked_fill((scores.softmax(-1) < self.epsilon_cutoff) & (scores < most), -torch.inf)
        if self.eta_cutoff:
            spread = -_entropy(scores)
            least = (math.sqrt(self.eta_cutoff) * spread.exp()).clamp(max=self.eta_cutoff)
            scores = scores.masked_fill((scores.softmax(-1) < least) & (scores < most), -torch.inf)
        return scores

    def _penalise(self, row: Tensor, text: Sequence[int], new: int) -> None:
        if self.repetition_penalty != 1:
            ids = torch.tensor(sorted(set(text)), dtype=torch.long, device=row.device)
            some = row[ids]
            row[ids] = torch.where(some < 0, some * self.repetition_penalty, some / self.repetition_penalty)
        if new and (self.presence_penalty or self.frequency_penalty):
            ids, times = torch.tensor(text[-new:], device=row.device).unique(return_counts=True)
            row[ids] -= self.presence_penalty + self.frequency_penalty * times.to(row.dtype)

    def _completing(self, text: Sequence[int], stops: Sequence[int]) -> list[int]:
        """Tokens that would complete a repeated n-gram or a bad word."""
        text, found = list(text), []
        if n := self.no_repeat_ngram_size:
            end = text[len(text) - n + 1 :] if n > 1 else []
            if len(text) >= n:
                found = [text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == end]
        for word in self.bad_words_ids:
            if len(word) == 1 and word[0] in stops:  # else the text would never end
                continue
            before = list(word[:-1])
            if not before or text[-len(before) :] == before:
                found.append(word[-1])
        return found


def wrong(rules: Mapping[str, Any]) -> str:
    """An error message for the first invalid value of these fields, or ""."""
    whole, share, above = "an integer from 0", "a number from 0 to 1", "a number above 0"
    for name, kind, fits, rule in (
        ("repetition_penalty", _number, lambda x: x > 0, above),
        ("presence_penalty", _number, None, "a number"),
        ("frequency_penalty", _number, None, "a number"),
        ("no_repeat_ngram_size", is_whole, None, whole),
        ("bad_words_ids", _lists, lambda x: all(map(len, x)), "lists of token ids"),
        ("min_length", is_whole, None, whole),
        ("min_new_tokens", is_whole, None, whole),
        ("suppress_tokens", are_ids, None, "a list of token ids"),
        ("begin_suppress_tokens", are_ids, None, "a list of token ids"),
        ("min_p", _number, lambda x: 0 <= x <= 1, share),
        ("typical_p", _number, lambda x: 0 < x <= 1, f"{above} and at most 1"),
        ("epsilon_cutoff", _number, lambda x: 0 <= x < 1, f"{share}, 1 excluded"),
        ("eta_cutoff", _number, lambda x: 0 <= x < 1, f"{share}, 1 excluded"),
    ):
        if name in rules and not (kind(rules[name]) and (fits is None or fits(rules[name]))):
            return f"{name} must be {rule}, got {rules[name]!r}."
    return ""


WITHOUT_TEXT = (
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def _entropy(scores: Tensor) -> Tensor:
    """Entropy (b, 1) in nats; tokens with probability 0 add nothing."""
    log_p = scores.log_softmax(-1)
    return -(log_p * log_p.exp()).nansum(-1, keepdim=True)


def _typical(scores: Tensor, mass: float) -> Tensor:
    away = (-scores.log_softmax(-1) - _entropy(scores)).abs()
    ordered, ids = away.sort(-1)
    reached = scores.softmax(-1).gather(-1, ids).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    gone = ordered > ordered.gather(-1, last)
    gone[:, 0] = False
    return scores.masked_fill(torch.zeros_like(gone).scatter(-1, ids, gone), -torch.inf)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def are_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_whole, value))


def _lists(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(are_ids, value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
