"""Long prompts and long texts, a chunk at a time: memory is bounded by the chunk."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from layers.cpp.build import missing
from layers.deprecation import warn_renamed
from layers.kernels.linear import FEW, spans
from layers.moe import RouterStats
from layers.norm import at_least_fp32
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.cache.hybrid import HybridCache
from qwen3next.config import ModelConfig
from qwen3next.decoding.stepping import Stepping
from qwen3next.files.sizes import binary, parse_bytes
from qwen3next.generation.block_parts import TOKENS as PART
from qwen3next.generation.block_parts import run_block
from qwen3next.generation.generation_config import GenerationConfig
from qwen3next.generation.kept_states import kept_within
from qwen3next.generation.pauses import pause
from qwen3next.hooks.hooked import Hooked
from qwen3next.inputs import check_ids

GRID = 64  # tokens: chunks that end on it leave no trace in bf16
ROWS = 256  # tokens whose logits are there at a time
SLACK = 64 * 2**20  # bytes: what threads, tables and the allocator keep


class Prefilling(Hooked, Stepping):
    """The model with hooks, `prefill`, `token_losses` and `stop_tokens`, and blocks that take long prompts in parts."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.generation_config = GenerationConfig()  # set by `load`

    def _run_block(
        self, block: nn.Module, x: Tensor, rope: Rotation, **options: Any
    ) -> tuple[Tensor, RouterStats | None]:
        y = run_block(block, x, rope, **options)
        position = self.hook_call["position"]
        pause()
        self.hook_call["position"] = position  # what ran meanwhile may have set another
        return y

    def prefill(
        self,
        input_ids: Int[Tensor, "b t"],
        cache: HybridCache,
        chunk_size: int = 4096,
        *,
        segments: Segments | None = None,
        max_memory: int | str | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Run prompts into the cache in chunks; yields (columns done, columns in all) after each.

        `cache.last_logits` are then those after each sequence's last token. Chunks end at multiples of their size,
        which is rounded down to one of 64; a rest of fewer than 16 tokens joins the chunk before it. So their number
        leaves no trace: a prompt without padding, behind nothing or a multiple of 64 tokens, gives the same bits.

        Args:
            segments: `Segments.from_mask(mask)` for padded prompts; packed ones are sequences of the cache in order.
            max_memory: for the cache and all that is taken and given back, weights left out, as "8GiB"; where chunks
                would take more, they are made smaller.
        Raises: ValueError as forward does, and for a max_memory in which the prompt cannot be run.
        """
        return _prefill(self, input_ids, cache, chunk_size, segments=segments, max_memory=max_memory)

    def token_losses(
        self, input_ids: Int[Tensor, "b t"], *, chunk_size: int = 1024, cache: HybridCache | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The loss of each token, −ln p, a chunk at a time: yields (tokens done, (b, n) losses), never all logits.

        The first token of all has no loss. `cache` may hold what came before: then the first one here is scored by it.
        Raises: ValueError where there is nothing to score.
        """
        return _score(self, input_ids, chunk_size=chunk_size, cache=cache)

    def score(self, *args: Any, **options: Any) -> Iterator[tuple[int, Tensor]]:
        """The old name of `token_losses`."""
        warn_renamed("model.score", "token_losses")
        return self.token_losses(*args, **options)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config.json's eos_token_id, else config.json's."""
        given = self.generation_config.stop_tokens
        return self.config.stop_tokens if given is None else given


def _prefill(
    model: Stepping,
    input_ids: Tensor,
    cache: HybridCache,
    chunk_size: int,
    *,
    segments: Segments | None,
    max_memory: int | str | None,
) -> Iterator[tuple[int, int]]:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    check_ids(input_ids, least=0)
    if not input_ids.numel() and not max(cache.lengths):  # behind a text that is there, nothing is to be run
        raise ValueError("The prompt is empty: give at least one token.")
    segments = Segments.full(input_ids) if segments is None else segments
    input_ids, segments = segments.closed(input_ids)
    if max_memory is not None:
        most = chunk_for(model, cache, segments.after(cache.lengths), parse_bytes(max_memory))
        chunk_size = min(chunk_size, most)
    past = cache.lengths[0] if segments.unpadded and len(set(cache.lengths)) == 1 else 0
    return _chunks(model, input_ids, cache, segments, past, chunk_size // GRID * GRID or chunk_size)


def chunk_for(model: Stepping, cache: HybridCache, segments: Segments, max_memory: int) -> int:
    """The largest chunk, a multiple of 64, with which cache and transient memory stay below `max_memory` bytes.

    Raises: ValueError where not even 64 tokens fit.
    """
    # A buffer that grows is there twice for a moment, its new place a quarter larger.
    keys_and_values = max((s.bytes_per_token for s in cache.layers if isinstance(s, KVCache)), default=0)
    grown = cache.nbytes() + (max(segments.ends) - max(cache.lengths)) * sum(
        s.bytes_per_token for s in (*cache.layers, cache.mtp) if isinstance(s, KVCache)
    )
    room = max_memory - int(1.25 * grown) - max(segments.ends) * keys_and_values
    weight = model.embed_tokens.weight

    def takes(chunk: int) -> int:
        return transient_bytes(model.config, segments.batch * (chunk + FEW - 1), weight.element_size())

    if takes(GRID) > room:
        needed = max_memory - room + takes(GRID)
        raise ValueError(
            f"This prompt needs {binary(needed)} beside the weights even in chunks of {GRID} tokens; max_memory is "
            f"{binary(max_memory)}: raise it, shorten the prompt, or make the cache with kv_dtype='int8'."
        )
    low, high = 1, max(1, -(-segments.length // GRID))  # in units of the grid
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes(middle * GRID) <= room else (low, middle - 1)
    return low * GRID


def transient_bytes(config: ModelConfig, tokens: int, element_size: int) -> int:
    """An upper bound of what a forward of so many tokens takes and gives back, on the CPU, without gradients or hooks.

    The residual stream is there for all tokens, everything else for PART of them at a time. Counted in tensors that
    are alive at once, and held to measured peaks by tests/model/test_memory.py, with compiled kernels and without.
    """
    c, e, in_torch = config, element_size, missing() is not None
    parts = [e * 3 * c.intermediate_size]
    if "full_attention" in c.layer_types:
        parts.append(e * c.head_dim * (9 * c.num_attention_heads + 4 * c.num_key_value_heads))
    if "linear_attention" in c.layer_types:
        values = c.linear_num_value_heads * c.linear_value_head_dim
        step_by_step = 16 * c.conv_channels if in_torch else 0  # convolution and norms in fp32, with what they add up
        parts.append(e * (3 * c.conv_channels + 4 * values) + 4 * (c.conv_channels - values) + step_by_step)
    if c.num_experts:
        inner = c.num_experts_per_tok * (c.hidden_size + 2 * c.moe_intermediate_size)
        step_by_step = 8 * c.num_experts_per_tok * c.hidden_size if in_torch else 0  # rows in fp32, and weighed
        shared = 3 * c.shared_expert_intermediate_size
        parts.append(e * (inner + shared + 2 * c.hidden_size) + 8 * c.num_experts + step_by_step)
    return tokens * e * 3 * c.hidden_size + min(tokens, PART) * max(parts) + SLACK


def _chunks(
    model: Stepping, input_ids: Tensor, cache: HybridCache, segments: Segments, past: int, chunk_size: int
) -> Iterator[tuple[int, int]]:
    total, last = input_ids.shape[1], cache.last_logits
    if last is None and not segments.unpadded and cache.hidden is not None:
        last = model.logits_after(cache)  # rows that get no tokens here keep theirs
    lead = past % chunk_size
    few = FEW if segments.unpadded and chunk_size >= GRID else 1  # elsewhere bits differ anyway
    for place, stop in spans(lead + total, chunk_size, few) if total else []:
        begin, end = max(place - lead, 0), stop - lead
        chunk, part = input_ids[:, begin:end], segments.part(begin, end)
        with torch.no_grad():  # not around the yield: it would reach the caller's code
            if part.unpadded:
                past = cache.lengths[0]
                kept = kept_within(past, chunk.shape[1])
                out = model(chunk, cache=cache, logits_to_keep=1)
                cache.last_logits = last = out.logits[:, -1]
                if kept is not None:
                    kept.hidden = out.hidden[:, kept.tokens - past - 1].clone()
            elif runs := part.runs:  # else all is padding
                hidden = model(chunk, segments=part, cache=cache, logits_to_keep=1).hidden
                ends = hidden[[run.row for run in runs], [run.end - 1 for run in runs]]
                logits = model.hook_logits(model.lm_head(ends))
                last = logits.new_zeros(cache.batch, logits.shape[-1]) if last is None else last.clone()
                last[[run.sequence for run in runs]] = logits
                cache.last_logits = last
        yield end, total


def _score(
    model: Stepping, input_ids: Tensor, *, chunk_size: int, cache: HybridCache | None
) -> Iterator[tuple[int, Tensor]]:
    check_ids(input_ids, least=0)
    batch, total = input_ids.shape
    if chunk_size < 1 or total < 2 - (cache is not None):
        raise ValueError("There is nothing to score: give two tokens, or one and a cache; chunk_size from 1.")
    return _losses(model, input_ids, chunk_size, model.new_cache(batch, max_len=total) if cache is None else cache)


def _losses(model: Stepping, input_ids: Tensor, chunk_size: int, cache: HybridCache) -> Iterator[tuple[int, Tensor]]:
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
    return F.cross_entropy(at_least_fp32(logits).flatten(0, 1), targets.flatten().long(), reduction="none").view_as(
        targets
    )
