"""What every layer made in one call, as tuples: hidden states, attention patterns, router logits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from layers.hook_point import HookPoint
from layers.segments import Segments


@contextmanager
def watched(core: Any, wanted: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what is wanted of each layer while the model runs."""
    seen: dict[str, list[Tensor]] = {key: [] for key in wanted}
    softmax = [i for i, block in enumerate(core.blocks) if hasattr(block, "self_attn")]
    points: dict[str, list[HookPoint]] = {
        "hidden_states": [block.hook_resid_pre for block in core.blocks],
        "attentions": [core.blocks[i].self_attn.hook_pattern for i in softmax],
        "router_logits": [block.mlp.hook_router_logits for block in core.blocks if block.sparse],
    }
    with ExitStack() as stack:
        for key, found in seen.items():
            for point in points[key]:
                handle = point.register_forward_hook(lambda _module, _args, x, found=found: found.append(x))
                stack.callback(handle.remove)
        if "attentions" in seen:
            stack.enter_context(core.materialize(pattern=softmax))
        yield seen


def recorded(
    seen: dict[str, list[Tensor]], segments: Segments, columns: Tensor | None
) -> dict[str, tuple[Tensor, ...]]:
    """What was collected, in the columns of the call; attention's last axis in those that `columns` of a cache says."""

    def attention(x: Tensor) -> Tensor:  # (b, h, t, s), s by the places of a cache, or the columns of the call
        if segments.gapped:
            x = segments.reopened(x.transpose(1, 2)).transpose(1, 2)
        if columns is None:
            return segments.reopened(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if segments.gapped else x
        place = (columns.long().cumsum(1) - 1).clamp(min=0)[:, None, None]
        return x.gather(-1, place.expand(*x.shape[:3], -1)).masked_fill(~columns[:, None, None], 0.0)

    kinds = {
        "hidden_states": segments.reopened,
        "attentions": attention,
        "router_logits": lambda x: segments.reopened(x).flatten(0, 1),
    }
    return {key: tuple(kinds[key](x) for x in found) for key, found in seen.items()}


def carried_on(hidden: Tensor, segments: Segments) -> Tensor:
    """Absent tokens get what the last real one before them has: its logits are the next token's of a short row."""
    if not segments.padded or bool(segments.mask[:, -1].all()):
        return hidden
    index = torch.arange(segments.length, device=hidden.device)
    latest = torch.where(segments.mask, index, 0).cummax(1).values
    return hidden.gather(1, latest[..., None].expand_as(hidden))
