"""Thinking and answer, told apart while a reply is made."""

from typing import Literal

from qwen3next.generation.text import overlap

OPEN, CLOSE = "<think>", "</think>"
Kind = Literal["thinking", "answer"]
Piece = tuple[Kind, str]


class ThinkingSplitter:
    """Divides streamed text at `<think>` and `</think>`, which may come in pieces and are not given out.

    A reply thinks at its beginning or not at all: later tags are text, for a model may write about them. Newlines
    around the tags belong to the markup: those after a tag, and those before the closing one, are left out.

    Args:
        opened: the prompt ended with `<think>`; a model that repeats it is understood.
    """

    def __init__(self, *, opened: bool = False):
        self._kind: Kind = "thinking" if opened else "answer"
        self._tag: str | None = OPEN  # the one that may come next
        self._trim = opened  # newlines at the beginning are markup
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """What this text decides: pieces of thinking, of answer, or none yet."""
        self._held += text
        if self._tag == OPEN and not self._begin():
            return []
        pieces: list[Piece] = []
        if self._tag == CLOSE and CLOSE in self._held:
            thought, _, self._held = self._held.partition(CLOSE)
            pieces += self._piece(thought.rstrip("\n"))
            self._kind, self._tag, self._trim = "answer", None, True
        said = self._held
        if self._tag == CLOSE:
            said = said[: len(said) - overlap(said, CLOSE)].rstrip("\n")
        self._held = self._held[len(said) :]
        return pieces + self._piece(said)

    def finish(self) -> list[Piece]:
        """The rest, where the reply ended before it was decided."""
        rest, self._held = self._held, ""
        return self._piece(rest)

    def _begin(self) -> bool:
        """Whether it is decided how the reply begins; takes the opening tag away."""
        start = self._held.lstrip()
        if len(start) < len(OPEN) and OPEN.startswith(start):
            return False
        if start.startswith(OPEN):
            self._kind, self._trim, self._held = "thinking", True, start.removeprefix(OPEN)
        self._tag = CLOSE if self._kind == "thinking" else None
        return True

    def _piece(self, text: str) -> list[Piece]:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return [(self._kind, text)] if text else []
