"""Reading and writing of safetensors files, one tensor or part of a tensor at a time.

The safetensors library maps whole files into memory and writes from a dictionary of tensors. Here a tensor, or a part
of it, is read with pread into memory that the caller may provide. So resident memory does not exceed what was
requested, and a file that shrinks during a read raises an error instead of a signal.
Format: the header's length in 8 bytes, the header in JSON, the data.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen3next.files.json_files import parse

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 2**23
LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file, the offset of its first byte, dtype and shape."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, without their data.

    Raises: ValueError that names the file, and the tensor if any, for an invalid file: truncated or extended, with
        tensors that overlap or leave gaps, or with sizes that do not fit the shapes.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                if first[:1] == b"\x80" or first[:2] == b"PK":
                    raise ValueError("it is a pickle, which is not opened because it could run code")
                raise ValueError(f"its {size} bytes are too few for its header")
            header = parse(file.read(length))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): copy it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged or cut short (its header is no object): copy it again.")
    header.pop("__metadata__", None)
    found, ends = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _entry(entry)
        except ValueError as error:
            raise ValueError(f"{path} is damaged or cut short ({name}: {error}): copy it again.") from None
        found[name] = Stored(path, 8 + length + begin, dtype, shape)
        ends.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(ends):
        if begin != expected:
            raise ValueError(
                f"{path} is damaged or cut short ({name} begins at byte {begin} of the data, not at "
                f"{expected}): copy it again."
            )
        expected = end
    if 8 + length + expected != size:
        raise ValueError(
            f"{path} is damaged or cut short (its tensors end at byte {8 + length + expected} of {size}): "
            "copy it again."
        )
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata strings of a safetensors file. Call `read_header` first: it checks the file."""
    with path.open("rb") as file:
        header = parse(file.read(struct.unpack("<Q", file.read(8))[0]))
    found = header.get("__metadata__")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _entry(entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header entry must have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"its dtype {code} is not supported")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{numbers} are not non-negative integers")
    dtype = DTYPES[code]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"data_offsets {offsets} do not fit {code} of shape {shape}")
    return dtype, tuple(shape), offsets[0], offsets[1]


class Files:
    """Reads from several files and keeps them open, so that a file replaced meanwhile is still read as it was."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()  # experts are read by several threads

    def read(self, stored: Stored, index: int | None = None, *, into: Tensor | None = None) -> Tensor:
        """Read a stored tensor, or `[index]` of it, into CPU memory.

        Args:
            into: a contiguous tensor of that shape and dtype to fill; None allocates one.
        Raises: ValueError if the file has become shorter or unreadable.
        """
        shape, begin = stored.shape, stored.begin
        if index is not None:
            shape = shape[1:]
            begin += index * math.prod(shape) * stored.dtype.itemsize
        out = torch.empty(shape, dtype=stored.dtype) if into is None else into
        assert (out.shape, out.dtype, out.is_contiguous()) == (shape, stored.dtype, True)
        if out.numel():
            self._fill(stored.path, memory_of(out), begin)
        return out

    def equal(self, a: Stored, b: Stored) -> bool:
        """Whether two stored tensors have equal dtype, shape and bytes. Compares one piece at a time."""
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = bytearray(min(a.nbytes, PIECE)), bytearray(min(a.nbytes, PIECE))
        for begin in range(0, a.nbytes, PIECE):
            size = min(PIECE, a.nbytes - begin)
            self._fill(a.path, memoryview(left)[:size], a.begin + begin)
            self._fill(b.path, memoryview(right)[:size], b.begin + begin)
            if left[:size] != right[:size]:
                return False
        return True

    def _fill(self, path: Path, target: memoryview, begin: int) -> None:
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            done = 0
            while done < len(target):
                count = os.preadv(self._open[path], [target[done:]], begin + done)
                if not count:
                    raise ValueError(f"{path} became shorter while it was read: copy it again.")
                done += count
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.close()


def write(
    path: Path,
    plan: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Args:
        plan: name, dtype and shape of each tensor, in the order of `tensors`.
        tensors: name and tensor, in the same order.
        metadata: strings to store in the header.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in plan:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8: some readers need it
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, dtype, shape), (got, tensor) in zip(plan, tensors, strict=True):
            assert (name, dtype, tuple(shape)) == (got, tensor.dtype, tuple(tensor.shape)), name
            file.write(memory_of(tensor.cpu().contiguous()))
        file.flush()
        os.fsync(file.fileno())


def memory_of(x: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy. Viewed as uint8, because numpy has no bfloat16."""
    return memoryview(x.detach().view(-1).view(torch.uint8).numpy().data)
