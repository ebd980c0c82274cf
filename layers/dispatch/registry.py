"""Implementations of operations by name, and the case by which each fast one is checked.

    @implements("causal_conv", "fla", checked_by=case)
    def fla(x, weight, *, state, segments): ...

All implementations of an operation have one signature. Definitions register themselves in the file that defines them,
fast implementations in layers/kernels/. `layers/__init__.py` imports all of these, so that a name is known before it is
asked for.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
# Called with the name of a backend; runs the operation by it on small random inputs of this device and dtype, and
# returns its results, followed by gradients where they are enabled.
Case = Callable[[str, torch.device, torch.dtype], Results]
F = TypeVar("F", bound=Callable[..., Any])

_functions: dict[tuple[str, str], Callable[..., Any]] = {}
_cases: dict[tuple[str, str], Case] = {}
_definitions: dict[str, str] = {}


def implements(
    operation: str, name: str, *, definition: bool = False, checked_by: Case | None = None
) -> Callable[[F], F]:
    """Register a function as the implementation `name` of an operation.

    Args:
        definition: whether it is what the others are held to; one in each operation.
        checked_by: the case that compares it with the definition at its first use on a GPU.
    """

    def register(function: F) -> F:
        assert (operation, name) not in _functions, f"{operation} has an implementation {name!r} already"
        _functions[operation, name] = function
        if checked_by is not None:
            _cases[operation, name] = checked_by
        if definition:
            _definitions[operation] = name
        return function

    return register


def function_of(operation: str, name: str) -> Callable[..., Any]:
    """The implementation of that name."""
    return _functions[operation, name]


def case_of(operation: str, name: str) -> Case | None:
    """The case that checks this implementation, or None."""
    return _cases.get((operation, name))


def definition_of(operation: str) -> str:
    """The name of the implementation that the others are held to."""
    return _definitions[operation]
