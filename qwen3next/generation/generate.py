"""Generation of tokens: greedy or sampled, in batches of unequal length, streamed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layers.segments import Segments
from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.prefill import Prefilling
from qwen3next.generation.sampling_rules import SamplingRules
from qwen3next.hooks.hooked import Hooks
from qwen3next.inputs import check_ids


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
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep only the most likely tokens whose total probability reaches this value, at least one.
        rules: applies min_p, typical_p, epsilon_cutoff and eta_cutoff only; `stream` applies the others.
        generator: random generator; None uses torch's global one.
    Raises: ValueError for values outside their ranges, for NaN or infinity, and if no token is left.
    """
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature ({temperature}) and top_k ({top_k}) must not be negative, top_p ({top_p}) in (0, 1]."
        )
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must have shape (b, vocab), got {tuple(logits.shape)}.")
    most = logits.amax(-1, keepdim=True)
    if not bool(most.isfinite().all()):
        raise ValueError(
            "No token is left to sample: the rules or a hook exclude all tokens, so relax them."
            if bool((most == -torch.inf).any())
            else "The logits hold NaN or infinity: check the weights (qwen3next verify --values) and hooks for NaN, "
            "and use bfloat16 or float32 if float16 overflows."
        )
    if temperature == 0:
        return logits.argmax(-1)
    # Subtract the maximum: at a small temperature, scores can then overflow only to −∞, which is the correct limit.
    scores = (logits - most).float() / max(temperature, 1e-30)
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    left_out = before >= top_p
    probabilities = probabilities.masked_fill(left_out, 0.0)
    if rules is not None:
        probabilities = rules.keep(ordered.masked_fill(left_out, -torch.inf)).softmax(-1)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(1, drawn).squeeze(1)


def stream(
    model: Prefilling,
    input_ids: Tensor,
    *,
    segments: Segments | None = None,
    cache: HybridCache | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rules: SamplingRules | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int | None = None,
    fwd_hooks: Hooks = (),
) -> Iterator[Tensor]:
    """Yield the next token of every row, (b,), as it is generated; −1 in rows that have stopped.

    Args:
        input_ids: (b, t) prompts; the whole text, even if `cache` already holds a prefix of it.
        segments: `Segments.from_mask(mask)` for prompts padded to equal length, on either side.
        cache: continue from this cache, which is extended; None makes one of the right size.
        max_new_tokens: most tokens to generate per row.
        temperature, top_k, top_p: as in `sample`.
        rules: penalties, excluded tokens and other rules.
        stop_tokens: ids that end a row (yielded, then −1); None means `model.stop_tokens`.
        seed: for sampling; equal seeds give equal tokens on one machine. None uses torch's global generator.
        fwd_hooks: as for `model.hooks`, for the prompt and every step; `hook.ctx["position"]` is the absolute position
            of the first token in the hooked tensor.
    Raises: ValueError for a prompt that does not start with the cache's tokens, or does not fit the cache; for hooks as
        `model.hooks`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    check_ids(input_ids)
    segments = Segments.full(input_ids) if segments is None else segments
    input_ids, segments = segments.closed(input_ids)
    if min(segments.real_lengths) < 1:
        raise ValueError("A prompt is empty: give every row at least one token.")
    stop = model.stop_tokens if stop_tokens is None else stop_tokens
    stops = torch.tensor(list(stop), dtype=torch.long, device=input_ids.device)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    if cache is None:
        cache = model.new_cache(segments.sequences, max_len=max(segments.real_lengths) + max_new_tokens)
    elif max(segments.real_lengths) + max_new_tokens - 1 > cache.max_len:
        raise ValueError(
            f"{max(segments.real_lengths)} prompt tokens and {max_new_tokens} new ones do not fit a cache of "
            f"{cache.max_len}: make it with a larger max_len, or lower max_new_tokens."
        )
    if rules is not None:
        rules.check(model.vocab_size)
    ends = [token for token in dict.fromkeys(stop) if 0 <= token < model.vocab_size]
    texts = _texts(input_ids, segments) if rules is not None and rules.reads_text else [[]] * segments.sequences
    with model.hooks(fwd_hooks):
        logits = _run_prompt(model, input_ids, segments, cache)
        running = torch.ones(segments.sequences, dtype=torch.bool, device=input_ids.device)
        for i in range(max_new_tokens):
            left = logits if rules is None else rules.apply(logits, texts, i, ends)
            token = sample(left, temperature=temperature, top_k=top_k, top_p=top_p, rules=rules, generator=generator)
            if rules is not None and rules.reads_text:
                for text, said in zip(texts, token.tolist(), strict=True):
                    text.append(said)
            yield token.masked_fill(~running, -1)
            running &= ~torch.isin(token, stops)
            if i + 1 == max_new_tokens or not bool(running.any()):
                return
            with cache.resting((~running).nonzero().flatten().tolist()):
                new = model.step(token[:, None], cache)
            logits = cache.last_logits = torch.where(running[:, None], new, logits)


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
        options: the options of `stream`.
    Raises: as `stream`.
    """
    steps = list(stream(model, input_ids, **options))  # type: ignore[arg-type]
    new = torch.stack(steps, dim=1)
    ended = new < 0
    last = (~ended).sum(1, keepdim=True) - 1
    return torch.cat((input_ids, torch.where(ended, new.gather(1, last), new)), dim=1)
