"""The quantization_config of config.json: hints for what the tensors leave open."""

from collections.abc import Iterator, Mapping
from typing import Any

METHODS = ("fp8", "compressed-tensors", "modelopt", "gptq", "auto-round", "intel/auto-round", "awq")
DEEPEST = 8  # of nested settings: more is no configuration


class Settings:
    """What quantization_config says.

    Attributes:
        method: quant_method, or "" if none is given.
        block: rows and columns of a block that shares a scale; None for one scale a tensor.
    Raises: ValueError for an unknown method, or a block that is no pair of positive integers.
    """

    def __init__(self, values: Any):
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"quantization_config must be an object, got {values!r}.")
        self.values: Mapping[str, Any] = values or {}
        method = self.values.get("quant_method")
        if method is not None and method not in METHODS:
            raise ValueError(f"the weights are quantised with {method!r}; supported are {', '.join(METHODS)}.")
        self.method = method or ""
        self.block = self._block()

    def first(self, *keys: str) -> Any:
        """The value of the first of these top-level keys that is given; else None."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def every(self, key: str) -> list[Any]:
        """The different values of a key at any depth: layers may have settings of their own."""
        found: list[Any] = []
        for value in _values(self.values, key, 0):
            if value is not None and value not in found:
                found.append(value)
        return found

    def _block(self) -> tuple[int, int] | None:
        given = self.every("block_structure") or [self.values.get("weight_block_size", (128, 128))]
        size = given[0]
        if size is None:
            return None
        pair = isinstance(size, (list, tuple)) and len(size) == 2 and len(given) == 1
        if not pair or not all(type(n) is int and n > 0 for n in size):
            raise ValueError(f"weight_block_size must be two positive integers, got {size!r}.")
        return size[0], size[1]


def _values(at: Any, key: str, depth: int) -> Iterator[Any]:
    if depth > DEEPEST:
        return
    if isinstance(at, Mapping):
        if key in at:
            yield at[key]
        for value in at.values():
            yield from _values(value, key, depth + 1)
