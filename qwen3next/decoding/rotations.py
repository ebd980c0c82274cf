"""cos and sin of the positions that a step is at, computed for many positions at a time."""

import torch
from torch import Tensor

from qwen3next.decoding.protocol import Decodable

TABLE = 64  # positions whose rotation is computed at a time
KEPT = 64  # tables


class Rotations:
    """The tables of one model in one dtype. They are dropped with the plan when the model's RoPE changes."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, model: Decodable, position: int) -> tuple[Tensor, Tensor, int]:
        """cos and sin of TABLE positions, one of them this, and how many bytes before it."""
        block, row = divmod(position, TABLE)
        table = self._tables.get(block)
        if table is None:
            if len(self._tables) >= KEPT:
                self._tables.clear()  # a call in progress keeps those that it uses
            rope = model._rotation(torch.arange(block * TABLE, block * TABLE + TABLE)[None], self._dtype)
            table = self._tables[block] = rope.cos[0].contiguous(), rope.sin[0].contiguous()
        return *table, row * table[0].shape[-1] * table[0].element_size()
