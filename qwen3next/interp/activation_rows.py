"""Read ranges of rows that `stream_activations` wrote, from the shards that hold them only."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from qwen3next.files import json_files
from qwen3next.files.tensor_files import Files, Stored, read_header
from qwen3next.interp.stream import INDEX


class ActivationRows:
    """The rows of a folder, numbered in their order on disk.

    `len(rows)` is their number. `rows.columns` maps the points, and token, position and row, to shape and dtype. A
    folder that is still being written gives the rows written so far.

    Raises: ValueError if there is no index, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = json_files.read_object(self.folder / INDEX, "an index of activations")
        self.columns: dict[str, dict] = index["points"]
        self.complete: bool = index["complete"]
        self.ends = list(accumulate(shard["rows"] for shard in index["shards"]))
        self._headers = [read_header(self.folder / shard["file"]) for shard in index["shards"]]
        self._files = Files()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` − 1 of one column. Raises: ValueError for an unknown column or missing rows."""
        if name not in self.columns:
            raise ValueError(f"{self.folder} has no column {name}: choose one of {', '.join(self.columns)}.")
        if not 0 <= begin < end <= len(self):
            raise ValueError(f"{self.folder} has rows 0 to {len(self) - 1}, not {begin} to {end - 1}: choose fewer.")
        parts = []
        for header, last in zip(self._headers, self.ends, strict=True):
            stored = header[name]
            first = last - stored.shape[0]
            low, high = max(begin, first) - first, min(end, last) - first
            if low < high:
                parts.append(self._files.read(_rows(stored, low, high)))
        return torch.cat(parts)

    def batches(
        self,
        size: int,
        names: Sequence[str] | None = None,
        *,
        begin: int = 0,
        end: int | None = None,
        seed: int | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the columns in batches of `size` rows from `begin` up to `end`; the last batch may be smaller.

        Args:
            names: columns to read; None means all.
            seed: shuffles the order of the batches, not the rows inside one: shuffle those when writing.
        """
        end = len(self) if end is None else end
        starts = torch.arange(begin, end, size)
        if seed is not None:
            starts = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))]
        for start in starts.tolist():
            yield {name: self.read(name, start, min(start + size, end)) for name in names or self.columns}


def _rows(stored: Stored, begin: int, end: int) -> Stored:
    """A slice of a stored tensor along its first axis."""
    row = stored.nbytes // stored.shape[0]
    return replace(stored, begin=stored.begin + begin * row, shape=(end - begin, *stored.shape[1:]))
