"""The engine: one thread owns the model and works for all requests, each of which gets the tokens of a single run.

Every tick it steps all running texts in one call, a token each, and then runs at most one piece of one waiting prompt.
A piece takes about the same time for every prompt, so a long prompt delays the other requests only briefly. A request
is admitted once the memory for its whole prompt and all its new tokens is free. It keeps this memory until it ends.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache
from qwen3next.files.sizes import binary
from qwen3next.generation.choice import Choice, Picked
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.prefill import GRID
from qwen3next.generation.rounds import Row

PIECE_SECONDS = 0.2  # that a piece of a prompt should take
LARGEST_PIECE = 4096  # tokens


class Refused(ValueError):
    """A request that can never be served: too long, or larger than the memory for all requests."""


class Busy(RuntimeError):
    """The queue is full; the same request may be served later."""


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        ids: the prompt's tokens, at least one.
        most: new tokens at most.
        seed: of the random numbers; a request gives the same tokens with the same seed.
        ends: called with all new tokens so far after each; True ends the text there, as for stop strings.
    """

    ids: tuple[int, ...]
    most: int
    choice: Choice = field(default_factory=Choice)
    seed: int = 0
    grammar: Grammar | None = None
    ends: Callable[[list[int]], bool] | None = None


@dataclass(frozen=True)
class Finished:
    """The end of a text: "stop", "length", "cancelled", or "error" with its sentence."""

    reason: str
    error: str = ""


class Ticket:
    """A request on its way: iterate over it for `Picked` tokens, the last item being a `Finished`."""

    def __init__(self, request: Request):
        self.request, self.cancelled = request, threading.Event()
        self._items: queue.SimpleQueue[Picked | Finished] = queue.SimpleQueue()
        self.on_item: Callable[[], None] = lambda: None  # called from the engine's thread after each item

    def cancel(self) -> None:
        """The engine drops the request before its next step."""
        self.cancelled.set()

    def give(self, item: Picked | Finished) -> None:
        self._items.put(item)
        self.on_item()

    def taken(self) -> list[Picked | Finished]:
        """What came since the last call, without waiting."""
        found = []
        while not self._items.empty():
            found.append(self._items.get())
        return found

    def __iter__(self) -> Iterator[Picked | Finished]:
        while True:
            item = self._items.get()
            yield item
            if isinstance(item, Finished):
                return


@dataclass
class _Running:
    """An admitted request: its cache, the prefill under way if any, and its text."""

    ticket: Ticket
    cache: HybridCache
    row: Row
    reserved: int
    prefill: Iterator[tuple[int, int]] | None

    @property
    def prefilled(self) -> bool:
        return self.prefill is None


@dataclass
class Counters:
    """What the engine did since it was made."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0))
    refused: int = 0
    last_tick: float = 0.0


class Engine:
    """Serves requests with one model. Start it by `with engine:` or `start`; `close` ends it.

    Args:
        max_memory: bytes for the keys, values and states of all requests together.
        max_waiting: requests that may wait.
        max_rows: texts that are stepped together.
    """

    def __init__(self, model: Qwen3Next, *, max_memory: int = 2**30, max_waiting: int = 64, max_rows: int = 16):
        self.model, self.max_memory, self.max_waiting, self.max_rows = model, max_memory, max_waiting, max_rows
        self.counters = Counters()
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._closing = False
        self._piece = GRID  # tokens of a prompt that take about PIECE_SECONDS
        self._thread = threading.Thread(target=self._work, name="qwen3next-engine", daemon=True)

    def start(self) -> "Engine":
        self._thread.start()
        return self

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, timeout: float = 30.0) -> None:
        """Cancel all requests and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def bytes_for(self, request: Request) -> int:
        """Bytes that a request's cache takes when it is full."""
        element = self.model.dtype.itemsize
        return HybridCache.estimate(
            self.model.config, len(request.ids) + request.most, kv_bytes=element, conv_bytes=element
        )

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises: Refused for one that can never be served; Busy where the queue is full; RuntimeError after `close`.
        """
        self._check(request)
        ticket = Ticket(request)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise RuntimeError("The engine is not running: start it, or make a new one after close.")
            if len(self._waiting) >= self.max_waiting:
                self.counters.refused += 1
                raise Busy(f"{len(self._waiting)} requests wait already: try again later.")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _check(self, request: Request) -> None:
        longest = self.model.config.longest_context
        if not request.ids or request.most < 1:
            raise Refused("A request needs at least one prompt token and one new token.")
        if len(request.ids) + request.most > longest:
            raise Refused(
                f"{len(request.ids)} prompt tokens and {request.most} new ones exceed the context of {longest}: "
                "shorten the prompt, or ask for fewer tokens."
            )
        if not 0 <= min(request.ids) <= max(request.ids) < self.model.vocab_size:
            raise Refused(f"The prompt has a token outside 0 to {self.model.vocab_size - 1}.")
        request.choice.check(self.model.vocab_size)
        if (needed := self.bytes_for(request)) > self.max_memory:
            raise Refused(
                f"The request needs {binary(needed)} and the server has {binary(self.max_memory)} for all requests: "
                "shorten the prompt, or ask for fewer tokens."
            )

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def reserved(self) -> int:
        """Bytes reserved by running requests."""
        return sum(one.reserved for one in self._running)

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and, where there is work, advances."""
        idle = not self._running and not self._waiting
        return self._thread.is_alive() and (idle or time.monotonic() - self.counters.last_tick < 60)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._running)
                if self._closing:
                    break
            self._tick()
        for ticket in (*self._waiting, *(one.ticket for one in self._running)):
            self._end(ticket, Finished("cancelled"))
        self._waiting.clear()
        self._running = []

    @torch.no_grad()
    def _tick(self) -> None:
        self.counters.last_tick = time.monotonic()
        self._drop_cancelled()
        self._admit()
        self._guarded([one for one in self._running if one.prefilled], self._step)
        self._guarded([one for one in self._running if not one.prefilled][:1], self._prefill)

    def _guarded(self, these: list[_Running], work: Callable[[list[_Running]], None]) -> None:
        """Do some work; if it fails, the requests that it was for end with an error, and the others go on."""
        if not these:
            return
        try:
            work(these)
        except Exception as error:  # whatever it is, the server must live
            if len(these) > 1:  # one of them is at fault: find it
                for one in these:
                    self._guarded([one], work)
                return
            sentence = (str(error).splitlines() or [type(error).__name__])[0]
            self._finish(these[0], Finished("error", sentence))

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled.is_set()]
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled.is_set())
        for ticket in gone:
            self._end(ticket, Finished("cancelled"))
        for one in [one for one in self._running if one.ticket.cancelled.is_set()]:
            self._finish(one, Finished("cancelled"))

    def _admit(self) -> None:
        """Take waiting requests in their order, while rows and memory are free."""
        while self._waiting and len(self._running) < self.max_rows:
            request = self._waiting[0].request
            needed = self.bytes_for(request)
            if self.reserved + needed > self.max_memory:
                return
            with self._changed:
                ticket = self._waiting.popleft()
            cache = self.model.new_cache(max_len=len(request.ids) + request.most)
            grammar = None if request.grammar is None else request.grammar.start()
            row = Row(list(request.ids), len(request.ids), request.choice, request.seed, request.most, grammar)
            prefill = self.model.prefill(torch.tensor([request.ids], device=self.model.device), cache, self._piece)
            self._running.append(_Running(ticket, cache, row, needed, prefill))

    def _prefill(self, these: list[_Running]) -> None:
        """Run a piece of a prompt; behind the last one, choose the first token."""
        (one,) = these
        assert one.prefill is not None
        began, held = time.monotonic(), one.cache.lengths[0]
        done, total = next(one.prefill)
        self._resize(one.cache.lengths[0] - held, time.monotonic() - began)
        self.counters.prompt_tokens += one.cache.lengths[0] - held
        if done == total:
            one.prefill = None
            assert one.cache.last_logits is not None
            self._take(one, one.cache.last_logits[0])

    def _resize(self, tokens: int, seconds: float) -> None:
        """Aim at pieces of PIECE_SECONDS, in multiples of the grid on which pieces leave no trace."""
        if tokens >= GRID:
            fits = int(tokens * PIECE_SECONDS / max(seconds, 1e-6)) // GRID * GRID
            self._piece = min(max(fits, GRID, self._piece // 2), 2 * self._piece, LARGEST_PIECE)

    def _step(self, these: list[_Running]) -> None:
        """A token for each running text, in one call."""
        device = self.model.device
        tokens = [torch.tensor(one.row.text[-1:], device=device) for one in these]
        logits = self.model.step_many(tokens, [one.cache for one in these])
        self.counters.steps += 1
        for one, after in zip(these, logits, strict=True):
            self._guarded([one], lambda only, after=after: self._take(only[0], after))  # type: ignore[misc]

    def _take(self, one: _Running, logits: torch.Tensor) -> None:
        """Choose a text's next token and give it out."""
        (picked,) = one.row.take(logits[None])
        self.counters.new_tokens += 1
        one.ticket.give(picked)
        new, ends = one.row.text[one.row.prompt :], one.ticket.request.ends
        if ends is not None and ends(new):
            self._finish(one, Finished("stop"))
        elif one.row.done:
            self._finish(one, Finished("stop" if picked.token in one.row.choice.stop_tokens else "length"))

    def _finish(self, one: _Running, how: Finished) -> None:
        self._running = [other for other in self._running if other is not one]
        self._end(one.ticket, how)

    def _end(self, ticket: Ticket, how: Finished) -> None:
        self.counters.finished[how.reason] += 1
        ticket.give(how)
