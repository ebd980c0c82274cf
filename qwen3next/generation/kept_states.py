"""States inside a forward: what a cache would hold if the call had ended after a given token, without ending it there.

A call that is divided reads the weights of the feed-forwards twice. Here only the Gated DeltaNet mixers are divided.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StateAfter:
    """What was kept after so many tokens of a sequence.

    Attributes:
        states: convolution inputs and recurrent state of each Gated DeltaNet layer.
        hidden: (b, width) after the final norm.
    """

    tokens: int
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hidden: Tensor | None = None


_KEPT: ContextVar[StateAfter | None] = ContextVar("kept", default=None)


@contextmanager
def keeping(kept: StateAfter) -> Iterator[None]:
    """A prefill in the block, on this thread, fills this in; it must be one call that `may_keep` allows."""
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept_within(past: int, tokens: int) -> StateAfter | None:
    """What is to be kept inside of so many tokens behind `past` others; None where nothing is."""
    if torch.compiler.is_compiling() or (kept := _KEPT.get()) is None:
        return None
    return kept if past < kept.tokens < past + tokens else None
