"""safetensors files that describe themselves and notice it where they were cut short or changed."""

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


def write_sealed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and their description, under a temporary name that is then renamed.

    Args:
        about: whatever JSON holds, with a "format" for `read_about` to know it by.
    """
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    text = json.dumps({**about, "sums": {name: sum_of(x) for name, x in tensors.items()}})
    seal = hashlib.sha256(text.encode()).hexdigest()
    with fresh_file(path) as fresh:
        plan = [(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
        write(fresh, plan, tensors.items(), metadata={"about": text, "seal": seal})


def read_about(path: Path, *, format: str, kind: str) -> dict[str, Any]:
    """The description of a file; its tensors are not read.

    Raises: ValueError for a file that is damaged, changed, or no `kind` ("a cache") of this format.
    """
    read_header(path)
    text = read_metadata(path).get("about", "null")
    try:
        about = parse(text)
        known = isinstance(about, dict) and about.get("format") == format
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{path} is not {kind} of this version: fill it anew.")
    if read_metadata(path).get("seal") != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"{path} has been changed since it was written (its description): fill it anew.")
    return about


def read_sealed(path: Path, about: Mapping[str, Any], *, only: str | None = None) -> dict[str, Tensor]:
    """Its tensors, or the one of that name, on the CPU. Raises: ValueError for any that is not what was written."""
    stored, found = read_header(path), {}
    if stored.keys() != about["sums"].keys():
        raise ValueError(f"{path} has been changed since it was written (its tensors): fill it anew.")
    with Files() as files:
        for name in stored if only is None else (only,):
            found[name] = files.read(stored[name])
            if about["sums"][name] != sum_of(found[name]):
                raise ValueError(f"{path} has been changed since it was written ({name}): fill it anew.")
    return found
