"""Separate thinking from the answer in a streamed reply."""

from typing import Literal

from qwen3next.generation.text import overlap

OPEN, CLOSE = "<think>", "</think>"
Kind = Literal["thinking", "answer"]
Piece = tuple[Kind, str]


class ThinkingSplitter:
    """Splits streamed text at `<think>` and `</think>`, which may arrive in pieces and are removed.

    Thinking can only be at the start of a reply; later tags are text, because a model may write about them. Newlines
    after a tag and before the closing tag are removed too.

    Args:
        opened: whether the prompt ended with `<think>`; a model that repeats the tag is handled.
    """

    def __init__(self, *, opened: bool = False):
        self._kind: Kind = "thinking" if opened else "answer"
        self._tag: str | None = OPEN  # the tag that may come next
        self._trim = opened  # remove newlines at the start
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside of thinking."""
        return self._kind == "thinking"

    def push(self, text: str) -> list[Piece]:
        """The pieces of thinking or answer that this text completes, possibly none."""
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
        """The remaining text, held back because it could have been part of a tag."""
        rest, self._held = self._held, ""
        return self._piece(rest)

    def _begin(self) -> bool:
        """Whether it is known if the reply starts with the opening tag; removes the tag."""
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
