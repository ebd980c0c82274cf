"""Modules that hold weights in groups as buffers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layers.quantised.group_weight import GroupWeight

INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes


@dataclass(frozen=True)
class GroupLayout:
    """How a weight is kept in groups, but for its shape: bits, inputs of a group, dtype of scales, zero points or not.

    `group_size` 0 is a whole row.
    """

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16
    zero: bool = False

    def empty(self, *shape: int) -> GroupWeight:
        """Memory for a weight (…, out, in)."""
        *outer, columns = shape
        groups = columns // (self.group_size or columns)
        kind, size = (torch.uint8, columns // 2) if self.bits == 4 else (torch.int8, columns)
        zero = torch.zeros(*outer, groups, dtype=torch.int8) if self.zero else None
        scale = torch.ones(*outer, groups, dtype=self.scale_dtype)
        return GroupWeight(torch.zeros(*outer, size, dtype=kind), scale, zero)

    def nbytes(self, *shape: int) -> int:
        with torch.device("meta"):
            return self.empty(*shape).nbytes

    @classmethod
    def of(cls, weight: GroupWeight) -> "GroupLayout":
        """The layout of a weight."""
        size = 0 if weight.scale.shape[-1] == 1 else weight.group_size
        return cls(weight.bits, size, weight.scale.dtype, weight.zero is not None)


class HoldsGroups(nn.Module):
    """Base of modules with weights in groups. They are buffers: optimizers do not see them."""

    def hold(self, name: str, weight: GroupWeight) -> None:
        """Register a weight's tensors as NAME_codes, NAME_scale and, if it has zero points, NAME_zero."""
        for part in ("codes", "scale", "zero"):
            if (tensor := getattr(weight, part)) is not None:
                self.register_buffer(f"{name}_{part}", tensor)

    def held(self, name: str) -> GroupWeight:
        buffers = self._buffers
        codes, scale = buffers[f"{name}_codes"], buffers[f"{name}_scale"]
        if codes is None or scale is None:
            raise ValueError(
                f"A weight in groups needs the buffers {name}_codes and {name}_scale; one of them is None."
            )
        return GroupWeight(codes, scale, buffers.get(f"{name}_zero"))

    def all_held(self) -> list[GroupWeight]:
        """All its weights in groups."""
        return [self.held(name.removesuffix("_codes")) for name in self._buffers if name.endswith("_codes")]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model; but `model.bfloat16()` must not round the scales, so they pass as whole numbers."""
        scales = {name: x for name, x in self._buffers.items() if name.endswith("_scale") and x is not None}
        for name, x in scales.items():
            self._buffers[name] = x.view(INTEGERS[x.itemsize])
        super()._apply(fn, recurse)
        for name, x in scales.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved.view(x.dtype)
        return self
