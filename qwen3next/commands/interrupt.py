"""Ctrl-C that waits for the token which is being made."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def patient_ctrl_c(may_wait: Callable[[], bool]) -> Iterator[list[int]]:
    """Note the first Ctrl-C in the list that is handed out, to be asked between tokens; a second one raises.

    Most of the time a forward is running. Stopped there, layers would be at different places and the cache of the whole
    conversation would be lost. Where `may_wait` says no, as before a long prompt's first token, the first one raises.
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
