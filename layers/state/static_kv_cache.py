"""Keys and values in a buffer of fixed size, at positions that a tensor holds: a CUDA graph can repeat such a step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layers.norm import at_least_fp32
from layers.segments import Segments


class StaticKVCache:
    """A view of what a KVCache holds, for steps of one token a row.

    Args:
        k, v: the buffers, written in place.
        position: of each row's new token; what lies behind it is not read.
    """

    def __init__(
        self, k: Float[Tensor, "b kvh n d"], v: Float[Tensor, "b kvh n d"], position: Int[Tensor, "b"]
    ) -> None:
        self.k, self.v, self.position = k, v, position
        self._rows = torch.arange(len(k), device=k.device)
        self._places = torch.arange(k.shape[2], device=k.device)

    def append(self, k: Float[Tensor, "b 1 kvh d"], v: Float[Tensor, "b 1 kvh d"], _segments: Segments) -> None:
        """Store the keys and values of each row's new token."""
        for buffer, x in ((self.k, k), (self.v, v)):
            buffer[self._rows, :, self.position] = x[:, 0].to(buffer.dtype)

    def attend(self, q: Float[Tensor, "b 1 h d"]) -> Float[Tensor, "b 1 h d"]:
        """softmax(q kᵀ / √d) v over each row's tokens, in plain products that read them once."""
        b, _, h, d = q.shape
        rows = q.view(b, self.k.shape[1], -1, d)  # queries that share a key head
        scores = at_least_fp32(rows @ self.k.to(q.dtype).mT) * d**-0.5
        behind = self._places > self.position[:, None, None, None]
        pattern = scores.masked_fill(behind, -torch.inf).softmax(-1).to(q.dtype)
        return (pattern @ self.v.to(q.dtype)).view(b, 1, h, d)
