"""safetensors files with a description and checksums, which detect truncated or changed files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen3next.files.atomic import fresh_file
from qwen3next.files.json_files import parse
from qwen3next.files.tensor_files import Files, memory_of, read_header, read_metadata, write


def sum_of(x: Tensor) -> str:
    """sha256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(memory_of(x.cpu().contiguous())).hexdigest()


def write_checksummed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and their description atomically.

    Args:
        about: the description, as JSON values, with the key "format" that `read_about` checks.
    """
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    text = json.dumps({**about, "sums": {name: sum_of(x) for name, x in tensors.items()}})
    seal = hashlib.sha256(text.encode()).hexdigest()
    with fresh_file(path) as fresh:
        plan = [(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
        write(fresh, plan, tensors.items(), metadata={"about": text, "seal": seal})


def read_about(path: Path, *, format: str, kind: str) -> dict[str, Any]:
    """Read the description of a file, without its tensors.

    Args:
        format: the expected value of "format".
        kind: what the file should be, for the message, such as "a cache".
    Raises: ValueError for a file that is damaged, changed, or of another format.
    """
    read_header(path)
    text = read_metadata(path).get("about", "null")
    try:
        about = parse(text)
        known = isinstance(about, dict) and about.get("format") == format
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{path} is not {kind} of this version: create it again.")
    if read_metadata(path).get("seal") != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"{path} was changed after it was written (its description): create it again.")
    return about


def read_checksummed(path: Path, about: Mapping[str, Any], *, only: str | None = None) -> dict[str, Tensor]:
    """The file's tensors, or the one named `only`, on the CPU. Raises: ValueError if a checksum does not match."""
    stored, found = read_header(path), {}
    if stored.keys() != about["sums"].keys():
        raise ValueError(f"{path} was changed after it was written (its tensors): create it again.")
    with Files() as files:
        for name in stored if only is None else (only,):
            found[name] = files.read(stored[name])
            if about["sums"][name] != sum_of(found[name]):
                raise ValueError(f"{path} was changed after it was written ({name}): create it again.")
    return found
