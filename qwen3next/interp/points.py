"""The recorded tensors of one forward: access by short names, slice, move, save and load.

Shapes: b batch, t tokens, s keys. Batch is the first axis; tokens are the second, but the third in scores and patterns
(b h t s).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from layers.segments import Segments
from qwen3next.files.atomic import fresh_file
from qwen3next.files.fingerprint import fingerprint
from qwen3next.files.tensor_files import Files, read_header, read_metadata, write

Index = int | slice | Sequence[int]
DOCUMENT_IDS = "segments.document_ids"  # name in a file, besides the points


class NotCachedError(KeyError):
    """A point was not recorded; the message gives the names_filter that records it."""

    def __str__(self) -> str:  # KeyError would put the message in quotation marks
        return str(self.args[0])


Kind = TypeVar("Kind", bound="CachedPoints")


class CachedPoints(Mapping[str, Tensor]):
    """Tensors by point name, with the model they came from.

    `cache["blocks.3.hook_resid_post"]`, or short `cache["resid_post", 3]`. `cache["beta", 0]` finds
    blocks.0.linear_attn.hook_beta; `cache["linear_attn.q", 0]` selects one of several points of that name.

    Args:
        acts: the tensors from `model.run_with_cache`. Not copied.
        model: the model that made them.
        segments: the segments given to that forward, if rows are packed or padded.
    Raises: ValueError for a name that the model does not have.
    """

    def __init__(self, acts: Mapping[str, Tensor], model: Any, *, segments: Segments | None = None):
        unknown = sorted({name.removesuffix("_grad") for name in acts} - model.hook_dict.keys())
        if unknown:
            raise ValueError(f"This model has no hook point {unknown[0]}: give the model that the tensors came from.")
        self.acts, self.model = dict(acts), model
        self.segments: Segments | None = getattr(acts, "segments", None) if segments is None else segments
        self.alias: Mapping[str, str] = getattr(acts, "alias", {})  # TransformerLens' names
        # Whether recurrent states were zero before the first token here, and whether the tokens are consecutive.
        self.from_start: bool = getattr(acts, "from_start", True)
        self.gapless: bool = getattr(acts, "gapless", True)

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        name = self.alias.get(name, name) if isinstance(name, str) else name
        full = name if isinstance(name, str) and name in self.acts else self.full_name(name)
        if full not in self.acts:
            raise NotCachedError(f"{full} was not recorded: call run_with_cache(…, names_filter={full!r}).")
        return self.acts[full]

    def __iter__(self) -> Iterator[str]:
        return iter(self.acts)

    def __len__(self) -> int:
        return len(self.acts)

    def __repr__(self) -> str:
        size = sum(x.nbytes for x in self.acts.values())
        return f"{type(self).__name__}({len(self)} points, {size / 2**20:.1f} MiB)"

    def full_name(self, name: str | tuple[str, int]) -> str:
        """The full name of a point given by its full or short name. Raises: NotCachedError (a KeyError) if unknown."""
        short, layer = (name, None) if isinstance(name, str) else name
        if short.endswith("_grad"):
            short = short.removesuffix("_grad")
            return self.full_name(short if layer is None else (short, layer)) + "_grad"
        module, _, point = short.rpartition(".")
        point = point if point.startswith("hook_") else f"hook_{point}"
        wanted = f"{module}.{point}" if module else point
        where = "" if layer is None else f"blocks.{layer % self.layers}."
        for full in self.model.hook_dict:
            if full == where + wanted or (where and full.startswith(where) and full.endswith(f".{wanted}")):
                return full
        place = "outside the blocks" if layer is None else f"in block {layer}"
        raise NotCachedError(f"There is no hook point {short} {place}: choose one from model.hook_dict.")

    def need(self, names: Sequence[str], names_filter: Sequence[str]) -> list[Tensor]:
        """Several points by full name. Raises: NotCachedError that gives the filter which records them all."""
        if any(name not in self.acts for name in names):
            raise NotCachedError(f"Points that this needs were not recorded: call run_with_cache(…, {names_filter=}).")
        return [self.acts[name] for name in names]

    @property
    def layers(self) -> int:
        """Number of blocks of the model."""
        return self.model.config.num_hidden_layers

    def _like(self: Kind, acts: Mapping[str, Tensor], segments: Segments | None) -> Kind:
        other = type(self)(acts, self.model, segments=segments)
        other.from_start, other.gapless, other.alias = self.from_start, self.gapless, self.alias
        return other

    def to(self: Kind, target: torch.device | torch.dtype | str) -> Kind:
        """A copy on another device or in another floating-point dtype; indices stay integers."""
        if isinstance(target, torch.dtype):
            moved = {n: x.to(target) if x.is_floating_point() else x for n, x in self.acts.items()}
            return self._like(moved, self.segments)
        segments = self.segments
        if segments is not None and segments.document_ids is not None:
            segments = Segments.from_document_ids(segments.document_ids.to(target))
        return self._like({n: x.to(target) for n, x in self.acts.items()}, segments)

    def slice(self: Kind, batch: Index | None = None, pos: Index | None = None) -> Kind:
        """Select rows and tokens. An integer keeps its axis, with length 1.

        Key axes of patterns, and states, are not sliced. hook_logits is dropped if `logits_to_keep` made it shorter
        than the other tensors.
        """
        rows, places = as_index(batch), as_index(pos)
        axes = {name: self._time_axis(name) for name in self.acts}
        times = [x.shape[axes[n]] for n, x in self.acts.items() if axes[n] and n != "hook_logits"]
        acts = {}
        for name, x in self.acts.items():
            if name == "hook_logits" and times and x.shape[1] != times[0]:
                continue
            acts[name] = x[rows] if not axes[name] else x[rows][(slice(None),) * axes[name] + (places,)]
        segments = self.segments
        if segments is not None and segments.document_ids is not None:
            segments = Segments.from_document_ids(segments.document_ids[rows][:, places])
        other = self._like(acts, segments)
        kept = torch.arange(max(times, default=0))[places].tolist()
        other.from_start = self.from_start and kept[:1] == [0]
        other.gapless = self.gapless and all(b == a + 1 for a, b in pairwise(kept))
        return other

    def _time_axis(self, name: str) -> int:
        """The token axis of a point; 0 if it has none, such as states at chosen positions."""
        dims = self.model.hook_dict[name.removesuffix("_grad")].shape.split()
        return dims.index("t") if "t" in dims else int(dims[1] == "1")  # fires once per token, and is concatenated

    def save(self, path: str | Path) -> None:
        """Write all points into one safetensors file, atomically."""
        path, tensors = Path(path), dict(self.acts)
        if self.segments is not None and self.segments.document_ids is not None:
            tensors[DOCUMENT_IDS] = self.segments.document_ids
        metadata = {"model": identity(self.model), "from_start": str(self.from_start), "gapless": str(self.gapless)}
        plan = [(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
        with fresh_file(path) as fresh:
            write(fresh, plan, tensors.items(), metadata=metadata)

    @classmethod
    def load(cls: type[Kind], path: str | Path, model: Any) -> Kind:
        """Read a file that `save` wrote, into CPU memory.

        Raises: ValueError for a damaged file, or one of another model.
        """
        path = Path(path)
        header = read_header(path)
        metadata = read_metadata(path)
        if metadata.get("model") != identity(model):
            raise ValueError(f"{path} was saved with another model: load the checkpoint that it was saved with.")
        with Files() as files:
            acts = {name: files.read(stored) for name, stored in header.items()}
        ids = acts.pop(DOCUMENT_IDS, None)
        loaded = cls(acts, model, segments=None if ids is None else Segments.from_document_ids(ids))
        loaded.from_start, loaded.gapless = (metadata.get(flag) == "True" for flag in ("from_start", "gapless"))
        return loaded


def identity(model: Any) -> str:
    """A model's fingerprint for files of activations: equal in fp32 and bf16, and independent of routed experts."""
    return fingerprint(model, left_out=lambda name: ".experts." in name, any_dtype=True)


def as_index(index: Index | None) -> slice | list[int]:
    """An index for one axis that keeps the axis."""
    if isinstance(index, int):
        return [index]
    return slice(None) if index is None else index if isinstance(index, slice) else list(index)
