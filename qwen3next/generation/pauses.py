"""Pauses of a long forward: between its blocks and within them, other work can be done.

What is done there must leave the forward's cache alone; the forward's results do not depend on it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_CALLED: ContextVar[Callable[[], None] | None] = ContextVar("pause", default=None)


@contextmanager
def pauses(called: Callable[[], None] | None) -> Iterator[None]:
    """Forwards in the block, on this thread, call this at each pause; what it raises ends them."""
    token = _CALLED.set(called)
    try:
        yield
    finally:
        _CALLED.reset(token)


def wanted() -> bool:
    """Whether a pause would call something."""
    return not torch.compiler.is_compiling() and _CALLED.get() is not None


def pause() -> None:
    """A place where a forward may be held up."""
    if not wanted():
        return
    called = _CALLED.get()
    assert called is not None
    with pauses(None):  # a forward that is run meanwhile has no pauses of its own
        called()
