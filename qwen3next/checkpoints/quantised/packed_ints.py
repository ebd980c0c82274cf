"""compressed-tensors' pack-quantized: integers of 2, 4 or 8 bits in int32 words.

w = (code − zero point) · scale. Layout: `weight_packed` int32 (out, ⌈in · bits / 32⌉), lowest bits first, codes plus
2^(bits−1); `weight_scale` (out, groups); `weight_shape` int64 (out, in); if asymmetric, `weight_zero_point` int32
packed along out (⌈out · bits / 32⌉, groups); for old act-order folders `weight_g_idx` (in), the group of each input.
Source: compressed-tensors 0.20.1, compressors/pack_quantized.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.quantised.group_weight import GroupWeight
from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.checkpoints.quantised.weight import GroupedCodes, check, check_scales, unpack
from qwen3next.files.tensor_files import Files, Stored


@dataclass(frozen=True)
class PackedInts(GroupedCodes):
    bits: int

    format = "compressed-tensors pack-quantized"
    codes = "_packed"

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, Stored], settings: Settings, files: Files) -> "PackedInts":
        def must(found: bool, sentence: str, tag: str = "_packed") -> None:
            check(found, parts, tag, f"{name}{tag} ({cls.format}) {sentence}")

        must("_scale" in parts and "_shape" in parts, f"needs {name}_scale and {name}_shape, which are missing")
        packed, scale, shape = parts["_packed"], parts["_scale"], parts["_shape"]
        must(shape.shape == (len(packed.shape),) and not shape.dtype.is_floating_point, "must be a shape", "_shape")
        true = tuple(files.read(shape).tolist())
        must(len(true) > 1 and true[:-1] == packed.shape[:-1], f"is for a weight of shape {list(true)}", "_shape")
        bits = _bits(true[-1], packed.shape[-1], settings)
        must(bits in (2, 4, 8), f"holds integers of {bits or 'an unknown number of'} bits; only 2, 4 and 8 are read")
        check_scales(f"{name}_scale", scale)
        groups = scale.shape[-1] if scale.shape else 1
        ordered = "_g_idx" in parts
        fits = scale.shape == (*true[:-1], groups) and groups > 0 and (ordered or true[-1] % groups == 0)
        must(fits or scale.shape in ((), (1,)), f"has shape {list(scale.shape)} for a weight {list(true)}", "_scale")
        if ordered:
            must(parts["_g_idx"].shape == true[-1:], "must have an entry for each input", "_g_idx")
        if zeros := parts.get("_zero_point"):
            rows = math.ceil(true[-2] * bits / 32)
            fits = zeros.dtype == torch.int32 and zeros.shape == (*true[:-2], rows, groups)
            must(fits or (zeros.dtype, zeros.shape) == (torch.int8, scale.shape), "does not fit", "_zero_point")
        return cls(name, parts, true, bits)

    def grouped(self, files: Files, index: int | None = None) -> tuple[Tensor, Tensor | int, Tensor, Tensor | None]:
        codes = unpack(self.part(files, "_packed", index), self.bits)[..., : self.shape[-1]]
        scale = self.part(files, "_scale", index)
        scale = scale.reshape(*(1 for _ in codes.shape)) if scale.numel() == 1 else scale
        zeros: Tensor | int = 1 << (self.bits - 1)
        if "_zero_point" in self.parts:
            zeros = self._zeros(self.part(files, "_zero_point", index))
        return codes, zeros, scale, self._groups(files, scale.shape[-1])

    def read_groups(self, files: Files, index: int | None = None) -> GroupWeight:
        """As the base class, without unpacking: words of little-endian bytes hold the codes in the order of groups."""
        if sys.byteorder != "little" or self.group_layout(files) is None:
            return super().read_groups(files, index)
        codes = self.part(files, "_packed", index).view(torch.uint8)[..., : self.shape[-1] * self.bits // 8]
        codes = codes if self.bits == 4 else (codes ^ 128).view(torch.int8)
        zero = None
        if "_zero_point" in self.parts:
            zero = (self._zeros(self.part(files, "_zero_point", index)) - (128 if self.bits == 8 else 0)).to(torch.int8)
        return GroupWeight(codes, self.part(files, "_scale", index), zero)

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def scales_part(self) -> Stored:
        return self.parts["_scale"]

    def in_order(self, files: Files) -> bool:  # noqa: ARG002
        return "_g_idx" not in self.parts

    def zero_points(self, files: Files) -> Tensor | None:
        if "_zero_point" not in self.parts:
            return None
        return torch.zeros(1) if len(self.shape) > 2 else self._zeros(self.part(files, "_zero_point"))

    def _zeros(self, packed: Tensor) -> Tensor:
        if packed.dtype == torch.int8:
            return packed.float().view(-1, self.parts["_scale"].shape[-1]) + (1 << (self.bits - 1))
        return unpack(packed.mT, self.bits)[..., : self.shape[-2]].mT.float()

    def _groups(self, files: Files, count: int) -> Tensor | None:
        if "_g_idx" not in self.parts:
            return None
        groups = files.read(self.parts["_g_idx"]).long()
        if bool((groups == -1).any()):  # the writer's mark for "not ordered"
            return torch.arange(len(groups)) // math.ceil(len(groups) / count)
        if not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise ValueError(f"{self.path}: {self.name}_g_idx names a group that does not exist: copy it again.")
        return groups


def _bits(columns: int, words: int, settings: Settings) -> int:
    """Bits a code, 0 if the number of words fits none; config.json decides where several fit (few columns)."""
    fitting = [bits for bits in range(1, 9) if math.ceil(columns * bits / 32) == words and columns > 0]
    told = [bits for bits in fitting if bits in settings.every("num_bits")]
    return told[0] if len(told) == 1 else fitting[0] if len(fitting) == 1 else 0
