"""Which stored tensors make one weight: by their names, dtypes and shapes."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch

from qwen3next.checkpoints.quantised.awq import AWQWeight
from qwen3next.checkpoints.quantised.fp4 import MXFP4, NVFP4, ModeloptNVFP4
from qwen3next.checkpoints.quantised.gptq import GPTQWeight
from qwen3next.checkpoints.quantised.packed_ints import PackedInts
from qwen3next.checkpoints.quantised.scaled import ScaledWeight, lacks_scales
from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.checkpoints.quantised.weight import QuantisedWeight
from qwen3next.files.tensor_files import Files, Stored

Weight: TypeAlias = Stored | QuantisedWeight

# What formats append to a weight's name. The longest come first: "_scale" ends no "_global_scale".
TAGS = ("_global_scale", "_zero_point", "_scale_inv", "_scale_2", "_packed", "_scale", "_shape", "_g_idx")
MODULE_TAGS = ("qweight", "qzeros", "scales", "g_idx")  # GPTQ and AWQ name a module's tensors, not the weight's
# Scales of activations and of keys and values. Activations are not quantised here.
ACTIVATIONS = tuple(f".{x}_{y}" for x in ("input", "output") for y in ("scale", "global_scale", "zero_point")) + tuple(
    f".{x}_{y}" for x in "qkv" for y in ("scale", "zero_point", "global_scale")
)
# Ends of names that only formats have which are not read.
FOREIGN = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".codebooks": "AQLM",
    ".W_q": "HQQ",
    "._data": "quanto",
    ".B": "Marlin",
    ".meta": "Marlin 2:4",
    ".bitmask": "compressed-tensors sparse",
    "_blocks": "MXFP4 of gpt-oss",
}


class Found:
    """Attributes:
    weights: every weight by name, quantised or not.
    activations: names of tensors that concern activations and are not read.
    problems: error messages.
    """

    def __init__(self, every: Mapping[str, Stored], settings: Settings, files: Files):
        self.activations = sorted(name for name in every if name.endswith(ACTIVATIONS))
        grouped: dict[str, dict[str, Stored]] = {}
        for name in every.keys() - set(self.activations):
            weight, tag = split(name)
            grouped.setdefault(weight, {})[tag] = every[name]
        self.weights: dict[str, Weight] = {}
        self.problems: list[str] = list(_foreign(every))
        for name in sorted(grouped):
            try:
                self.weights[name] = _weight(name, grouped[name], settings, files)
            except ValueError as error:
                self.problems.append(str(error))


def formats(weights: Mapping[str, Weight]) -> dict[str, int]:
    """Number of weights of each format, plain ones not counted."""
    return dict(sorted(Counter(w.format for w in weights.values() if isinstance(w, QuantisedWeight)).items()))


def split(name: str) -> tuple[str, str]:
    """The weight that a stored tensor belongs to, and what its format appends."""
    module, _, leaf = name.rpartition(".")
    if leaf in MODULE_TAGS and module:
        return f"{module}.weight", leaf
    for tag in TAGS:
        if name.endswith(tag) and len(name) > len(tag):
            return name.removesuffix(tag), tag
    return name, ""


def _foreign(every: Mapping[str, Stored]) -> Iterator[str]:
    for name in sorted(every):
        for end, what in FOREIGN.items():
            if name.endswith(end):
                yield f"{every[name].path}: {name} is quantised as {what}, which is not read: convert it first."
                return


def _weight(name: str, parts: Mapping[str, Stored], settings: Settings, files: Files) -> Weight:
    """Raises: ValueError for parts that make no weight of a known format."""
    if "qweight" in parts:
        return _of_words(name, parts, settings)
    if "_packed" in parts:
        if parts["_packed"].dtype == torch.int32:
            return PackedInts.made_of(name, parts, settings, files)
        return (NVFP4 if "_global_scale" in parts else MXFP4).made_of(name, parts)
    if "" in parts and len(parts) == 1:
        if sentence := lacks_scales(name, parts[""]):
            raise ValueError(sentence)
        return parts[""]
    if "" in parts and "_scale_2" in parts:
        return ModeloptNVFP4.made_of(name, parts)
    if "" in parts and ("_scale" in parts or "_scale_inv" in parts):
        return ScaledWeight.made_of(name, parts, settings)
    tag = max(parts)
    stored = f"{name.removesuffix('.weight')}.{tag}" if tag in MODULE_TAGS else f"{name}{tag}"
    raise ValueError(f"{parts[tag].path} holds {stored}, but not {name} in a known quantised format.")


def _of_words(name: str, parts: Mapping[str, Stored], settings: Settings) -> QuantisedWeight:
    """GPTQ or AWQ: they pack along different axes."""
    path = parts["qweight"].path
    if missing := [tag for tag in ("qzeros", "scales") if tag not in parts]:
        raise ValueError(f"{path}: qweight of {name} (GPTQ or AWQ) needs {missing[0]}, which is missing.")
    qweight, scales = parts["qweight"].shape, parts["scales"].shape
    if len(qweight) == 2 and len(scales) == 2:
        if qweight[1] == scales[1] and settings.method != "awq":
            return GPTQWeight.made_of(name, parts, settings)
        if 8 * qweight[1] == scales[1]:
            return AWQWeight.made_of(name, parts, settings)
    kind = f"AWQ {str(settings.first('version') or '').lower()}".strip() if settings.method == "awq" else "unknown"
    raise ValueError(
        f"{path}: qweight of {name} has the packing {kind!r} (shape {list(qweight)}, scales {list(scales)}), which is "
        "not read: GPTQ and AWQ gemm are."
    )
