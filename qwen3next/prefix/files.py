"""Files of a prefix store: one per node, written atomically, named by a hash of all tokens up to the node's end."""

import hashlib
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.state.kv_cache import NAMES
from qwen3next.files.atomic import usable
from qwen3next.files.checksummed import read_about, read_checksummed, write_checksummed
from qwen3next.files.tensor_files import memory_of
from qwen3next.prefix.tree import End, Node, Piece

FORMAT = "qwen3next prefix 1"


class PrefixFolder:
    """The files of one model's store. Damaged files are treated as missing and deleted when found.

    Args:
        folder: created if missing; several stores of the same model may use it at the same time.
        budget: bytes; the least recently used files are deleted first.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        with usable(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, node: Node) -> None:
        """Write a node that is in memory and make room for it; skipped if it and its ancestors exceed the budget."""
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
        parent = node.parent.text
        about = {
            "format": FORMAT,
            "parent": _name(parent) if len(parent) else "",
            "begin": node.begin,
            "ends": node.finish is not None,
        }
        path = self.folder / f"{_name(node.text)}.safetensors"
        write_checksummed(path, tensors, about)
        if self.make_room(kept={path, *(one.file for one in node.path if one.file is not None)}):
            node.file = path
        else:
            path.unlink(missing_ok=True)

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
        for one in node.path:
            if one.file is not None:
                with suppress(OSError):
                    os.utime(one.file)

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


def _name(text: Tensor) -> str:
    return hashlib.sha256(memory_of(text.contiguous())).hexdigest()[:32]


def _about(path: Path) -> dict[str, Any]:
    return read_about(path, format=FORMAT, kind="part of a prefix store")
