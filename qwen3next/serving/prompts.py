"""How the engine runs prompts: behind the prefix that is stored, in pieces that take about the same time."""

import time

import torch

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache
from qwen3next.generation.prefill import GRID
from qwen3next.prefix.store import Prefill, PrefixStore
from qwen3next.serving.tickets import Ticket

PIECE_SECONDS = 0.2  # that a piece of a prompt should take
LARGEST_PIECE = 4096  # tokens


class PieceSize:
    """Tokens of a prompt that take about `PIECE_SECONDS`, in multiples of the grid on which pieces leave no trace."""

    def __init__(self) -> None:
        self.tokens = GRID

    def measured(self, tokens: int, seconds: float) -> None:
        """A piece of so many tokens took so long."""
        if tokens >= GRID:
            fits = int(tokens * PIECE_SECONDS / max(seconds, 1e-6)) // GRID * GRID
            self.tokens = min(max(fits, GRID, self.tokens // 2 // GRID * GRID), 2 * self.tokens, LARGEST_PIECE)


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

    def advance(self, size: PieceSize) -> tuple[int, bool]:
        """Run a piece. Returns: its tokens, and whether the prompt is done."""
        began, held = time.monotonic(), self.cache.lengths[0]
        if self._run is None:
            ids = self._ids[None, held:].to(self.model.device)
            next(self.model.prefill(ids, self.cache, size.tokens))
        else:
            self._run.chunk_size = size.tokens
            self._run.advance()
        ran = self.cache.lengths[0] - held
        size.measured(ran, time.monotonic() - began)
        return ran, self.cache.lengths[0] == len(self._ids)
