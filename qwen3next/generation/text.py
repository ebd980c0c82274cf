"""Streaming of text from tokens: complete characters only, without stop strings."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # decoders return it for invalid or incomplete bytes
WINDOW = 64  # tokens after which older ones are dropped, so that a step's cost does not grow


class TextStream:
    """Converts token ids, one at a time, into text that can be printed immediately.

    A character may take several byte tokens; it is returned when it is complete. Invalid bytes, and a character that is
    incomplete at the end, are returned as U+FFFD. Text that may be the start of a stop string is held back until this
    is known.

    Args:
        decode: returns the text of a list of token ids, with U+FFFD for invalid bytes.
        stop: strings that end the text and are not part of it.
    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = ()):
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text already returned
        self._waiting = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes, possibly "". Always "" after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Only the last byte sequence can still become a character; it is one U+FFFD, whatever its length.
        whole = text.removesuffix(INCOMPLETE)
        self._waiting += whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._ids) > WINDOW and text == whole:
            self._ids = self._ids[-8:]
            self._given = len(self._decode(self._ids))
        return self._release()

    def finish(self) -> str:
        """The remaining text, at the end of generation. All returned text equals a decode of all tokens at once."""
        if self.stopped:
            return ""
        self._waiting += self._decode(self._ids)[self._given :] if self._ids else ""
        self._ids, self._given = [], 0
        rest = self._release()
        if not self.stopped:
            rest, self._waiting = rest + self._waiting, ""
        return rest

    def _release(self) -> str:
        found = [i for i in (self._waiting.find(s) for s in self._stop) if i >= 0]
        if found:
            self.stopped = True
            text, self._waiting = self._waiting[: min(found)], ""
            return text
        held = max((overlap(self._waiting, s) for s in self._stop), default=0)
        cut = len(self._waiting) - held
        text, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
