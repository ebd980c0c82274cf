"""Count the changes of attributes of the modules that a step is made of.

Comparing every attribute of every module before every step would cost as much as the step itself. Our own classes
therefore count each attribute that is set or deleted, and a guard compares one number.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

import qwen3next.decoding.kinds  # noqa: F401  # registers the kinds
from qwen3next.decoding.description import KINDS

COUNTED = frozenset(kind for kind in KINDS if not kind.__module__.startswith("torch."))
METHODS = ("__setattr__", "__delattr__", "register_parameter", "register_buffer", "register_module", "add_module")
changes = 0  # of an attribute of a module of these classes


def _count_changes(kind: type[nn.Module]) -> None:
    """Let `changes` grow whenever an attribute of a module of this class is set or deleted."""
    for name in METHODS:
        setattr(kind, name, _counted(getattr(kind, name)))


def _counted(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> None:
        global changes
        changes += 1
        method(*args, **options)

    return call


for _kind in COUNTED:
    _count_changes(_kind)
