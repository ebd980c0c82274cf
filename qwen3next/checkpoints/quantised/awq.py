"""AWQ in its gemm packing: integers of 4 bits, packed along the outputs.

w[o, i] = (code − zero point) · scale. Layout: `qweight` int32 (in, out/8), `qzeros` int32 (groups, out/8), `scales`
(groups, out). Of the 8 outputs in a word, the one at bits 4k is number 0, 2, 4, 6, 1, 3, 5, 7 for k = 0 … 7.
Source: autoawq 0.2.6, awq/utils/packing_utils.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.checkpoints.quantised.weight import GroupedCodes, check, check_scales, unpack
from qwen3next.files.tensor_files import Files, Stored

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AWQWeight(GroupedCodes):
    format = "AWQ gemm"
    codes = "qweight"

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, Stored], settings: Settings) -> "AWQWeight":
        def must(found: bool, sentence: str) -> None:
            check(found, parts, "qweight", f"qweight of {name} ({cls.format}) {sentence}")

        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        version = str(settings.first("version") or "gemm").lower()
        must(version == "gemm", f"is packed as {version!r}: only 'gemm' is read")
        must(qweight.dtype == torch.int32 and qzeros.dtype == torch.int32, "and its qzeros must be int32 words")
        check_scales(f"scales of {name}", scales)
        (inputs, words), (groups, out) = qweight.shape, scales.shape
        must(out == 8 * words and qzeros.shape == (groups, words), f"has shape {list(qweight.shape)}")
        must(groups > 0 and inputs % groups == 0, f"has {groups} groups for {inputs} inputs")
        return cls(name, parts, (out, inputs))

    code_bits = 4

    def grouped(self, files: Files, index: int | None = None) -> tuple[Tensor, Tensor | int, Tensor, Tensor | None]:
        assert index is None
        codes = _ordered(files.read(self.parts["qweight"])).T
        return codes, self.zero_points(files), files.read(self.parts["scales"]).T, None

    def zero_points(self, files: Files) -> Tensor:
        return _ordered(files.read(self.parts["qzeros"])).T.float()

    @property
    def scales_part(self) -> Stored:
        return self.parts["scales"]

    @property
    def group_count(self) -> int:
        return self.parts["scales"].shape[0]


def _ordered(words: Tensor) -> Tensor:
    """Codes (rows, out) of words (rows, out / 8)."""
    at = [ORDER.index(i) for i in range(8)]
    return unpack(words, 4).unflatten(-1, (-1, 8))[..., at].flatten(-2)
