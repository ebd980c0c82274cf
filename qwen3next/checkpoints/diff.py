"""Compare two checkpoints tensor by tensor, in any layout, with one tensor of each in memory at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen3next.checkpoints.convert import Source
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.reader import CheckpointReader, open_checkpoint
from qwen3next.checkpoints.state_dict_adapter import tensor_specs

PIECE = 2**22  # elements compared at a time


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between two checkpoints.

    Attributes:
        name: its name in the layout of the first checkpoint.
        what: "only in A", "only in B", "shape", "dtype" or "values".
        detail: the shapes or dtypes as text.
        largest: largest |a − b|.
        relative: ‖a − b‖ / ‖a‖ (Frobenius); infinite if a is zero or a norm is not finite.
    """

    name: str
    what: str
    detail: str = ""
    largest: float = 0.0
    relative: float = 0.0


def diff_config(a: CheckpointReader, b: CheckpointReader) -> dict[str, tuple[object, object]]:
    """Keys of config.json that differ, with both values; None for a missing key."""
    left, right = a.config.to_dict(), b.config.to_dict()
    keys = [*left, *(key for key in right if key not in left)]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def diff(
    a: str | Path | CheckpointReader, b: str | Path | CheckpointReader, *, progress: bool = False
) -> Iterator[Difference]:
    """Yield the tensors that differ. Layout does not matter: fused or single experts, name prefixes, quantised.

    Raises: ValueError for an invalid checkpoint folder.
    """
    a = a if isinstance(a, CheckpointReader) else open_checkpoint(a)
    b = b if isinstance(b, CheckpointReader) else open_checkpoint(b)
    with a.files, b.files:
        left = {entry.name: entry for entry in tensor_specs(a.config, a.layout)}
        right = {entry.name: entry for entry in tensor_specs(b.config, a.layout)}
        here, there = Source(a), Source(b)
        for name, entry in tracked(left.items(), progress, "comparing", len(left)):
            if name not in right:
                yield Difference(name, "only in A", f"{list(entry.shape)}")
            elif entry.shape != right[name].shape:
                yield Difference(name, "shape", f"{list(entry.shape)} and {list(right[name].shape)}")
            else:
                x, y = here.tensor(entry), there.tensor(right[name])
                kinds = here.dtype(entry), there.dtype(right[name])
                detail = "" if kinds[0] == kinds[1] else " and ".join(str(k).removeprefix("torch.") for k in kinds)
                if x.dtype == y.dtype and torch.equal(x, y):
                    if detail:
                        yield Difference(name, "dtype", detail)
                    continue
                largest, size, norm = _gap(x, y)
                relative = size / norm if norm and math.isfinite(norm) and math.isfinite(size) else math.inf
                if size:  # true for NaN too
                    yield Difference(name, "values", detail, largest, relative)
                elif detail:
                    yield Difference(name, "dtype", detail)
        for name, entry in right.items():
            if name not in left:
                yield Difference(name, "only in B", f"{list(entry.shape)}")


def _gap(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Largest |x − y|, ‖x − y‖ and ‖x‖, in fp64."""
    largest = gap_squared = squared = 0.0
    for p, q in zip(x.flatten().split(PIECE), y.flatten().split(PIECE), strict=True):
        p, gap = p.double(), p.double() - q.double()
        largest = max(largest, float(gap.abs().max()))
        gap_squared, squared = gap_squared + float(gap.square().sum()), squared + float(p.square().sum())
    return largest, math.sqrt(gap_squared), math.sqrt(squared)
