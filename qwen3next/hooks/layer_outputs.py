"""What every layer made in one call, as tuples: hidden states, attention patterns, router logits."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from layers.hook_point import HookPoint
from layers.moe import RouterStats
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


class Columns:
    """The columns of a call, and those that run: a single row runs without its absent tokens.

    A cache can take back tokens of rows without absent ones alone.

    Attributes:
        run: the segments that run.
    """

    def __init__(self, segments: Segments):
        self.run = self._given = segments
        self._index: Tensor | None = None
        if segments.batch == 1 and not segments.packed and segments.padded and len(segments.real_tokens):
            self._index = segments.real_tokens
            self.run = Segments(1, len(self._index), segments.device)

    def taken(self, x: Tensor) -> Tensor:
        """(b, t, …) in the columns that run."""
        return x if self._index is None else x[:, self._index]

    def spread(self, x: Tensor) -> Tensor:
        """(b, t, …) in the columns of the call; zeros at absent tokens that did not run."""
        if self._index is None:
            return x
        return x.new_zeros(1, self._given.length, *x.shape[2:]).index_copy(1, self._index, x)

    def back(self, x: Tensor) -> Tensor:
        """What hooks saw, (b, t, …), in the columns of the call."""
        return self._given.reopened(x) if self._index is None else self.spread(x)

    @property
    def moved(self) -> bool:
        return self._index is not None or self._given.gapped


def recorded(seen: dict[str, list[Tensor]], columns: Columns, held: Tensor | None) -> dict[str, tuple[Tensor, ...]]:
    """What was collected, in the columns of the call; attention's last axis in those of a cache, `held` (b, n)."""

    def attention(x: Tensor) -> Tensor:  # (b, h, t, s), s by the places of a cache, or the columns that ran
        if columns.moved:
            x = columns.back(x.transpose(1, 2)).transpose(1, 2)
        if held is None:
            return columns.back(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if columns.moved else x
        place = (held.long().cumsum(1) - 1).clamp(min=0)[:, None, None]
        return x.gather(-1, place.expand(*x.shape[:3], -1)).masked_fill(~held[:, None, None], 0.0)

    kinds = {
        "hidden_states": columns.back,
        "attentions": attention,
        "router_logits": lambda x: columns.back(x).flatten(0, 1),
    }
    return {key: tuple(kinds[key](x) for x in found) for key, found in seen.items()}


def carried_on(hidden: Tensor, segments: Segments) -> Tensor:
    """Absent tokens get what the last real one before them has: its logits are the next token's of a short row."""
    if not segments.padded:
        return hidden
    index = torch.arange(segments.length, device=hidden.device)
    latest = torch.where(segments.mask, index, 0).cummax(1).values
    return hidden.gather(1, latest[..., None].expand_as(hidden))


def pooled_balance(stats: Sequence[RouterStats], top_k: int) -> Tensor:
    """transformers' load-balancing loss: e · Σ f p, where f and p are means over tokens and layers alike."""
    load, probability = (torch.stack([getattr(x, key) for x in stats]).mean(0) for key in ("load", "probability"))
    return load.numel() * top_k * (load * probability).sum()
