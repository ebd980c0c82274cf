"""Handling of Ctrl-C that waits for the end of the current token."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def patient_ctrl_c(may_wait: Callable[[], bool]) -> Iterator[list[int]]:
    """Yield a list to which the first Ctrl-C adds an item, to be checked between tokens; a second Ctrl-C raises.

    An interrupt inside a forward leaves layers at different positions, and the cache of the conversation would be lost.
    If `may_wait` returns False, as before the first token of a long prompt, the first Ctrl-C raises.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted or not may_wait():
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
