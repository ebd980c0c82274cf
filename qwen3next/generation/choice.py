"""Choose a token: a pure function of logits, the tokens so far, the grammar's state, the seed and the position.

Because random numbers depend on seed and position alone, a row gives the same tokens whatever runs beside it, however
many tokens a call brings, and whether its tokens were drafted or not.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3next.generation.grammar import GrammarState
from qwen3next.generation.sampling_rules import SamplingRules

NEUTRAL = SamplingRules()
LIKELY = 1024  # tokens that are sorted first for top_p: nearly always enough, and far cheaper than a vocabulary


class Picked(NamedTuple):
    """A chosen token.

    Attributes:
        logprob: ln of its probability under the logits as the model gave them; NaN if not asked for.
        top: the most likely tokens under those logits, with the same, most likely first.
    """

    token: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token, the first of equals; larger values are more varied.
        top_k: keep the k most likely tokens, and those as likely as the last of them; 0 keeps all.
        top_p: keep only the most likely tokens whose total probability reaches this value, at least one.
        rules: penalties, excluded tokens and other rules.
        logit_bias: added to the logits of tokens, by id, before the rules.
        stop_tokens: ids that end a text; rules such as min_new_tokens exclude them.
        logprobs: how many of the most likely tokens to report with their log-probabilities; None reports none at all.
    Raises: ValueError, on construction, for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    rules: SamplingRules = field(default_factory=SamplingRules)
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_range(self.temperature, self.top_k, self.top_p)
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must not be negative, got {self.logprobs}.")
        if any(not math.isfinite(bias) for bias in self.logit_bias.values()):
            raise ValueError("logit_bias must hold finite numbers: use suppress_tokens to exclude a token.")

    def check(self, vocab_size: int) -> None:
        """Check token ids against the vocabulary. Raises: ValueError for one outside 0 to vocab_size − 1."""
        self.rules.check(vocab_size)
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias has token {token}: this model's ids are 0 to {vocab_size - 1}.")

    @property
    def plain(self) -> bool:
        """Whether the most likely token is taken, and nothing else is asked for."""
        neutral = self.rules == NEUTRAL and not self.logit_bias and self.logprobs is None
        return self.temperature == 0 and neutral

    def pick(
        self,
        logits: Float[Tensor, "vocab"],
        text: Sequence[int],
        *,
        new: int,
        seed: int = 0,
        grammar: GrammarState | None = None,
    ) -> Picked:
        """The next token of a text.

        Args:
            text: its tokens so far, prompt first; the new one stands at position len(text).
            new: how many of them were generated.
            grammar: where a grammar is in the text; its tokens alone are possible.
        Raises: ValueError for NaN or infinity, and if no token is left.
        """
        scores = logits if self.plain and grammar is None else self.scores(logits, text, new=new, grammar=grammar)
        token = draw(
            scores,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            rules=self.rules,
            number=uniform(seed, len(text)) if self.temperature else 0.0,
        )
        return self._reported(logits, token)

    def scores(
        self, logits: Float[Tensor, "vocab"], text: Sequence[int], *, new: int, grammar: GrammarState | None = None
    ) -> Float[Tensor, "vocab"]:
        """Logits after bias, rules and grammar; those given are not modified."""
        if self.logit_bias:
            ids = torch.tensor(list(self.logit_bias), device=logits.device)
            bias = torch.tensor(list(self.logit_bias.values()), device=logits.device, dtype=torch.float32)
            logits = logits.float().index_add(0, ids, bias)
        if self.rules != NEUTRAL:
            logits = self.rules.apply(logits[None], [text], new, self.stop_tokens)[0]
        if grammar is not None and (allowed := grammar.allowed(len(logits))) is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits

    def _reported(self, logits: Tensor, token: int) -> Picked:
        if self.logprobs is None:
            return Picked(token)
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.sort(descending=True, stable=True)
        top = zip(ids[: self.logprobs].tolist(), values[: self.logprobs].tolist(), strict=True)
        return Picked(token, float(logprobs[token]), tuple(top))


def check_range(temperature: float, top_k: int, top_p: float) -> None:
    """Raises: ValueError for values outside their ranges."""
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature ({temperature}) and top_k ({top_k}) must not be negative, top_p ({top_p}) in (0, 1]."
        )


def draw(
    logits: Float[Tensor, "vocab"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    rules: SamplingRules | None = None,
    number: float,
) -> int:
    """The token whose share of [0, 1) holds `number`: shares lie side by side in the order of the ids.

    Args:
        temperature, top_k, top_p, rules: as in `Choice`; of the rules those apply that drop unlikely tokens.
        number: from 0, below 1; not used at temperature 0, which takes the most likely token.
    Raises: ValueError for NaN or infinity, and if no token is left.
    """
    if temperature == 0:
        token = int(logits.argmax())
        _check_largest(float(logits[token]))
        return token
    most = logits.amax()
    _check_largest(float(most))
    # Subtract the maximum: at a small temperature, scores can then overflow only to −∞, which is the correct limit.
    scores = (logits - most).float() / max(temperature, 1e-30)
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        scores = _nucleus(scores, top_p)
    if rules is not None:
        scores = rules.keep(scores[None])[0]
    ends = scores.softmax(-1).double().cumsum(0)
    token = int(torch.searchsorted(ends, number * ends[-1], right=True))
    if token < len(scores) and math.isfinite(scores[token]):
        return token
    return int(scores.isfinite().nonzero()[-1])  # a rounded product may reach the end


def _check_largest(value: float) -> None:
    if value == -math.inf:
        raise ValueError("No token is left to sample: the rules or a hook exclude all tokens, so relax them.")
    if not math.isfinite(value):
        raise ValueError(
            "The logits hold NaN or infinity: check the weights (qwen3next verify --values) and hooks for NaN, "
            "and use bfloat16 or float32 if float16 overflows."
        )


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keep the most likely tokens until their probability reaches top_p; of equally likely ones those of lower id."""
    p = scores.softmax(-1)
    likely, ids = p.topk(min(LIKELY, len(p)))
    if len(ids) < len(p) and not float(likely[likely > likely[-1]].sum()) >= top_p:
        likely, ids = p, torch.arange(len(p), device=p.device)
    ids, order = ids.sort()
    likely, sorted_ = likely[order].sort(descending=True, stable=True)
    kept = ids[sorted_[likely.cumsum(0) - likely < top_p]]
    return torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])


def uniform(seed: int, position: int) -> float:
    """A number from [0, 1) that depends on these two alone."""
    return (int.from_bytes(_hashed(seed, position), "little") >> 11) * 2.0**-53


def row_seed(seed: int, row: int) -> int:
    """A seed for each row of a batch; the first row's is `seed` itself."""
    return seed if row == 0 else int.from_bytes(_hashed(seed, -row), "little")


def _hashed(a: int, b: int) -> bytes:
    return hashlib.blake2b(f"{a} {b}".encode(), digest_size=8).digest()
