"""Weights in FP4 (E2M1): compressed-tensors' nvfp4- and mxfp4-pack-quantized, and modelopt's NVFP4.

Codes are uint8 (out, in/2), two a byte, the low one first; bit 3 is the sign.

| format | codes | scale of a group | w |
|---|---|---|---|
| nvfp4 | `weight_packed` | `weight_scale` E4M3 (out, in/16) | code · (scale / `weight_global_scale`) |
| modelopt | `weight` | `weight_scale` E4M3 (out, in/16) | code · (scale · `weight_scale_2`) |
| mxfp4 | `weight_packed` | `weight_scale` uint8 (out, in/32) | code · 2^(scale − 127) |

Sources: compressed-tensors 0.20.1, compressors/nvfp4 and mxfp4; nvidia-modelopt 0.47.0, nvfp4_tensor.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3next.checkpoints.quantised.weight import QuantisedWeight, check, check_scales
from qwen3next.files.tensor_files import Files, Stored

PIECE = 2**20  # bytes unpacked at a time
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass(frozen=True)
class FP4Weight(QuantisedWeight):
    """Attributes of a subclass: `group` inputs share a scale; `tensor_scale` is the part of the scale of the tensor."""

    codes = "_packed"
    group = 16
    tensor_scale = ""

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, Stored]) -> "FP4Weight":
        def must(found: bool, sentence: str) -> None:
            check(found, parts, cls.codes, f"{name}{cls.codes} ({cls.format}) {sentence}")

        packed = parts[cls.codes]
        must("_scale" in parts, f"needs {name}_scale, which is missing")
        must(packed.dtype == torch.uint8 and len(packed.shape) > 1, "must hold two codes a byte")
        shape = (*packed.shape[:-1], 2 * packed.shape[-1])
        scale = parts["_scale"]
        must(
            shape[-1] % cls.group == 0 and scale.shape == (*shape[:-1], shape[-1] // cls.group),
            f"has scales of shape {list(scale.shape)}, which are not one for {cls.group} inputs",
        )
        must("_zero_point" not in parts, "has zero points, which this format does not have")
        if cls.tensor_scale:
            check_scales(f"{name}_scale", scale, torch.float8_e4m3fn)
            check_scales(f"{name}{cls.tensor_scale}", parts[cls.tensor_scale])
            whole = parts[cls.tensor_scale].shape
            must(whole in ((), (1,), shape[:-2], (*shape[:-2], 1)), f"has a tensor scale of shape {list(whole)}")
        else:
            must(scale.dtype in (torch.uint8, torch.float8_e8m0fnu), "needs scales of one byte")
        return cls(name, parts, shape)

    def read(self, files: Files, index: int | None = None) -> Tensor:
        packed = self.part(files, self.codes, index)
        scale = self._scale(files, index)
        out = torch.empty(*packed.shape, 2)
        pairs, rows, step = _pairs(), packed.flatten(0, -2), max(PIECE // packed.shape[-1], 1)
        for begin in range(0, len(rows), step):  # indices take 8 bytes each
            out.flatten(0, -3)[begin : begin + step] = pairs[rows[begin : begin + step].int()]
        return out.flatten(-2).unflatten(-1, (-1, self.group)).mul_(scale[..., None]).flatten(-2)

    def _scale(self, files: Files, index: int | None) -> Tensor:
        """The scale of each group in fp32."""
        raise NotImplementedError

    def _of_tensor(self, files: Files, index: int | None) -> Tensor:
        whole = files.read(self.parts[self.tensor_scale]).float().flatten()
        if whole.numel() == 1:
            return whole.view(())
        return whole[index] if index is not None else whole.view(-1, 1, 1)  # one an expert


class NVFP4(FP4Weight):
    format = "compressed-tensors nvfp4-pack-quantized"
    tensor_scale = "_global_scale"

    def _scale(self, files: Files, index: int | None) -> Tensor:
        return self.part(files, "_scale", index).float() / self._of_tensor(files, index)


class ModeloptNVFP4(FP4Weight):
    format = "modelopt NVFP4"
    codes = ""
    tensor_scale = "_scale_2"

    def _scale(self, files: Files, index: int | None) -> Tensor:
        return self.part(files, "_scale", index).float() * self._of_tensor(files, index)


class MXFP4(FP4Weight):
    format = "compressed-tensors mxfp4-pack-quantized"
    group = 32

    def _scale(self, files: Files, index: int | None) -> Tensor:
        return self.part(files, "_scale", index).view(torch.float8_e8m0fnu).float()


def _pairs() -> Tensor:
    """(256, 2): the two values that a byte holds."""
    values = torch.cat((VALUES, -VALUES))
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
