"""Printing of replies to stdout and of notes to stderr."""

import sys

from qwen3next.chat.thinking import CLOSE, OPEN, Kind

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model may write control sequences: replace all control characters except newline and tab.
HARMLESS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def note(text: str) -> None:
    """Print a line to stderr, dimmed on a terminal."""
    print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class Screen:
    """Prints the pieces of one reply to stdout; thinking is dimmed on a terminal, and between its tags elsewhere."""

    def __init__(self, *, show_thinking: bool):
        self._terminal, self._show = sys.stdout.isatty(), show_thinking
        self._kind: Kind | None = None
        self._fresh = True  # the cursor is at the start of a line

    def write(self, kind: Kind, text: str) -> None:
        if kind == "thinking" and not self._show:
            return
        if kind != self._kind:
            self._leave()
            if kind == "thinking":
                self._print(DIM if self._terminal else f"{OPEN}\n")
            elif self._kind == "thinking":
                self._print("\n\n")
            self._kind = kind
        self._print(text.translate(HARMLESS) if self._terminal else text)
        self._fresh = text.endswith("\n")

    def end(self) -> None:
        """Move the cursor to the start of a line and reset the colours."""
        self._leave()
        if self._kind is not None and not self._fresh:
            self._print("\n")
        self._kind = None

    def _leave(self) -> None:
        if self._kind == "thinking" and self._terminal:
            self._print(PLAIN)
        elif self._kind == "thinking":
            self._print(f"\n{CLOSE}")
            self._fresh = False

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
