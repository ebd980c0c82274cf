"""Weights in int8 or FP8 times scales: FP8 blocks, and compressed-tensors' int-, float- and naive-quantized.

w = code · scale, or (code − zero point) · scale. A scale belongs to the tensor, a row, a group of a row or a block.
Layout: `weight` int8 or float8 (out, in), `weight_scale` or `weight_scale_inv`, `weight_zero_point` like the scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.quantised.group_weight import SCALES, GroupWeight
from layers.quantised.held import GroupLayout
from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.checkpoints.quantised.weight import QuantisedWeight, check, check_scales
from qwen3next.files.tensor_files import CODES, Files, Stored

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (torch.float8_e8m0fnu, torch.uint8)  # a power of two in a byte


@dataclass(frozen=True)
class ScaledWeight(QuantisedWeight):
    """`tag` is the name's end for the scale; `block` the rows and columns that share one, if it is by blocks."""

    tag: str
    block: tuple[int, int] | None

    format = "FP8 or int8"
    codes = ""

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, Stored], settings: Settings) -> "ScaledWeight":
        tag = "_scale_inv" if "_scale_inv" in parts else "_scale"
        scale, shape = parts[tag], parts[""].shape
        kinds = FP8 if tag == "_scale_inv" else (*FP8, torch.int8)
        what = "FP8" if tag == "_scale_inv" else "FP8 or int8"
        check(parts[""].dtype in kinds, parts, tag, f"it holds {name}{tag}, but {name} is not stored in {what}")
        check_scales(f"{name}{tag}", scale, *BYTES)
        block = settings.block
        shapes = _blocks(shape, block) if tag == "_scale_inv" else _any(shape, block)
        check(
            scale.shape in shapes,
            parts,
            tag,
            f"{name}{tag} has shape {list(scale.shape)}, but the weight's blocks require {list(shapes[0])}",
        )
        if zeros := parts.get("_zero_point"):
            fits = zeros.shape == scale.shape and not zeros.dtype.is_floating_point
            check(fits, parts, "_zero_point", f"{name}_zero_point must be integers of the scale's shape")
        return cls(name, parts, shape, tag, block)

    def read(self, files: Files, index: int | None = None) -> Tensor:
        codes, scale = self.part(files, "", index).float(), self.part(files, self.tag, index)
        scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
        if "_zero_point" in self.parts:
            codes -= self._spread(self.part(files, "_zero_point", index).float(), codes)
        return codes.mul_(self._spread(scale, codes))

    def group_layout(self, files: Files) -> GroupLayout | None:
        """Of int8 with a scale a row, or a group of a row."""
        scale, (*outer, columns) = self.parts[self.tag], self.shape
        counts = {(*outer, n): n for n in (1, scale.shape[-1] if scale.shape else 1)} | {tuple(outer): 1}
        count = counts.get(scale.shape, 0)
        if (
            self.parts[""].dtype != torch.int8
            or scale.dtype not in SCALES
            or not count
            or columns % count
            or columns % 2
        ):
            return None
        if len(outer) > 1 and "_zero_point" in self.parts:
            return None
        zeros = self.part(files, "_zero_point") if "_zero_point" in self.parts else torch.zeros(1)
        if zeros.numel() and not -128 <= int(zeros.min()) <= int(zeros.max()) <= 127:
            return None
        return GroupLayout(8, 0 if count == 1 else columns // count, scale.dtype, bool(zeros.any()))

    def read_groups(self, files: Files, index: int | None = None) -> GroupWeight:
        codes, scale = self.part(files, "", index), self.part(files, self.tag, index)
        layout = self.group_layout(files)
        assert layout is not None
        rows = codes.shape[0]
        zero = self.part(files, "_zero_point", index).to(torch.int8).view(rows, -1) if layout.zero else None
        return GroupWeight(codes, scale.view(rows, -1), zero)

    def _spread(self, x: Tensor, codes: Tensor) -> Tensor:
        """Scales or zero points in a shape that broadcasts with the codes."""
        rows, columns = codes.shape[-2:] if codes.ndim > 1 else (1, codes.shape[-1])
        if x.numel() == 1:
            return x.reshape(())
        if x.ndim < codes.ndim:
            return x[..., None]  # one a row
        if x.shape[-2:] == (rows, 1):
            return x
        if x.shape[-2] == rows and columns % x.shape[-1] == 0 and self.tag == "_scale":
            return x.repeat_interleave(columns // x.shape[-1], -1)
        assert self.block is not None
        x = x.repeat_interleave(self.block[0], -2)[..., :rows, :]
        return x.repeat_interleave(self.block[1], -1)[..., :columns]


def _blocks(shape: tuple[int, ...], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Shapes that the scales of blocks may have."""
    if block is None or len(shape) < 2:
        return [(), (1,)]
    return [(*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))]


def _any(shape: tuple[int, ...], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Shapes of one scale a row, a tensor, a group of a row, or a block."""
    if len(shape) < 2:
        return [(), (1,)]
    groups = [(*shape[:-1], n) for n in range(1, shape[-1] + 1) if shape[-1] % n == 0]
    return [*groups, shape[:-1], *(((), (1,)) if len(shape) == 2 else ()), *_blocks(shape, block)]


def lacks_scales(name: str, stored: Stored) -> str:
    """Why a tensor cannot be read without scales; "" if it can."""
    if stored.dtype in FP8:
        return f"{stored.path}: {name} is stored in FP8, but its scales {name}_scale_inv are missing."
    if not stored.dtype.is_floating_point or stored.dtype == torch.float8_e8m0fnu:
        return f"{stored.path}: {name} is stored as {CODES[stored.dtype]}, which is not supported."
    return ""
