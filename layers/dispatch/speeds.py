"""Measured speeds of the implementations of an operation on the CPU: what "auto" ranks them by.

A figure is a ratio: so many times as fast as the implementation in plain torch that the fast ones replace, measured
side by side. Figures come from two tables, and the first that has any for an operation decides:

- what `qwen3next tune` measured on this machine, a file in the user's cache folder. QWEN3NEXT_TUNED=0 leaves it out.
- speeds.json beside this file, shipped figures by kind of processor: its vector instructions, not its maker.

An operation without figures keeps the order of layers/dispatch/backends.py. Files are read once in a process.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from layers.cpp import cpu
from layers.cpp.build import digest_of_sources

SHIPPED = Path(__file__).with_name("speeds.json")
# The earlier in the fixed order stays first unless another is faster by more than this: less may be noise.
CLOSE = 1.05

Ratios = Mapping[str, Mapping[int, float]]  # by implementation, then by size (tokens)


@dataclass(frozen=True)
class Figures:
    """The figures of one table.

    Attributes:
        source: where they are from, in a few words, for `explain`.
        ratios: by operation, dtype ("float32") and whether gradients are taken.
    """

    source: str
    ratios: Mapping[tuple[str, str, bool], Ratios]


@dataclass(frozen=True)
class Verdict:
    """The speeds that decide for an operation, means over sizes, and where they are from."""

    speeds: Mapping[str, float]
    source: str

    def __str__(self) -> str:
        found = sorted(self.speeds.items(), key=lambda item: -item[1])
        return f"{', '.join(f'{name} {speed:.2g}x' for name, speed in found)} ({self.source})"


_tables: tuple[Figures, ...] | None = None  # None: not read yet
_verdicts: dict[tuple[str, torch.dtype, bool], Verdict | None] = {}
_orders: dict[tuple[str, tuple[str, ...], torch.dtype, bool], tuple[str, ...]] = {}


def verdict(operation: str, dtype: torch.dtype, gradients: bool) -> Verdict | None:
    """The figures that rank an operation's implementations on this CPU, or None."""
    key = (operation, dtype, gradients)
    if key not in _verdicts:
        _verdicts[key] = _look_up(operation, str(dtype).removeprefix("torch."), gradients)
    return _verdicts[key]


@torch.compiler.assume_constant_result
def known(operation: str, dtype: torch.dtype, gradients: bool) -> bool:
    """Whether there are figures for an operation."""
    return verdict(operation, dtype, gradients) is not None


@torch.compiler.assume_constant_result
def measured(operation: str, name: str, dtype: torch.dtype, gradients: bool) -> bool:
    """Whether there is a figure for an implementation."""
    found = verdict(operation, dtype, gradients)
    return found is not None and name in found.speeds


@torch.compiler.assume_constant_result
def order(operation: str, names: tuple[str, ...], dtype: torch.dtype, gradients: bool) -> tuple[str, ...]:
    """An operation's implementations, the fastest here first; `names` are all of them in the fixed order."""
    key = (operation, names, dtype, gradients)
    if key not in _orders:
        found = verdict(operation, dtype, gradients)
        _orders[key] = names if found is None else ranked(names, found.speeds)
    return _orders[key]


def ranked(names: tuple[str, ...], speeds: Mapping[str, float]) -> tuple[str, ...]:
    """Names by speed, in their own order where they are CLOSE; those without a figure keep their place."""
    left, placed = [name for name in names if name in speeds], []
    while left:
        best = max(speeds[name] for name in left)
        first = next(name for name in left if speeds[name] * CLOSE >= best)
        left.remove(first)
        placed.append(first)
    by_speed = iter(placed)
    return tuple(next(by_speed) if name in speeds else name for name in names)


def _look_up(operation: str, dtype: str, gradients: bool) -> Verdict | None:
    global _tables
    if _tables is None:
        _tables = _read_all()
    for table in _tables:
        ratios = table.ratios.get((operation, dtype, gradients))
        if ratios:
            return Verdict({name: _mean(sizes) for name, sizes in ratios.items()}, table.source)
    return None


def _mean(sizes: Mapping[int, float]) -> float:
    return math.exp(sum(map(math.log, sizes.values())) / len(sizes))


@contextmanager
def using(*tables: Figures) -> Iterator[None]:
    """Have these tables decide inside the block, instead of those of this machine."""
    global _tables
    before = _tables
    try:
        _tables = tables
        forget_orders()
        yield
    finally:
        _tables = before
        forget_orders()


def forget_orders() -> None:
    """Rank anew at the next choice."""
    _verdicts.clear()
    _orders.clear()


def forget() -> None:
    """Read the files again at the next choice."""
    global _tables
    _tables = None
    forget_orders()


def _read_all() -> tuple[Figures, ...]:
    tables = [] if os.environ.get("QWEN3NEXT_TUNED") == "0" else [_tuned()]
    tables.append(shipped(cpu.kind()))
    return tuple(table for table in tables if table is not None)


def shipped(kind: str) -> Figures | None:
    """The shipped figures for a kind of processor (`cpu.kind`), or None."""
    tables = json.loads(SHIPPED.read_text(encoding="utf-8"))
    if kind not in tables:
        return None
    return figures_of(tables[kind], f"shipped for {kind}: {tables[kind]['where']}")


def _tuned() -> Figures | None:
    path = tuned_path()
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        _ignored(path, str(error))
        return None
    try:
        values = json.loads(text)
        return figures_of(values, f"measured here: {values['where']}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _ignored(path, f"it holds no table of figures: {type(error).__name__}")
        return None


def _ignored(path: Path, reason: str) -> None:
    warnings.warn(f"{path} is ignored ({reason}): run `qwen3next tune`, or delete it.", stacklevel=2)


def figures_of(values: Mapping[str, Any], source: str) -> Figures:
    """The figures in a JSON object, see `as_json`. Raises: ValueError, KeyError or TypeError for any other object."""
    ratios: dict[tuple[str, str, bool], Ratios] = {}
    for operation, dtypes in values["figures"].items():
        for dtype, modes in dtypes.items():
            for mode, names in modes.items():
                found = {name: {int(n): float(x) for n, x in sizes.items()} for name, sizes in names.items()}
                if any(not sizes or not all(0 < x < math.inf for x in sizes.values()) for sizes in found.values()):
                    raise ValueError(f"{operation} in {dtype} has a figure that is no ratio")
                ratios[operation, dtype, {"forward": False, "gradients": True}[mode]] = found
    return Figures(source, ratios)


def as_json(ratios: Mapping[tuple[str, str, bool], Ratios], where: str) -> dict[str, Any]:
    """The JSON object of a table.

    {"where": ..., "figures": {operation: {dtype: {"forward" or "gradients": {implementation: {tokens: ratio}}}}}}
    """
    figures: dict[str, Any] = {}
    for (operation, dtype, gradients), names in ratios.items():
        mode = "gradients" if gradients else "forward"
        rounded = {name: {str(n): round(x, 3) for n, x in sizes.items()} for name, sizes in names.items()}
        figures.setdefault(operation, {}).setdefault(dtype, {})[mode] = rounded
    return {"where": where, "figures": figures}


def tuned_path() -> Path:
    """Where `qwen3next tune` keeps its figures of this processor, torch, release and kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = (cpu.name(), cpu.kind(), torch.__version__, _release(), digest_of_sources())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Path(base) / "qwen3next" / f"speeds-{digest}.json"


def _release() -> str:
    try:
        return metadata.version("qwen3next")
    except metadata.PackageNotFoundError:  # a bare checkout
        return "checkout"
