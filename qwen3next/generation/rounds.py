"""Rounds of generation: in each, every running row gains at least one token.

Without drafts a round is a step of one token a row. With drafts a step brings the last chosen token of each row and
some guesses; logits after every one of them come back, tokens are chosen in order, and the first one that differs from
its guess ends the row's round. The cache then takes back what was not accepted. So the text is the same with any
drafts.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.choice import Choice, Picked
from qwen3next.generation.drafts import Drafter, DraftLength
from qwen3next.generation.grammar import GrammarState
from qwen3next.generation.prefill import Prefilling


@dataclass
class Row:
    """A text that is being written.

    Attributes:
        text: all tokens, the prompt's first.
        prompt: how many of them are the prompt's.
        most: tokens to generate at most.
        done: whether it has ended, by a stop token or by its number of tokens.
    """

    text: list[int]
    prompt: int
    choice: Choice
    seed: int
    most: int
    grammar: GrammarState | None = None
    done: bool = False

    @property
    def new(self) -> int:
        return len(self.text) - self.prompt

    def take(self, logits: Tensor, drafts: Sequence[int] = ()) -> list[Picked]:
        """Choose tokens after each row of logits (1 + drafts, vocab), up to the first that differs from its draft."""
        taken: list[Picked] = []
        for j, after in enumerate(logits):
            picked = self.choice.pick(after, self.text, new=self.new, seed=self.seed, grammar=self.grammar)
            taken.append(picked)
            self.text.append(picked.token)
            self.done = picked.token in self.choice.stop_tokens or self.new == self.most
            if self.done:
                break
            self.grammar = None if self.grammar is None else self.grammar.then(picked.token)
            if j == len(drafts) or picked.token != drafts[j]:
                break
        return taken


@dataclass
class Report:
    """What speculative decoding did.

    Attributes:
        rounds: calls of the model after the prompt.
        tokens: tokens that these gave, in all rows.
        drafted, accepted: by place in the draft, over rows and rounds.
    """

    rounds: int = 0
    row_rounds: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def mean_length(self) -> float:
        """Tokens a row gained in a round, on average."""
        return self.tokens / max(1, self.row_rounds)

    def add(self, drafts: Sequence[Sequence[int]], taken: Sequence[Sequence[Picked]]) -> None:
        self.rounds += 1
        for guesses, tokens in zip(drafts, taken, strict=True):
            self.row_rounds += 1
            self.tokens += len(tokens)
            for counts in (self.drafted, self.accepted):
                counts += [0] * (len(guesses) - len(counts))
            for place, (guess, picked) in enumerate(zip(guesses, tokens, strict=False)):
                self.drafted[place] += 1
                self.accepted[place] += guess == picked.token


def rounds(
    model: Prefilling,
    rows: Sequence[Row],
    cache: HybridCache,
    logits: Tensor,
    *,
    drafter: Drafter | None = None,
    length: DraftLength | None = None,
    report: Report | None = None,
) -> Iterator[list[list[Picked]]]:
    """Yield what each row gained in each round, nothing in rows that have ended; the first is chosen from `logits`.

    Args:
        rows: one for each row of the cache, which holds their texts.
        logits: (b, vocab) after them.
        drafter, length: how to draft and how much; None drafts nothing.
        report: counts what is drafted and accepted.
    """
    report = Report() if report is None else report
    yield [row.take(after[None]) for row, after in zip(rows, logits, strict=True)]
    while not all(row.done for row in rows):
        count = 0 if length is None else min(length.begin(), _most_drafts(rows, cache))
        drafts: list[list[int]] = [[] for _ in rows]
        if drafter is not None and count > 0:
            drafts = drafter.draft(cache, [row.text for row in rows], count)
        taken = _round(model, rows, cache, drafts)
        running = [r for r, new in enumerate(taken) if new]
        report.add([drafts[r] for r in running], [taken[r] for r in running])
        if length is not None:
            length.end(max(map(len, drafts)), [len(taken[r]) - 1 for r in running])
        yield taken


def _most_drafts(rows: Sequence[Row], cache: HybridCache) -> int:
    """How many drafts no row's end and no place in the cache forbids."""
    return max(0, min(max(row.most - row.new for row in rows), cache.max_len - max(cache.lengths)) - 1)


def _round(
    model: Prefilling, rows: Sequence[Row], cache: HybridCache, drafts: Sequence[Sequence[int]]
) -> list[list[Picked]]:
    width, before = max(map(len, drafts)), cache.last_logits
    tokens = [
        [row.text[-1], *guesses, *[0] * (width - len(guesses))] for row, guesses in zip(rows, drafts, strict=True)
    ]
    ids, resting = torch.tensor(tokens, device=cache.tokens.device), [r for r, row in enumerate(rows) if row.done]
    with cache.revocable(width + 1) if width else nullcontext():
        with cache.resting(resting):
            logits = model.step_all(ids, cache)
        taken = [[] if row.done else row.take(logits[r], tokens[r][1:]) for r, row in enumerate(rows)]
        back = [width + 1 - len(new) if new else 0 for new in taken]
        last = torch.stack([logits[r, len(new) - 1] for r, new in enumerate(taken)])
        if resting and before is not None:
            last[resting] = before[resting]
        cache.take_back(back, logits=last)
    return taken
