"""Long prompts and long texts, a chunk at a time: memory is bounded by the chunk."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.norm import at_least_fp32
from layers.segments import Segments
from qwen3next.cache import HybridCache

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

GRID = 64  # tokens: chunks that end on it leave no trace in bf16
ROWS = 256  # tokens whose logits are there at a time


def prefill(
    model: "Qwen3Next", input_ids: Tensor, cache: HybridCache, chunk_size: int, *, segments: Segments | None
) -> Iterator[tuple[int, int]]:
    """`Qwen3Next.prefill`."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    segments = Segments.full(input_ids) if segments is None else segments
    past = cache.lengths[0] if segments.plain and len(set(cache.lengths)) == 1 else 0
    return _chunks(model, input_ids, cache, segments, past, chunk_size // GRID * GRID or chunk_size)


def _chunks(
    model: "Qwen3Next", input_ids: Tensor, cache: HybridCache, segments: Segments, past: int, chunk_size: int
) -> Iterator[tuple[int, int]]:
    total, begin, last = input_ids.shape[1], 0, cache.last_logits
    while begin < total:
        end = min(total, (past + begin) // chunk_size * chunk_size + chunk_size - past)
        chunk, part = input_ids[:, begin:end], segments.part(begin, end)
        begin = end
        with torch.no_grad():  # not around the yield: it would reach the caller's code
            if part.plain:
                cache.last_logits = last = model(chunk, cache=cache, logits_to_keep=1).logits[:, -1]
            elif runs := part.runs:  # else all is padding
                hidden = model(chunk, segments=part, cache=cache, logits_to_keep=1).hidden
                ends = hidden[[run.row for run in runs], [run.end - 1 for run in runs]]
                logits = model.hook_logits(model.lm_head(ends))
                last = logits.new_zeros(cache.batch, logits.shape[-1]) if last is None else last.clone()
                last[[run.sequence for run in runs]] = logits
                cache.last_logits = last
        yield end, total


def score(
    model: "Qwen3Next", input_ids: Tensor, *, chunk_size: int, cache: HybridCache | None
) -> Iterator[tuple[int, Tensor]]:
    """`Qwen3Next.score`."""
    batch, total = input_ids.shape
    if chunk_size < 1 or total < 2 - (cache is not None):
        raise ValueError("There is nothing to score: give two tokens, or one and a cache; chunk_size from 1.")
    return _losses(model, input_ids, chunk_size, model.new_cache(batch, max_len=total) if cache is None else cache)


def _losses(model: "Qwen3Next", input_ids: Tensor, chunk_size: int, cache: HybridCache) -> Iterator[tuple[int, Tensor]]:
    before = cache.last_logits
    if before is None and cache.hidden is not None:
        before = model.logits_after(cache)
    for begin in range(0, input_ids.shape[1], chunk_size):
        chunk, losses = input_ids[:, begin : begin + chunk_size], []
        with torch.no_grad():
            if before is not None:
                losses.append(_loss(before[:, None], chunk[:, :1]))
            hidden = model(chunk, cache=cache, logits_to_keep=1).hidden
            for rows, targets in zip(hidden[:, :-1].split(ROWS, dim=1), chunk[:, 1:].split(ROWS, dim=1), strict=True):
                if targets.shape[1]:
                    losses.append(_loss(model.hook_logits(model.lm_head(rows)), targets))
            before = cache.last_logits = model.logits_after(cache)
        yield begin + chunk.shape[1], torch.cat(losses, dim=1) if losses else hidden.new_zeros(len(chunk), 0)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(at_least_fp32(logits).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
