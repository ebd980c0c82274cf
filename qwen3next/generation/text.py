"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what decoders put where bytes are no character, or none yet
WINDOW = 64  # tokens after which the past is forgotten, so that a step's cost does not grow


class TextStream:
    """Turns token ids, one at a time, into text that can be printed at once.

    A character may take several byte tokens; it is given out when it is whole. Bytes that are no character
    whatever follows are given out as U+FFFD, and so is a character that is incomplete at the end. Text that may begin
    a stop string waits until that is decided.

    Args:
        decode: text of a list of token ids, U+FFFD for broken bytes.
        stop: strings that end the text and are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = ()):
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text that have left it
        self._waiting = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none. Nothing after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Only the last sequence of bytes can still become a character: one U+FFFD, however many bytes it has.
        whole = text.removesuffix(INCOMPLETE)
        self._waiting += whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._ids) > WINDOW and text == whole:
            self._ids = self._ids[-8:]
            self._given = len(self._decode(self._ids))
        return self._release()

    def finish(self) -> str:
        """The rest, at the end of generation: what has been given out is then what decoding at once gives."""
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
    """Length of the longest end of the text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
