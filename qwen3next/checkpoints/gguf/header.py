"""The header of a GGUF file: metadata and the places of tensors. Every length is checked against the file's size.

Format: "GGUF", version (2 or 3), number of tensors and of metadata entries; entries (key, type, value); tensors (name,
dimensions, type, offset); padding; data. Integers are little-endian. Dimensions begin with the innermost one.
Source: ggml, docs/gguf.md.
"""

import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwen3next.checkpoints.gguf.blocks import KINDS, Kind
from qwen3next.files.tensor_files import Stored

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
MOST_PARTS = 1000


@dataclass(frozen=True)
class Packed:
    """A tensor of a GGUF file: `shape` of its numbers, and where it is `stored`; blocks as (…, bytes of a row)."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    stored: Stored


@dataclass
class Header:
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Packed] = field(default_factory=dict)


class UnsupportedError(ValueError):
    """A valid file that is not read."""


class _Reader:
    """Reads values of a file of known size; a length beyond its end is an error before anything is allocated."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, os.fstat(file.fileno()).st_size

    def bytes(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"it ends {size - self.left} bytes early")
        self.left -= size
        found = self.file.read(size)
        if len(found) != size:
            raise ValueError("it became shorter")
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"metadata of type {kind} is unknown")
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            if 8 * count > self.left:
                raise ValueError(f"it claims {count} strings")
            return [self.string() for _ in range(count)]
        if inner not in SCALARS:
            raise ValueError(f"arrays of type {inner} are not read")
        code = SCALARS[inner]
        size = struct.calcsize(f"<{code}")  # `bytes` checks the length before it reads
        return list(struct.unpack(f"<{count}{code}", self.bytes(count * size)))


def read_file(path: Path) -> Header:
    """Read one file. Raises: ValueError that names the file, and the tensor if any, for an invalid or unknown one."""
    try:
        with path.open("rb") as file:
            return _parse(path, _Reader(file))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnsupportedError as error:
        raise ValueError(f"{path}: {error}.") from error
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged or cut short (a name is not UTF-8): copy it again.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): copy it again.") from error


def _parse(path: Path, read: _Reader) -> Header:
    size = read.left
    if size < 24 or read.bytes(4) != MAGIC:
        raise ValueError("it does not begin as a GGUF file")
    version = read.number("I")
    if version not in (2, 3):
        raise UnsupportedError(f"it has version {version}; 2 and 3 are read, little-endian")
    count, entries = read.number("Q"), read.number("Q")
    header = Header()
    for _ in range(entries):
        key = read.string()
        if key in header.metadata:
            raise ValueError(f"{key} is given twice")
        header.metadata[key] = read.value(read.number("I"))
    found = [_entry(read) for _ in range(count)]
    align = header.metadata.get("general.alignment", 32)
    if type(align) is not int or align < 8 or align > 2**20 or align & (align - 1):
        raise ValueError(f"its alignment is {align!r}")
    begin = -(-(size - read.left) // align) * align
    for name, kind, shape, offset in found:
        if name in header.tensors:
            raise ValueError(f"{name} is given twice")
        if offset % align:
            raise ValueError(f"{name} begins at byte {offset}, which is not aligned to {align}")
        header.tensors[name] = Packed(name, kind, shape, _stored(path, begin + offset, kind, shape))
    _check_places(header, begin, size)
    return header


def _entry(read: _Reader) -> tuple[str, Kind, tuple[int, ...], int]:
    name, dimensions = read.string(), read.number("I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(read.number("Q") for _ in range(dimensions))[::-1]
    number, offset = read.number("I"), read.number("Q")
    if number not in KINDS:
        known = ", ".join(kind.name for kind in KINDS.values())
        raise UnsupportedError(f"{name} is stored in GGUF type {number}, which is not read: {known} are")
    kind = KINDS[number]
    if not all(0 < n <= 2**40 for n in shape) or math.prod(shape) > 2**50 or shape[-1] % kind.numbers:
        raise ValueError(f"{name} of type {kind.name} has shape {list(shape)}")
    return name, kind, shape, offset


def _stored(path: Path, begin: int, kind: Kind, shape: tuple[int, ...]) -> Stored:
    if kind.dtype != torch.uint8:
        return Stored(path, begin, kind.dtype, shape)
    return Stored(path, begin, torch.uint8, (*shape[:-1], shape[-1] // kind.numbers * kind.nbytes))


def _check_places(header: Header, begin: int, size: int) -> None:
    """Raises: ValueError if tensors overlap or lie outside the data."""
    last, before = begin, "the header"
    for packed in sorted(header.tensors.values(), key=lambda packed: packed.stored.begin):
        if packed.stored.begin < last:
            raise ValueError(f"{packed.name} overlaps {before}")
        last, before = packed.stored.begin + packed.stored.nbytes, packed.name
    if last > size:
        raise ValueError(f"{before} ends at byte {last} of {size}")


def read_files(path: Path) -> Header:
    """Read a file, and the other parts of a model that was split into several (NAME-00001-of-00003.gguf).

    Raises: ValueError, also for a missing part or a tensor that two parts hold.
    """
    header = read_file(path)
    parts = header.metadata.get("split.count", 1)
    if type(parts) is not int or not 0 <= parts <= MOST_PARTS:
        raise ValueError(f"{path} says that it has {parts!r} parts: copy it again.")
    if parts <= 1:
        return header
    match = PART.search(path.name)
    if match is None or int(match[2]) != parts:
        raise ValueError(f"{path} is one of {parts} parts: give it the name NAME-00001-of-{parts:05d}.gguf again.")
    whole = Header()
    for i in range(parts):
        part = path.with_name(f"{path.name[: match.start()]}-{i + 1:05d}-of-{parts:05d}.gguf")
        if not part.is_file():
            raise ValueError(f"{part} is missing, one of {parts} parts of the model: copy it here.")
        header = read_file(part)
        if (header.metadata.get("split.no"), header.metadata.get("split.count")) != (i, parts):
            raise ValueError(f"{part} is not part {i + 1} of {parts} of the model: copy it again.")
        if twice := sorted(header.tensors.keys() & whole.tensors.keys()):
            raise ValueError(f"{part} and {whole.tensors[twice[0]].stored.path} both hold {twice[0]}: remove one.")
        whole.metadata = whole.metadata or header.metadata
        whole.tensors |= header.tensors
    return whole
