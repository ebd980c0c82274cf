"""Strict reading of JSON files, and checks of values against the types of dataclass fields."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3next.files.atomic import fresh_file

LISTS: dict[Any, type] = {Sequence[str]: str, Sequence[int]: int, int | Sequence[int] | None: int}
LARGEST = 2**40  # no size of a model is larger; larger numbers would overflow later with an unclear error


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises: ValueError for invalid JSON, or for a repeated key, which readers differ on."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in found if keys.count(key) > 1)!r} is given twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path: Path, what: str) -> Any:
    """The value in a JSON file. Raises: ValueError that names the file and `what` it should be."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: it should be {what}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): it should be {what}.") from error
    except ValueError as error:  # includes invalid JSON and invalid UTF-8
        raise ValueError(f"{path} is not {what}: {error}.") from error


def read_object(path: Path, what: str, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is `optional` and missing. Raises: as `read`."""
    if optional and not path.is_file():
        return {}
    value = read(path, what)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what}: it must hold a JSON object, not {type(value).__name__}.")
    return value


def typed(name: str, kind: Any, value: Any) -> Any:
    """Convert a JSON value to its field's type: an integer to float, a list to a tuple.

    Raises: ValueError for a value of another type, or a number that is not finite or larger than `LARGEST`.
    """
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is float and (whole or (isinstance(value, float) and math.isfinite(value))):
        return float(value)
    if whole and kind in (int, int | None, int | Sequence[int] | None):
        return value
    item = LISTS.get(kind)
    listed = item and isinstance(value, (list, tuple))
    if item and listed and all(isinstance(x, item) and not isinstance(x, bool) for x in value):
        return tuple(value)
    shown = repr(value)
    raise ValueError(f"{name} cannot be {shown if len(shown) < 80 else shown[:77] + '...'}.")


def write(path: Path, values: object) -> None:
    """Write values as JSON, atomically."""
    with fresh_file(path) as fresh:
        fresh.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
