"""A block over a long prompt, some tokens at a time, so that its temporary memory does not grow with the prompt.

The results are the same to the bit: parts end where chunks of the delta rule and tiles of attention end, and recurrent
states pass from part to part in full precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

from layers.dispatch.attached import attached
from layers.gated_deltanet import DeltaNetState
from layers.kernels.linear import FEW, spans
from layers.kernels.tiled_attention import TILE
from layers.moe import RouterStats
from layers.norm import at_least_fp32
from layers.rope import Rotation
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from layers.state.update_log import UpdateLog
from qwen3next.block import Block, BlockState
from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.kept_states import StateAfter, kept_within
from qwen3next.generation.pauses import pause, wanted

WHOLE: set[Any] = {
    Block.forward
}  # forwards that are a mixer and a feed-forward in turn, as `run_block` runs their parts
TOKENS = 2048  # of a long prompt in a part: whole chunks of the delta rule, whole tiles of attention


def run_block(
    block: nn.Module,
    x: Tensor,
    rope: Rotation,
    *,
    segments: Segments,
    state: BlockState,
    counted: Tensor | None,
    stats: bool,
) -> tuple[Tensor, RouterStats | None]:
    """`block(x, rope, …)`, in parts where the prompt is long or pauses, and nothing can tell the difference."""
    if stats or torch.compiler.is_compiling():  # before a comparison: a traced graph must not depend on the length
        return block(x, rope, segments=segments, state=state, counted=counted, stats=stats)
    short = x.shape[1] < TOKENS + FEW
    kept = kept_within(segments.offsets[0], x.shape[1]) if short and segments.unpadded else None
    whole = short and kept is None and not wanted()
    if whole or not _may_split(block, x):
        return block(x, rope, segments=segments, state=state, counted=counted, stats=stats)
    assert isinstance(block, Block)
    if short:
        if kept is not None and isinstance(state, DeltaNetState):
            x = _keeping(block, x, rope, segments, state, kept)
        else:
            x = block.mix(x, rope, segments, state)
        pause()
        return block.feed_forward(x, counted, stats=False)
    if segments.unpadded and segments.uniform_offset and isinstance(state, (KVCache, DeltaNetState)):
        return _in_parts(block, x, rope, segments, state), None
    x = block.mix(x, rope, segments, state)
    pause()
    parts = [block.feed_forward(x[:, a:b], None, stats=False)[0] for a, b in spans(x.shape[1], TOKENS)]
    return torch.cat(parts, dim=1), None


def may_keep(model: nn.Module, cache: HybridCache, tokens: int) -> bool:
    """Whether a call of so many tokens can keep a state inside: one that is short, with nothing attached."""
    if tokens >= TOKENS + FEW or cache.history or cache.tokens.device.type != "cpu":
        return False
    if cache.state_dtype is not None and cache.state_dtype.itemsize < 4:  # rounded where a call ends
        return False
    whole = all(type(module).forward in WHOLE for module in model.modules() if isinstance(module, Block))
    return whole and not attached(*model.modules())


def _keeping(
    block: Block, x: Tensor, rope: Rotation, segments: Segments, state: DeltaNetState, kept: StateAfter
) -> Tensor:
    """The mixer in two parts, between which its state is kept."""
    past, parts = segments.offsets[0], []
    at = kept.tokens - past
    for begin, end in ((0, at), (at, x.shape[1])):
        here = Segments.full(x[:, begin:end]).after([past + begin] * len(x))
        parts.append(block.mix(x[:, begin:end], Rotation(rope.cos[:, begin:end], rope.sin[:, begin:end]), here, state))
        if not begin:
            kept.states.append((state.conv, state.recurrent))
    return torch.cat(parts, dim=1)


def _may_split(block: nn.Module, x: Tensor) -> bool:
    """Whether no gradients are taken and no hook of any kind is attached, on the CPU."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or type(block).forward not in WHOLE:
        return False
    return not attached(*block.modules())


def _in_parts(block: Block, x: Tensor, rope: Rotation, segments: Segments, state: KVCache | DeltaNetState) -> Tensor:
    past, t, noted, lead = segments.offsets[0], x.shape[1], 0, 0
    own = state if isinstance(state, KVCache) else DeltaNetState(state.conv, at_least_fp32(state.recurrent))
    if isinstance(state, KVCache):
        lead = past % TILE  # attention's tiles, which lie on a grid of all positions, stay whole
        state.reserve(segments)  # once for all
    y = torch.empty_like(x)
    for place, stop in spans(lead + t, TOKENS):
        begin, end = max(place - lead, 0), stop - lead
        if begin:
            pause()
        if isinstance(state, DeltaNetState) and isinstance(own, DeltaNetState):
            noted += _noted(state, own, begin, end)
        here = Segments.full(x[:, begin:end]).after([past + begin] * len(x))
        turn = Rotation(rope.cos[:, begin:end], rope.sin[:, begin:end])
        part = block.mix(x[:, begin:end], turn, here, own)
        pause()
        y[:, begin:end] = block.feed_forward(part, None, stats=False)[0]
    if isinstance(state, DeltaNetState) and isinstance(own, DeltaNetState):
        if own.update_log is not None:
            own.update_log.join(noted)
            own.update_log.dtype = state.recurrent.dtype
        state.conv, state.recurrent, state.update_log = (
            own.conv,
            own.recurrent.to(state.recurrent.dtype),
            own.update_log,
        )
    return y


def _noted(state: DeltaNetState, own: DeltaNetState, begin: int, end: int) -> bool:
    """Whether the part from `begin` to `end` of a call is noted; its own state then has a update_log to note it on."""
    if state.update_log is None or state.cut >= end:
        return False
    own.cut = max(state.cut - begin, 0)  # notes begin here, or go on
    if state.cut == begin and begin:
        own.update_log = UpdateLog(own.conv, own.recurrent, own.recurrent.dtype)
    elif own.update_log is None:
        own.update_log = state.update_log
    return True
