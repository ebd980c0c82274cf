"""Generation of tokens: greedy or sampled, in batches of unequal length, streamed, with drafts that are checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layers.segments import Segments
from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.choice import Choice, Picked, check_range, draw, row_seed
from qwen3next.generation.drafts import Drafter, DraftLength, PromptLookup, drafter_named, measured
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.prefill import Prefilling
from qwen3next.generation.rounds import Report, Row, rounds
from qwen3next.generation.sampling_rules import SamplingRules
from qwen3next.hooks.hooked import Hooks
from qwen3next.inputs import check_ids

MOST_DRAFTS = 4  # of "auto"


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rules: SamplingRules | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one token id per row from (b, vocab) logits. Returns: (b,) ids.

    Args:
        temperature: 0 takes the most likely token; larger values are more varied.
        top_k: keep the k most likely tokens, and those as likely as the last of them; 0 keeps all.
        top_p: keep only the most likely tokens whose total probability reaches this value, at least one.
        rules: applies min_p, typical_p, epsilon_cutoff and eta_cutoff only; `stream` applies the others.
        generator: random generator; None uses torch's global one.
    Raises: ValueError for values outside their ranges, for NaN or infinity, and if no token is left.
    """
    check_range(temperature, top_k, top_p)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must have shape (b, vocab), got {tuple(logits.shape)}.")
    device = logits.device if generator is None else generator.device
    numbers = torch.rand(len(logits), generator=generator, dtype=torch.float64, device=device) if temperature else None
    drawn = [0.0] * len(logits) if numbers is None else numbers.tolist()
    tokens = [
        draw(row, temperature=temperature, top_k=top_k, top_p=top_p, rules=rules, number=number)
        for row, number in zip(logits, drawn, strict=True)
    ]
    return torch.tensor(tokens, device=logits.device)


class Generation:
    """A run of generation: iterate over it for what each row gained, round by round.

    Every round yields a list of `Picked` for each row, empty in rows that have stopped. Without drafts it holds one
    token.

    Args:
        input_ids: (b, t) prompts; the whole text, even if `cache` already holds a prefix of it.
        segments: `Segments.from_mask(mask)` for prompts padded to equal length, on either side.
        cache: continue from this cache, which is extended; None makes one of the right size.
        max_new_tokens: most tokens to generate per row.
        temperature, top_k, top_p, logit_bias, rules, logprobs: as in `Choice`.
        stop_tokens: ids that end a row (given out, then nothing); None means `model.stop_tokens`.
        seed: for sampling; a number, from which every row gets its own, or one number for each row. A row gives the
            same tokens in any batch. None draws one from torch's global generator.
        grammar: what the new text must match.
        n: texts to generate for each prompt; their rows follow each other.
        draft_tokens: tokens to guess and check at a time, or "auto", which chooses from 0 to 4 by what is measured. The
            text does not depend on it.
        drafts: who guesses: "mtp", the model's MTP layer; "lookup", what followed the same tokens before in the text;
            "both"; "auto", the MTP layer where there is one.
        fwd_hooks: as for `model.hooks`, for the prompt and every step; `hook.ctx["position"]` is the absolute position
            of the first token in the hooked tensor.
    Attributes:
        report: rounds, drafted and accepted tokens so far.
        rows: the texts so far.
        cache: extended up to the last token but one of each row.
    Raises: ValueError for a prompt that does not start with the cache's tokens, or does not fit the cache; for hooks as
        `model.hooks`.
    """

    def __init__(
        self,
        model: Prefilling,
        input_ids: Tensor,
        *,
        segments: Segments | None = None,
        cache: HybridCache | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        rules: SamplingRules | None = None,
        logprobs: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        grammar: Grammar | None = None,
        n: int = 1,
        draft_tokens: int | str = 0,
        drafts: str = "auto",
        fwd_hooks: Hooks = (),
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: it is the number of texts for each prompt.")
        check_ids(input_ids)
        segments = Segments.full(input_ids) if segments is None else segments
        self._ids, self._segments = segments.closed(input_ids)
        if min(self._segments.real_lengths) < 1:
            raise ValueError("A prompt is empty: give every row at least one token.")
        stop = tuple(dict.fromkeys(model.stop_tokens if stop_tokens is None else stop_tokens))
        choice = Choice(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            logit_bias={} if logit_bias is None else logit_bias,
            rules=SamplingRules() if rules is None else rules,
            stop_tokens=tuple(token for token in stop if 0 <= token < model.vocab_size),
            logprobs=logprobs,
        )
        choice.check(model.vocab_size)
        self.model, self.report, self._n, self._hooks = model, Report(), n, fwd_hooks
        rows = self._segments.sequences * n
        self._length, self._drafter = drafting(model, draft_tokens, drafts, rows=rows, sampled=temperature > 0)
        self.cache = self._fitting(cache, max_new_tokens)
        texts = [list(text) for text in _texts(self._ids, self._segments) for _ in range(n)]
        self.rows = [
            Row(text, len(text), choice, key, max_new_tokens, None if grammar is None else grammar.start())
            for text, key in zip(texts, _seeds(seed, len(texts)), strict=True)
        ]

    def _fitting(self, cache: HybridCache | None, max_new_tokens: int) -> HybridCache:
        """The cache given, if all fits it, or a new one."""
        segments = self._segments
        needed = max(segments.real_lengths) + max_new_tokens
        room = needed + (0 if self._length is None else self._length.most)  # a row that has ended runs along
        if cache is None:
            mtp = self._drafter is not None and not isinstance(self._drafter, PromptLookup)
            return self.model.new_cache(segments.sequences, max_len=room, mtp=mtp)
        if needed - 1 > cache.max_len:
            raise ValueError(
                f"{max(segments.real_lengths)} prompt tokens and {max_new_tokens} new ones do not fit a cache of "
                f"{cache.max_len}: make it with a larger max_len, or lower max_new_tokens."
            )
        if self._n > 1:
            raise ValueError("n texts of a prompt need a cache of their own: leave cache out.")
        if cache.batch > 1 and self._length is not None:
            cache.lengthen(room)
        return cache

    def __iter__(self) -> Iterator[list[list[Picked]]]:
        with self.model.hooks(self._hooks):
            logits = _run_prompt(self.model, self._ids, self._segments, self.cache)
            if self._n > 1:
                copies = [row for row in range(self.cache.batch) for _ in range(self._n)]
                self.cache, logits = self.cache.select(copies), logits[copies]
                self.cache.last_logits = logits
            yield from rounds(
                self.model,
                self.rows,
                self.cache,
                logits,
                drafter=self._drafter,
                length=self._length,
                report=self.report,
            )


def stream(model: Prefilling, input_ids: Tensor, **options: object) -> Iterator[Tensor]:
    """Yield the next token of every row, (b,), as it is generated; −1 in rows that have stopped.

    Args:
        input_ids: (b, t) prompts; the whole text, even if `cache` already holds a prefix of it.
        options: those of `Generation`.
    Raises: as `Generation`.
    """
    run = Generation(model, input_ids, **options)  # type: ignore[arg-type]
    waiting: list[list[int]] = [[] for _ in run.rows]
    for gained in run:
        for row, new in zip(waiting, gained, strict=True):
            row += [picked.token for picked in new]
        # A row that drafts well is ahead of the others.
        while any(waiting) and all(tokens or row.done for tokens, row in zip(waiting, run.rows, strict=True)):
            yield torch.tensor([tokens.pop(0) if tokens else -1 for tokens in waiting], device=input_ids.device)


def drafting(
    model: Prefilling, draft_tokens: int | str, drafts: str, *, rows: int = 1, sampled: bool = False
) -> tuple[DraftLength | None, Drafter | None]:
    """How many tokens to draft, and who drafts them; None for none.

    Args:
        rows, sampled: the texts of a step, and whether their tokens are sampled. What was measured for these counts.
    Raises: ValueError for numbers and names that there are not.
    """
    adapt = draft_tokens == "auto"
    if not adapt and not (isinstance(draft_tokens, int) and draft_tokens >= 0):
        raise ValueError(f'draft_tokens must be a number from 0, or "auto", got {draft_tokens!r}.')
    if draft_tokens == 0:
        return None, None
    most = MOST_DRAFTS if isinstance(draft_tokens, str) else draft_tokens
    name = ("lookup" if model.mtp is None else "mtp") if drafts == "auto" else drafts
    drafter = drafter_named(name, model)
    return DraftLength(most, adapt=adapt, known=measured(model, name, rows, sampled=sampled)), drafter


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One for each row."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        return [row_seed(seed, row) for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} numbers for {rows} rows: give one number, or one for each row.")
    return list(seed)


def _texts(input_ids: Tensor, segments: Segments) -> list[list[int]]:
    """The token ids of each prompt."""
    found: list[list[int]] = [[] for _ in range(segments.sequences)]
    for run in segments.runs:
        found[run.sequence] = input_ids[run.row, run.begin : run.end].tolist()
    return found


def _run_prompt(model: Prefilling, input_ids: Tensor, segments: Segments, cache: HybridCache) -> Tensor:
    """Run the tokens that the cache does not hold; returns logits (b, vocab) after each prompt's last token."""
    if any(cache.lengths):
        input_ids, segments = _rest(input_ids, segments, cache)
    if input_ids.numel():
        for _ in model.prefill(input_ids, cache, segments=segments):
            pass
    if cache.last_logits is None:
        cache.last_logits = model.logits_after(cache)
    return cache.last_logits


def _rest(input_ids: Tensor, segments: Segments, cache: HybridCache) -> tuple[Tensor, Segments]:
    """The ids and segments of the tokens that the cache does not hold, without columns that it holds completely.

    Raises: ValueError for prompts that do not start with the cache's tokens.
    """
    if segments.sequences != cache.batch:
        raise ValueError(f"The cache holds {cache.batch} sequences, but {segments.sequences} prompts are given.")
    held, number = torch.tensor(cache.lengths, device=input_ids.device), segments.document_ids
    if number is None:
        number = torch.arange(cache.batch, device=input_ids.device)[:, None].expand_as(input_ids)
    known = segments.mask & (segments.positions < held[number.clamp(min=0)])
    same = cache.tokens[number[known], segments.positions[known]] == input_ids[known]
    wrong = {r for r, (n, real) in enumerate(zip(cache.lengths, segments.real_lengths, strict=True)) if n > real}
    wrong |= set(number[known][~same].tolist())
    if wrong:
        where = f"Row {min(wrong)} of the cache" if cache.batch > 1 else "The cache"
        raise ValueError(
            f"{where} holds {cache.lengths[min(wrong)]} tokens that the prompt does not start "
            "with: give the whole text, or use a new cache."
        )
    new = segments.mask & ~known
    if not bool(new.any()):
        return input_ids[:, :0], segments
    first = int(new.any(0).int().argmax())
    rest = replace(segments, document_ids=number.masked_fill(~new, -1))
    return input_ids[:, first:], rest.part(first, input_ids.shape[1])


def generate(model: Prefilling, input_ids: Tensor, **options: object) -> Tensor:
    """Prompts and their continuations, (b, t + new); rows that stop early repeat their last token.

    Args:
        input_ids: (b, t) prompts.
        options: those of `Generation`. With n > 1, the rows of a prompt follow each other.
    Raises: as `Generation`.
    """
    steps = list(stream(model, input_ids, **options))
    input_ids = input_ids.repeat_interleave(len(steps[0]) // len(input_ids), dim=0)
    new = torch.stack(steps, dim=1)
    ended = new < 0
    last = (~ended).sum(1, keepdim=True) - 1
    return torch.cat((input_ids, torch.where(ended, new.gather(1, last), new)), dim=1)
