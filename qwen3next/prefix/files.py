"""Files of a prefix store: one per node, written atomically, named by a hash of all tokens up to the node's end."""

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.state.kv_cache import NAMES
from qwen3next.files.atomic import usable
from qwen3next.files.checksummed import read_about, read_checksummed, write_checksummed
from qwen3next.prefix.tree import End, Node, Piece
from qwen3next.prefix.writer import Writer

FORMAT = "qwen3next prefix 1"
Tensors = Mapping[str, Tensor]


class PrefixFolder:
    """The files of one model's store. Damaged files are treated as missing and deleted when found.

    Args:
        folder: created if missing; several stores of the same model may use it at the same time.
        budget: bytes; the least recently used files are deleted first.
        writer: what writes the files, if not the caller.
    """

    def __init__(self, folder: Path, budget: int, writer: Writer | None = None):
        self.folder, self.budget, self.writer = folder, budget, writer
        self._lock = threading.Lock()
        self._pending: dict[str, int] = {}  # how often the file of a name waits to be written
        with usable(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, node: Node) -> None:
        """Write a node that is in memory and make room for it; skipped if it and its ancestors exceed the budget.

        With a writer it returns at once; the node's `file` is set when the file is there.
        """
        assert node.piece is not None
        assert node.parent is not None
        tensors = {"tokens": node.tokens}
        for i, stored in enumerate(node.piece):
            tensors |= {f"kv.{i}.{name}": x for name, x in zip(NAMES, stored, strict=False)}
        if node.finish is not None:
            for i, (conv, recurrent) in enumerate(node.finish.states):
                tensors |= {f"layers.{i}.conv": conv, f"layers.{i}.memory": recurrent}
            tensors["hidden"] = node.finish.hidden
            if node.finish.logits is not None:
                tensors["logits"] = node.finish.logits
        names = [one.name for one in node.path]
        about = {
            "format": FORMAT,
            "parent": names[-2] if len(names) > 1 else "",
            "begin": node.begin,
            "ends": node.finish is not None,
        }
        kept = {self.folder / f"{name}.safetensors" for name in names}
        path = self.folder / f"{names[-1]}.safetensors"
        if self.writer is None:
            self._write(node, path, tensors, about, kept)
            return
        self._note(path.stem, 1)
        size = sum(x.nbytes for x in tensors.values())
        if not self.writer.put(lambda: self._write_later(node, path, tensors, about, kept), size):
            self._note(path.stem, -1)

    def _write(self, node: Node, path: Path, tensors: Tensors, about: dict[str, Any], kept: set[Path]) -> None:
        write_checksummed(path, tensors, about)
        if self.make_room(kept=kept):
            node.file = path
        else:
            path.unlink(missing_ok=True)

    def _write_later(self, node: Node, path: Path, tensors: Tensors, about: dict[str, Any], kept: set[Path]) -> None:
        try:
            self._write(node, path, tensors, about, kept)
        finally:
            self._note(path.stem, -1)

    @property
    def pending(self) -> set[str]:
        """Names of files that wait to be written."""
        with self._lock:
            return set(self._pending)

    def _note(self, name: str, more: int) -> None:
        with self._lock:
            count = self._pending.pop(name, 0) + more
            if count:
                self._pending[name] = count

    def read(self, node: Node, device: torch.device) -> tuple[Piece, End | None] | None:
        """Read a node's file: keys and values, and the state if any; None if another store deleted or split it.

        Raises: ValueError for a damaged file.
        """
        assert node.file is not None
        if not node.file.exists():
            return None
        about = _about(node.file)
        if about["begin"] != node.begin or about["ends"] < node.ends:
            return None
        tensors = read_checksummed(node.file, about)
        if not torch.equal(tensors.pop("tokens"), node.tokens):
            raise ValueError(f"{node.file} holds other tokens than when it was first read.")
        tensors = {name: x.to(device) for name, x in tensors.items()}
        piece: Piece = []
        states: list[tuple[Tensor, Tensor]] = []
        while f"kv.{len(piece)}.{NAMES[0]}" in tensors:
            names = (f"kv.{len(piece)}.{name}" for name in NAMES)
            piece.append(tuple(tensors[name] for name in names if name in tensors))
        while f"layers.{len(states)}.conv" in tensors:
            states.append((tensors[f"layers.{len(states)}.conv"], tensors[f"layers.{len(states)}.memory"]))
        return piece, End(states, tensors["hidden"], tensors.get("logits")) if about["ends"] else None

    def touch(self, node: Node) -> None:
        """Update the modification times of a node's files, by which `make_room` finds the least recently used."""
        files = [one.file for one in node.path if one.file is not None]
        if self.writer is None:
            _touch(files)
        elif files:
            self.writer.put(lambda: _touch(files))

    def scan(self, *, left_out: Collection[str]) -> list[tuple[Path, dict[str, Any], Tensor]]:
        """Path, description and own tokens of every file except those named in `left_out`; parents come first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            if path.stem in left_out:
                continue
            try:
                about = _about(path)
                found.append((path, about, read_checksummed(path, about, only="tokens")["tokens"]))
            except ValueError:
                path.unlink(missing_ok=True)
        return sorted(found, key=lambda entry: entry[1]["begin"])

    def make_room(self, *, kept: set[Path]) -> bool:
        """Delete the least recently used files, leaves first, until the budget holds; False if it cannot hold.

        Args:
            kept: files that are not deleted.
        """
        sizes = {}
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                status = path.stat()
                sizes[path] = (status.st_mtime_ns, status.st_size)
        total = sum(size for _, size in sizes.values())
        if total <= self.budget:
            return True
        parents = {}
        for path in sizes:
            with suppress(ValueError):
                parents[path] = self.folder / f"{_about(path)['parent']}.safetensors"
        for path in sorted(sizes, key=lambda p: sizes[p]):
            chain = path
            while total > self.budget and chain not in kept and chain in sizes and chain not in parents.values():
                chain.unlink(missing_ok=True)
                total -= sizes.pop(chain)[1]
                chain = parents.pop(chain, chain)
        return total <= self.budget


def _touch(files: Sequence[Path]) -> None:
    for file in files:
        with suppress(OSError):
            os.utime(file)


def _about(path: Path) -> dict[str, Any]:
    return read_about(path, format=FORMAT, kind="part of a prefix store")
