"""Fingerprints of models, by which a file that belongs to a model identifies it."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen3next.files.atomic import fresh_file
from qwen3next.files.tensor_files import memory_of

PIECE = 2**26  # bytes hashed at a time, each piece in a thread
NUMBERS = 64  # elements compared per tensor, to detect changes that torch's version counter misses
KEPT_FROM = 2**31  # smallest model, in bytes, whose sums are stored in a file
SUMS = ".qwen3next-sums"


@dataclass
class Seen:
    """A tensor's sums, and its state when they were computed: address, version, layout and some of its elements."""

    mark: tuple[object, ...]
    some: bytes
    sums: dict[bool, str] = field(default_factory=dict)  # by `rounded`: of the bytes as they are, or rounded to bf16


class WeightSums:
    """sha256 of all bytes of each of a model's tensors, computed again when the tensor has changed.

    Changes are detected by torch's version counter, by the address, and by 64 elements of the tensor. A write of single
    elements that bypasses the version counter (`p.data[3] = 1`) is not detected.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._folder: Path | None = None
        self._loaded: dict[str, tuple[object, ...]] = {}
        self._files = self._key = ""
        self._lock = threading.Lock()

    def __deepcopy__(self, _memo: dict) -> "WeightSums":
        return WeightSums()

    def __reduce__(self) -> tuple:
        return WeightSums, ()

    def loaded(self, folder: Path, tensors: dict[str, Tensor], cast: str) -> None:
        """Record that these tensors equal the folder's files, so that their sums can be stored there and reused.

        Args:
            cast: how the tensors were cast when loaded; stored sums are valid for the same value only.
        """
        self._folder, self._files = folder, files_as_they_are(folder)
        self._key = f"{self._files} {cast}"
        self._loaded = {name: _mark(x) for name, x in tensors.items()}

    def of(self, tensors: dict[str, Tensor], *, rounded: bool) -> dict[str, str]:
        """The sum of each tensor. With `rounded`, values are rounded to bf16, so fp32 and bf16 give equal sums."""
        with self._lock:
            return self._of(tensors, rounded=rounded)

    def _of(self, tensors: dict[str, Tensor], *, rounded: bool) -> dict[str, str]:
        kept = self._read()
        wanted: dict[str, Tensor] = {}
        for name, x in tensors.items():
            mark, some, seen = _mark(x), _some(x), self._seen.get(name)
            if seen is None or mark is _UNKNOWN or (seen.mark, seen.some) != (mark, some):
                self._seen[name] = seen = Seen(mark, some)
                if mark == self._loaded.get(name, _UNKNOWN) and (told := kept.get(f"{name} {rounded}")):
                    seen.sums[rounded] = told
            if rounded not in seen.sums:
                wanted[name] = x
        for name, total in _sums(wanted, rounded=rounded):
            self._seen[name].sums[rounded] = total
        found = {name: self._seen[name].sums[rounded] for name in tensors}
        if wanted:
            self._write(kept, found, tensors, rounded=rounded)
        return found

    def _read(self) -> dict[str, str]:
        if self._folder is None:
            return {}
        with suppress(OSError, ValueError):
            kept = json.loads((self._folder / SUMS).read_text(encoding="utf-8"))
            if isinstance(kept, dict) and kept.pop("files", None) == self._key:
                return kept
        return {}

    def _write(self, kept: dict[str, str], found: dict[str, str], tensors: dict[str, Tensor], *, rounded: bool) -> None:
        """Store the sums of unchanged tensors, if the model is large enough and the folder is writable."""
        untouched = {name: x for name, x in tensors.items() if self._loaded.get(name, _UNKNOWN) == _mark(x)}
        if self._folder is None or not self._folder.is_dir() or sum(x.nbytes for x in untouched.values()) < KEPT_FROM:
            return
        told = kept | {f"{name} {rounded}": found[name] for name in untouched} | {"files": self._key}
        if files_as_they_are(self._folder) == self._files:
            with suppress(OSError), fresh_file(self._folder / SUMS) as fresh:
                fresh.write_text(json.dumps(told), encoding="utf-8")


_UNKNOWN = (object(),)


def _mark(x: Tensor) -> tuple[object, ...]:
    try:
        return (x.data_ptr(), x._version, x.dtype, tuple(x.shape), x.stride())
    except RuntimeError:  # made in inference mode: torch has no version counter for it
        return _UNKNOWN


def _some(x: Tensor) -> bytes:
    flat = x.detach().reshape(-1) if x.is_contiguous() else x.detach()[..., :1].reshape(-1)
    return bytes(memory_of(flat[:: max(1, flat.numel() // NUMBERS)][:NUMBERS].cpu().contiguous()))


def _sums(tensors: dict[str, Tensor], *, rounded: bool) -> Iterator[tuple[str, str]]:
    """Each tensor's sum: the hash of the hashes of its pieces, computed in parallel."""

    def pieces(x: Tensor) -> list[Tensor]:
        flat = x.detach().reshape(-1)
        return list(flat.split(max(1, PIECE // flat.element_size()))) if flat.numel() else []

    def digest(piece: Tensor) -> bytes:
        some = piece.bfloat16() if rounded and piece.is_floating_point() else piece
        return hashlib.sha256(memory_of(some.cpu().contiguous())).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        sums = {name: threads.map(digest, pieces(x)) for name, x in tensors.items()}  # submits all pieces
        for name, parts in sums.items():
            yield name, hashlib.sha256(b"".join(parts)).hexdigest()


def files_as_they_are(folder: Path) -> str:
    """One hash of the name, size and modification time of a folder's weights and JSON files, or of a file."""
    found = []
    paths = [*folder.glob("*.safetensors"), *folder.glob("*.json")] if folder.is_dir() else [folder]
    for path in sorted(paths):
        with suppress(OSError):
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def fingerprint(
    model: Any,
    *,
    left_out: Callable[[str], bool],
    beside: Collection[str] = ("extra", "wrapper_config"),
    any_dtype: bool = False,
) -> str:
    """sha256 of the configuration and of the name, dtype, shape and all bytes of every tensor.

    Args:
        left_out: whether to ignore a tensor, by name.
        beside: fields of the configuration to ignore.
        any_dtype: ignore dtypes and round values to bf16, so that a model is the same in fp32 and in bf16.
    """
    config = {f.name: getattr(model.config, f.name) for f in fields(model.config) if f.name not in beside}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=_plain).encode())
    tensors = {name: x for name, x in model.state_dict(keep_vars=True).items() if not left_out(name)}
    for name, total in model.weight_sums.of(tensors, rounded=any_dtype).items():
        dtype = "any" if any_dtype else tensors[name].dtype
        digest.update(f"{name} {dtype} {tuple(tensors[name].shape)} {total}".encode())
    if not left_out(OFFLOADED):
        digest.update(model.experts_in.encode())
    digest.update(getattr(model, "live_adapters", "").encode())
    return digest.hexdigest()


OFFLOADED = "blocks.0.mlp.experts.down_proj"


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else list(value)
