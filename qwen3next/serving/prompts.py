"""How the engine runs prompts: behind the prefix that is stored, a piece at a time."""

import torch

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache
from qwen3next.prefix.store import Prefill, PrefixStore
from qwen3next.serving.tickets import Ticket


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

    def advance(self, most: int) -> int:
        """Run a piece of at most so many tokens, which leaves the prompt at a multiple of the grid or at its end.

        Returns: its tokens.
        """
        held = self.cache.lengths[0]
        chunk = held + most  # chunks end at multiples of their size: this one does where it ends
        if self._run is None:
            next(self.model.prefill(self._ids[None, held:].to(self.model.device), self.cache, chunk))
        else:
            self._run.chunk_size = chunk
            self._run.advance()
        return self.cache.lengths[0] - held

    @property
    def done(self) -> bool:
        return self.cache.lengths[0] == len(self._ids)
