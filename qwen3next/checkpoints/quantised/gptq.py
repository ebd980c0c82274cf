"""GPTQ: integers of 2, 4 or 8 bits, packed along the inputs; also what AutoRound writes in this packing.

w[o, i] = (code − zero point) · scale, both of group g_idx[i]. Layout: `qweight` int32 (in · bits / 32, out), lowest
bits first; `qzeros` int32 (groups, out · bits / 32); `scales` (groups, out); `g_idx` (in), which may be missing if
groups are runs of group_size inputs. checkpoint_format "gptq" (v1) stores zero points minus 1, "gptq_v2" as they are.
Sources: gptqmodel 7.7.0, nn_modules/qlinear/__init__.py, `convert_gptq_v1_to_v2_format_module` of utils/model.py;
auto-round 0.16.1, auto_round_extension/torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.checkpoints.quantised.weight import GroupedCodes, check, check_scales, unpack
from qwen3next.files.tensor_files import Files, Stored


@dataclass(frozen=True)
class GPTQWeight(GroupedCodes):
    """`first` is whether zero points are stored minus 1; `group` the inputs of a group where there is no g_idx."""

    bits: int
    first: bool
    group: int

    format = "GPTQ"
    codes = "qweight"

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, Stored], settings: Settings) -> "GPTQWeight":
        def must(found: bool, sentence: str, tag: str = "qweight") -> None:
            check(found, parts, tag, f"{tag} of {name} ({cls.format}) {sentence}")

        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        must(qweight.dtype == torch.int32 and qzeros.dtype == torch.int32, "and its qzeros must be int32 words")
        check_scales(f"scales of {name}", scales)
        groups, out = scales.shape
        bits = 32 * qzeros.shape[1] // max(out, 1) if len(qzeros.shape) == 2 else 0
        must(bits in (2, 4, 8), f"holds integers of {bits} bits; only 2, 4 and 8 are read")
        must(qzeros.shape == (groups, math.ceil(out * bits / 32)), f"has shape {list(qzeros.shape)}", "qzeros")
        inputs = qweight.shape[0] * 32 // bits
        if g_idx := parts.get("g_idx"):
            given = g_idx.shape[0] if len(g_idx.shape) == 1 else 0
            must(0 <= inputs - given < 32 // bits and not g_idx.dtype.is_floating_point, "has no entry a row", "g_idx")
            return cls(name, parts, (out, given), bits, _minus_one(settings), 0)
        ordered = settings.first("desc_act", "act_order") is True
        must(not ordered, "was quantised in order of activation (desc_act), but has no g_idx: quantise it again")
        group = _group_size(inputs, groups, settings)
        must(group > 0, f"has {groups} groups for {inputs} inputs, which no group_size of config.json gives")
        return cls(name, parts, (out, inputs), bits, _minus_one(settings), group)

    def grouped(self, files: Files, index: int | None = None) -> tuple[Tensor, Tensor | int, Tensor, Tensor | None]:
        assert index is None
        count, inputs = self.parts["scales"].shape[0], self.shape[1]
        codes = unpack(files.read(self.parts["qweight"]).T, self.bits)[:, :inputs]
        scale = files.read(self.parts["scales"]).T
        return codes, self.zero_points(files), scale, self._groups(files, count)

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def scales_part(self) -> Stored:
        return self.parts["scales"]

    @property
    def group_count(self) -> int:
        return self.parts["scales"].shape[0]

    def in_order(self, files: Files) -> bool:
        return self._groups(files, self.group_count) is None

    def zero_points(self, files: Files) -> Tensor:
        words = files.read(self.parts["qzeros"])
        if self.first:  # an addition of words, as the writers subtract words: a borrow is given back
            words += torch.tensor(sum(1 << at for at in range(0, 32, self.bits)), dtype=torch.int32)
        return unpack(words, self.bits)[:, : self.shape[0]].T.float()

    def _groups(self, files: Files, count: int) -> Tensor | None:
        """The group of each input; None if groups are equal runs, which needs no gathered copy of the scales."""
        inputs = self.shape[1]
        groups = torch.arange(inputs) // self.group if self.group else files.read(self.parts["g_idx"]).long()
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise ValueError(
                f"{self.path}: g_idx of {self.name} ({self.format}) names a group that does not exist: copy it again."
            )
        equal = inputs % count == 0 and torch.equal(groups, torch.arange(inputs) // (inputs // count))
        return None if equal else groups


def _minus_one(settings: Settings) -> bool:
    """Whether zero points are stored minus 1."""
    if settings.method.endswith("auto-round"):
        return "gptq" in str(settings.first("packing_format"))
    return settings.first("checkpoint_format", "format") != "gptq_v2"


def _group_size(inputs: int, groups: int, settings: Settings) -> int:
    """Inputs of a group; 0 if unknown, or if sizes in config.json contradict each other."""
    named = [n if n != -1 else inputs for n in settings.every("group_size") if type(n) is int and (n > 0 or n == -1)]
    fitting = {n for n in named if math.ceil(inputs / n) == groups}
    if not named and groups > 0 and inputs % groups == 0:
        return inputs // groups
    return fitting.pop() if len(fitting) == 1 else 0
