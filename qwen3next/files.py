"""Small JSON files of a checkpoint's folder, or the user's: read with errors that name them, written whole or not."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises: ValueError that names it, also where it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or not UTF-8
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error


def read_object(path: Path) -> dict[str, Any]:
    """The contents of a file that holds a JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}.")
    return values


def write_json(path: Path, values: object) -> None:
    """Write under a temporary name and rename, so that the file is never seen half-written."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
