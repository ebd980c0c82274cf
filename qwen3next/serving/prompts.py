"""How the engine runs prompts: behind the prefix that is stored, in pieces that take about the same time."""

import logging
import time

import torch

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.prefill import GRID
from qwen3next.prefix.store import Prefill, PrefixStore
from qwen3next.serving.tickets import Ticket

LOG = logging.getLogger(__name__)
PIECE_SECONDS = 0.2  # that a piece of a prompt should take while texts are running
ALONE_SECONDS = 1.0  # that it may take while none is
LARGEST_PIECE = 4096  # tokens


class PieceSize:
    """How many tokens of a prompt to run at a time, in multiples of the grid on which pieces leave no trace."""

    def __init__(self) -> None:
        self.rate = 0.0  # tokens a second of the last piece; 0 before the first
        self.last = GRID

    def tokens(self, *, alone: bool) -> int:
        """What takes about `PIECE_SECONDS` by the last piece's rate, or longer where no other text waits for it."""
        fits = int(self.rate * (ALONE_SECONDS if alone else PIECE_SECONDS)) // GRID * GRID
        return max(GRID, min(fits, 4 * self.last, LARGEST_PIECE))

    def measured(self, tokens: int, seconds: float) -> None:
        """A piece of so many tokens took so long."""
        if tokens >= GRID:
            self.rate, self.last = tokens / max(seconds, 1e-6), tokens // GRID * GRID


class Prompt:
    """A prompt on its way into its cache.

    Attributes:
        cache: holds the prompt's tokens that are stored or have run.
    """

    def __init__(self, model: Qwen3Next, store: PrefixStore | None, ticket: Ticket, *, max_len: int, mtp: bool):
        self.model, self._ids = model, torch.tensor(ticket.request.ids)
        self._run: Prefill | None = None
        if store is None:
            self.cache: HybridCache = model.new_cache(max_len=max_len, mtp=mtp)
            ticket.not_cached = "The server keeps no prefixes."
            return
        store.refresh()
        self._run = store.prefill(self._ids, max_len=max_len, points=ticket.request.points)
        self.cache = self._run.cache
        ticket.cached_tokens, ticket.not_cached = self._run.matched_tokens, self._run.reason

    def advance(self, size: PieceSize, *, alone: bool) -> tuple[int, bool]:
        """Run a piece. Returns: its tokens, and whether the prompt is done.

        Args:
            alone: whether no text is running that waits meanwhile.
        """
        began, held = time.monotonic(), self.cache.lengths[0]
        if self._run is None:
            ids = self._ids[None, held:].to(self.model.device)
            next(self.model.prefill(ids, self.cache, size.tokens(alone=alone)))
        else:
            self._run.chunk_size = size.tokens(alone=alone)
            try:
                self._run.advance()
            except OSError as error:  # the folder is full or gone: what ran is there, and was not kept
                if self.cache.lengths[0] == held:
                    raise
                LOG.warning("a prefix was not written: %s", error.strerror)
        ran = self.cache.lengths[0] - held
        size.measured(ran, time.monotonic() - began)
        return ran, self.cache.lengths[0] == len(self._ids)
