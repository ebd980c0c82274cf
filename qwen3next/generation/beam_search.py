"""Beam search: the texts with the highest total log-probability, several kept at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.segments import Segments
from qwen3next.generation.generate import _run_prompt, _texts
from qwen3next.generation.prefill import Prefilling
from qwen3next.generation.sampling_rules import SamplingRules
from qwen3next.inputs import check_ids

Scored = tuple[float, list[int]]


@dataclass
class Beams:
    """The texts of one prompt.

    Attributes:
        running: summed log-probability and new tokens of each text that goes on, best first.
        ended: score and new tokens of those that have ended, best first; at most `width`.
    """

    width: int
    length_penalty: float
    running: list[Scored]
    ended: list[Scored] = field(default_factory=list)
    done: bool = False

    def extend(self, candidates: Sequence[tuple[float, int, int]], *, stops: set[int], last: bool) -> list[int]:
        """Take the best continuations (score, row, token), best first; the rows that those which go on come from."""
        going: list[Scored] = []
        rows: list[int] = []
        for place, (score, row, token) in enumerate(candidates):
            text = [*self.running[row][1], token]
            if token in stops or last:
                if place < self.width:
                    self.ended.append((score / len(text) ** self.length_penalty, text))
            elif len(going) < self.width:
                going.append((score, text))
                rows.append(row)
        self.ended = sorted(self.ended, key=lambda scored: -scored[0])[: self.width]
        self.running = going
        return rows

    def settled(self, early_stopping: bool | str, most: int) -> bool:
        """Whether no running text can still be among the best."""
        if not self.running:
            return True
        if len(self.ended) < self.width:
            return False
        if early_stopping is True:
            return True
        length = most if early_stopping == "never" and self.length_penalty > 0 else len(self.running[0][1])
        return self.running[0][0] / length**self.length_penalty <= self.ended[-1][0]


@torch.no_grad()
def beam_search(
    model: Prefilling,
    input_ids: Tensor,
    *,
    beams: int = 4,
    n: int = 1,
    segments: Segments | None = None,
    max_new_tokens: int = 128,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    rules: SamplingRules | None = None,
    stop_tokens: Sequence[int] | None = None,
) -> list[list[Scored]]:
    """The `n` best continuations of each prompt, best first, each with its score; as transformers' beam search.

    Args:
        input_ids, segments: as in `Generation`.
        beams: texts kept at a time.
        length_penalty: a text's summed log-probability is divided by its number of new tokens to this power; above 0,
            longer texts are preferred.
        early_stopping: True stops as soon as `beams` texts have ended; False when the best running one, at its present
            length, cannot overtake them; "never" when it could not at any length.
        rules: penalties and excluded tokens, applied to log-probabilities.
        stop_tokens: ids that end a text; None means `model.stop_tokens`.
    Returns: for each prompt n pairs of score and new tokens, the stop token included.
    Raises: ValueError for numbers out of range, and as `Generation`.
    """
    if not 1 <= n <= beams or max_new_tokens < 1:
        raise ValueError(f"beams ({beams}) must be at least n ({n}), and n and max_new_tokens at least 1.")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}.')
    check_ids(input_ids)
    ids, segments = (Segments.full(input_ids) if segments is None else segments).closed(input_ids)
    prompts = _texts(ids, segments)
    stops = set(model.stop_tokens if stop_tokens is None else stop_tokens)
    cache = model.new_cache(len(prompts), max_len=max(map(len, prompts)) + max_new_tokens)
    logits = _run_prompt(model, ids, segments, cache)
    found = [Beams(beams, length_penalty, [(0.0, [])]) for _ in prompts]
    owners = list(range(len(prompts)))  # the prompt of each row of the cache
    for new in range(max_new_tokens):
        scores = _scores(logits, [prompts[o] + text for o, text in _running(found, owners)], new, rules, stops)
        kept: list[int] = []
        for number, mine in enumerate(found):
            rows = [row for row, owner in enumerate(owners) if owner == number]
            if not rows:
                continue
            candidates = _best(scores[rows], mine, max(2, 1 + len(stops)) * beams)
            came_from = mine.extend(candidates, stops=stops, last=new + 1 == max_new_tokens)
            mine.done = mine.settled(early_stopping, max_new_tokens)
            kept += [] if mine.done else [rows[row] for row in came_from]
        if not kept:
            break
        owners = [owners[row] for row in kept]
        cache = cache.select(kept)
        tokens = [text[-1] for _, text in _running(found, owners)]
        logits = model.step(torch.tensor(tokens, device=ids.device)[:, None], cache)
    return [mine.ended[:n] for mine in found]


def _running(found: Sequence[Beams], owners: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The prompt and the new tokens of each row."""
    return [(o, text) for o in dict.fromkeys(owners) for _, text in found[o].running]


def _scores(logits: Tensor, texts: list[list[int]], new: int, rules: SamplingRules | None, stops: set[int]) -> Tensor:
    """Log-probabilities (rows, vocab) after the rules."""
    scores = logits.float().log_softmax(-1)
    inside = [token for token in stops if 0 <= token < scores.shape[1]]
    return scores if rules is None else rules.apply(scores, texts, new, inside)


def _best(scores: Tensor, mine: Beams, count: int) -> list[tuple[float, int, int]]:
    """The best continuations of a prompt's running texts: score, row, token."""
    total = scores + torch.tensor([score for score, _ in mine.running], device=scores.device)[:, None]
    values, places = total.flatten().topk(min(count, total.numel()))
    vocab = scores.shape[1]
    return [(v, p // vocab, p % vocab) for v, p in zip(values.tolist(), places.tolist(), strict=True)]
