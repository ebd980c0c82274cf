"""A weight that is stored as several tensors: its codes, scales and zero points."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from layers.quantised.group_weight import GroupWeight, pack
from layers.quantised.held import GroupLayout
from qwen3next.files.tensor_files import CODES, Files, Stored

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantisedWeight(ABC):
    """One weight.

    Attributes:
        name: the weight's released name, such as "model.layers.0.mlp.up_proj.weight".
        parts: the stored tensors, by what the format appends to the name ("" for codes under the weight's own name).
        shape: the weight's shape, (out, in), or (experts, out, in) for fused experts.
    """

    name: str
    parts: Mapping[str, Stored]
    shape: tuple[int, ...]

    format: ClassVar[str]
    codes: ClassVar[str]  # the part that holds the quantised numbers

    @abstractmethod
    def read(self, files: Files, index: int | None = None) -> Tensor:
        """The weight in fp32, or `[index]` of fused experts. Raises: ValueError for values that cannot be right."""

    def group_layout(self, files: Files) -> GroupLayout | None:
        """How `read_groups` returns it; None if its values are not those of groups of 4 or 8 bits."""
        assert files
        return None

    def read_groups(self, files: Files, index: int | None = None) -> GroupWeight:
        """The weight, or `[index]` of fused experts, in groups; of the same values as `read`."""
        raise NotImplementedError

    @property
    def path(self) -> Path:
        return self.parts[self.codes].path

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes in the file."""
        return self.parts[self.codes].dtype

    @property
    def exact_dtype(self) -> torch.dtype | None:
        """The dtype after reading if config.json's does not decide it."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes in the files, scales and zero points included."""
        return sum(part.nbytes for part in self.parts.values())

    def part(self, files: Files, tag: str, index: int | None = None) -> Tensor:
        """A stored tensor; `[index]` of it if it has an axis for experts."""
        stored = self.parts[tag]
        return files.read(stored, index if len(stored.shape) > 2 else None)


@dataclass(frozen=True)
class GroupedCodes(QuantisedWeight):
    """A weight whose value is `scale_groups` of what `grouped` returns."""

    @abstractmethod
    def grouped(self, files: Files, index: int | None = None) -> tuple[Tensor, Tensor | int, Tensor, Tensor | None]:
        """Codes (…, out, in) in uint8, zero points, scales, groups: the arguments of `scale_groups`."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code."""

    @abstractmethod
    def zero_points(self, files: Files) -> Tensor | None:
        """All zero points; None if there are none."""

    @property
    @abstractmethod
    def scales_part(self) -> Stored:
        """The stored scales."""

    def in_order(self, files: Files) -> bool:
        """Whether groups are equal runs of neighbouring inputs."""
        assert files
        return True

    def read(self, files: Files, index: int | None = None) -> Tensor:
        return scale_groups(*self.grouped(files, index))

    def group_layout(self, files: Files) -> GroupLayout | None:
        bits, count = self.code_bits, self.group_count
        if bits not in (4, 8) or self.shape[-1] % 2 or count < 1 or self.shape[-1] % count or not self.in_order(files):
            return None
        zeros = self.zero_points(files)
        uneven = zeros is not None and bool((zeros != 1 << (bits - 1)).any())
        return GroupLayout(bits, 0 if count == 1 else self.shape[-1] // count, self.scales_part.dtype, uneven)

    @property
    def group_count(self) -> int:
        """Groups of a row; 0 if a scale does not belong to rows."""
        return 0 if math.prod(self.scales_part.shape) == 1 else self.scales_part.shape[-1]

    def read_groups(self, files: Files, index: int | None = None) -> GroupWeight:
        layout = self.group_layout(files)
        assert layout is not None
        codes, zeros, scale, _ = self.grouped(files, index)
        codes = pack(codes) if layout.bits == 4 else (codes ^ 128).view(torch.int8)
        zero = None
        if layout.zero:
            assert isinstance(zeros, Tensor)
            zero = (zeros - (128 if layout.bits == 8 else 0)).to(torch.int8)
        return GroupWeight(codes, scale, zero)


def check(found: bool, parts: Mapping[str, Stored], codes: str, sentence: str) -> None:
    """Raises: ValueError of this sentence, after the file's name, unless `found`."""
    if not found:
        raise ValueError(f"{parts[codes].path}: {sentence}.")


def check_scales(name: str, stored: Stored, *more: torch.dtype) -> None:
    """Raises: ValueError unless scales are stored in a float dtype, or in one of `more`."""
    if stored.dtype not in (*FLOATS, *more):
        raise ValueError(f"{stored.path}: {name} is stored as {CODES[stored.dtype]}, which is not supported.")


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes (…, n · 32 / bits) in uint8 from int32 words or bytes (…, n), lowest bits first.

    Args:
        bits: 2, 4 or 8, so that no code lies in two bytes.
    """
    assert bits in (2, 4, 8)
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # strides too, for one word a row
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)


def scale_groups(codes: Tensor, zeros: Tensor | int, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """(codes − zeros) · scale in fp32, in place after the first copy: a matrix may be large.

    Args:
        codes: (…, out, in).
        zeros: (…, out, number of groups), or one number.
        scale: (…, out, number of groups).
        groups: the group of each input (in); None if groups are equal runs of inputs.
    """
    scale = scale.float()
    if groups is not None:
        zeros = zeros[..., groups] if isinstance(zeros, Tensor) else zeros
        return codes.float().sub_(zeros).mul_(scale[..., groups])
    parts = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return parts.sub_(zeros[..., None] if isinstance(zeros, Tensor) else zeros).mul_(scale[..., None]).flatten(-2)
