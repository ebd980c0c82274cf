"""A reply as it is printed, and notes beside it."""

import sys

from qwen3next.chat.thinking import CLOSE, OPEN, Kind

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model may write what a terminal obeys: all control characters but newline and tab become visible.
HARMLESS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def note(text: str) -> None:
    """A line on stderr, dimmed on a terminal."""
    print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class Screen:
    """Prints the pieces of one reply to stdout: thinking dimmed on a terminal, in its tags elsewhere."""

    def __init__(self, *, show_thinking: bool):
        self._terminal, self._show = sys.stdout.isatty(), show_thinking
        self._kind: Kind | None = None
        self._fresh = True  # the cursor stands at the beginning of a line

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
        """Leave the cursor at the beginning of a line, in plain colours."""
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
