"""The keys and values of several MTP depths, in the place of a cache where attention runs with gradients."""

import torch
from torch import Tensor

from layers.segments import Segments


class DraftKeys:
    """Attention adds the keys and values of a depth, then looks at all: those of depth 1 up to its token, and its own.

    Attributes:
        keys, values: (b, t, kvh, d) of each depth so far.
    """

    def __init__(self, segments: Segments):
        self.segments = segments
        self.keys, self.values = list[Tensor](), list[Tensor]()

    def append(self, k: Tensor, v: Tensor, _segments: Segments) -> None:
        self.keys.append(k)
        self.values.append(v)

    @property
    def mask(self) -> Tensor | None:
        """(b, 1, t, depths · t) where the last depth's queries may look; None means causal."""
        depths, segments = len(self.keys), self.segments
        if depths == 1 and segments.unpadded:
            return None
        first = segments.attention_mask
        own = torch.eye(segments.length, dtype=torch.bool, device=first.device).repeat(1, depths - 1)
        return torch.cat((first, own.expand(*first.shape[:-1], -1)), dim=-1)
