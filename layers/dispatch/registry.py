"""Implementations of operations by name, and the case by which each fast one is checked.

    @implements("causal_conv", "fla", checked_by=case)
    def fla(x, weight, *, state, segments): ...

All implementations of an operation have one signature. Definitions register themselves in the file that defines them,
fast implementations in layers/kernels/. `layers/__init__.py` imports all of these, so that a name is known before it is
asked for.

An operation that consists of several functions names each behind a dot: "elementwise.rms_norm" runs by the backend that
is chosen for "elementwise". A function that runs only on "auto", and only for some calls, is registered by `on_auto`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
# Called with the name of a backend, a device, a dtype and the width of heads; runs the operation by it on small random
# inputs, and returns its results, followed by gradients where they are enabled. Width 0: as released models have it.
Case = Callable[[str, torch.device, torch.dtype, int], Results]
F = TypeVar("F", bound=Callable[..., Any])

_functions: dict[tuple[str, str], Callable[..., Any]] = {}
_cases: dict[tuple[str, str], Case] = {}
_definitions: dict[str, str] = {}
Special = tuple[Callable[..., bool], Callable[..., Any]]  # whether it takes a call, and what then runs
_special: dict[str, tuple[Special, ...]] = {}


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


def on_auto(operation: str, *, where: Callable[..., bool]) -> Callable[[F], F]:
    """Register a function that runs on "auto", whatever would be chosen, for the calls that `where` picks.

    Both have the signature of the operation. Of several, the first registered that takes a call runs.
    """

    def register(function: F) -> F:
        _special[operation] = (*_special.get(operation, ()), (where, function))
        return function

    return register


def special_cases(operation: str) -> tuple[Special, ...]:
    """What `on_auto` registered for an operation, in that order."""
    return _special.get(operation, ())


def function_of(operation: str, name: str) -> Callable[..., Any]:
    """The implementation of that name."""
    return _functions[operation, name]


def parts_of(operation: str, name: str) -> list[str]:
    """The functions of an operation that consists of several, of which there is an implementation of that name."""
    return [o.partition(".")[2] for o, n in _functions if n == name and o.startswith(f"{operation}.")]


def case_of(operation: str, name: str) -> Case | None:
    """The case that checks this implementation, or None."""
    return _cases.get((operation, name))


def checked_implementations() -> tuple[tuple[str, str], ...]:
    """Operation and name of every implementation that has a case."""
    return tuple(_cases)


def definition_of(operation: str) -> str:
    """The name of the implementation that the others are held to."""
    return _definitions[operation]
