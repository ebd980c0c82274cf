"""How a prompt runs beside running texts: how many of its tokens in one call, and when the texts take a step meanwhile.

A call of the model has pauses between its blocks, in which running texts can take a step. So what delays them is not
the call but its longest stretch without a pause. Long calls are better: they read each weight once for more tokens.
"""

import time

from qwen3next.generation.block_parts import TOKENS as PART
from qwen3next.generation.prefill import GRID

GAP = 0.2  # seconds between two tokens of a running text that are aimed at while prompts run
STRETCH = 0.1  # seconds that a stretch should take at most
LARGEST_PIECE = 4096  # tokens


class Pace:
    """Times of stretches and steps, and what follows from them.

    A stretch costs something for its weights, something a token, and in softmax attention something a token and token
    before it. It is expected to take as long as the slowest one of an earlier piece, times the tokens, times the
    context where that is longer: never too short but for pieces smaller than that one.
    """

    def __init__(self) -> None:
        self.step = 0.0  # seconds of the last step
        self._stepped = 0.0  # when it ended
        self._tokens, self._context, self._seconds = GRID, GRID, 0.0  # of an earlier piece, and of its slowest stretch
        self._asked = GRID
        self._began = self._slowest = self._expected = 0.0  # of the piece that runs

    def tokens(self, held: int, *, alone: bool) -> int:
        """How many tokens to run in the next call, a multiple of the grid on which calls leave no trace.

        Args:
            held: tokens of the prompt that have run.
            alone: whether no text is running that waits meanwhile.
        """
        longer = max(1.0, (held + self._tokens) / self._context)
        fits = GRID
        if self._seconds:
            fits = int(self._tokens * min(STRETCH, GAP - self.step) / (self._seconds * longer)) // GRID * GRID
        self._asked = LARGEST_PIECE if alone else max(GRID, min(fits, 4 * self._tokens, LARGEST_PIECE))
        self._expected = self._seconds * longer * self._asked / self._tokens
        return self._asked

    def begin(self) -> None:
        """A piece begins."""
        self._began, self._slowest = time.monotonic(), 0.0

    def pause(self) -> bool:
        """A stretch has ended. Returns: whether running texts must take a step before the next one."""
        now = self._stretched()
        return now - self._stepped + max(self._slowest, self._expected) + self.step > GAP

    def go_on(self) -> None:
        """The next stretch begins."""
        self._began = time.monotonic()

    def end(self, held: int, ran: int) -> None:
        """The piece has ended; it ran so many tokens behind those held."""
        self._stretched()
        # A piece that the prompt's end made short says little about longer ones, unless it was slow.
        if ran >= min(self._asked, self._tokens) or self._slowest > STRETCH:
            self._tokens, self._seconds = max(GRID, min(ran, PART) // GRID * GRID), max(self._slowest, 1e-6)
            self._context = max(GRID, held + ran)

    def stepped(self, seconds: float) -> None:
        """Running texts have taken a step, which took so long."""
        self.step, self._stepped = seconds, time.monotonic()

    def _stretched(self) -> float:
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._began)
        return now
