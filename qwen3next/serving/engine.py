"""The engine: one thread owns the model and works for all requests, each of which gets the tokens of a single run.

Every tick it steps all running texts in one call, and then runs at most one piece of one waiting prompt. In the pauses
of this piece the running texts go on, so a long prompt delays them only briefly. A request is admitted once the memory
for its whole prompt and all its new tokens is free. It keeps this memory until it ends.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from qwen3next.api import Qwen3Next
from qwen3next.cache.hybrid import HybridCache
from qwen3next.files.sizes import binary, parse_bytes
from qwen3next.generation.pauses import pauses
from qwen3next.generation.rounds import Row
from qwen3next.prefix.store import PrefixStore
from qwen3next.serving.pace import Pace
from qwen3next.serving.prompts import Prompt
from qwen3next.serving.speculation import Speculation
from qwen3next.serving.tickets import Busy, Finished, Refused, Request, Ticket

STUCK = 60.0  # seconds without a tick while there is work


class _Abandoned(Exception):
    """Ends the piece of a prompt whose request was cancelled, or whose engine closes."""


@dataclass(eq=False)
class _Running:
    """An admitted request: its text, and its prompt once its turn has come, until it has run."""

    ticket: Ticket
    row: Row
    reserved: int
    prompt: Prompt | None = None
    cache: HybridCache | None = None  # behind the whole prompt


@dataclass
class Counters:
    """What the engine did since it was made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0))
    refused: int = 0
    last_tick: float = 0.0


class Engine:
    """Serves requests with one model. Start it by `with engine:` or `start`; `close` ends it.

    Args:
        max_memory: bytes for the keys, values and states of all requests together.
        max_waiting: requests that may wait.
        max_rows: texts that are stepped together.
        prefix_memory: bytes, as "1GiB", for prefixes of prompts that are kept for later requests; 0 keeps none.
        prefix_folder: also keep prefixes in this folder, which several servers may share.
        prefix_disk: bytes for the folder.
        draft_tokens: tokens to guess and check at a time, or "auto", as in `Generation`: texts are the same.
    Raises: ValueError for a prefix_memory that cannot hold one state of the model, or for drafts that cannot be.
    """

    def __init__(
        self,
        model: Qwen3Next,
        *,
        max_memory: int = 2**30,
        max_waiting: int = 64,
        max_rows: int = 16,
        prefix_memory: int | str = 0,
        prefix_folder: str | Path | None = None,
        prefix_disk: int | str = "16GiB",
        draft_tokens: int | str = 0,
    ):
        self.model, self.max_memory, self.max_waiting, self.max_rows = model, max_memory, max_waiting, max_rows
        self.counters = Counters()
        self.speculation = Speculation(model, draft_tokens)
        self.store: PrefixStore | None = None
        if parse_bytes(prefix_memory):
            self.store = PrefixStore(
                model,
                budget=prefix_memory,
                folder=prefix_folder,
                disk_budget=prefix_disk,
                mtp=self.speculation.mtp,
                exact=True,
                background=True,
            )
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._closing = False
        self._pace = Pace()
        self._thread = threading.Thread(target=self._work, name="qwen3next-engine", daemon=True)

    def start(self) -> "Engine":
        self._thread.start()
        return self

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, timeout: float = 30.0) -> None:
        """Cancel all requests and end the thread; prefixes that wait are written, for so many seconds at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self.store is not None:
            self.store.close(timeout)

    def bytes_for(self, request: Request) -> int:
        """Bytes that a request's cache takes when it is full."""
        element, config = self.model.dtype.itemsize, self.model.config
        tokens = len(request.ids) + request.most + self.speculation.most
        cache = HybridCache.estimate(config, tokens, kv_bytes=element, conv_bytes=element, mtp=self.speculation.mtp)
        return cache + self.speculation.kept_states * config.bytes_per_sequence(element)

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises: Refused for one that can never be served; Busy where the queue is full; RuntimeError after `close`.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """Queue all of these requests, or none. Raises: as `submit`."""
        for request in requests:
            self._check(request)
        tickets = [Ticket(request) for request in requests]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise RuntimeError("The engine is not running: start it, or make a new one after close.")
            waiting = len(self._waiting)
            if waiting and waiting + len(tickets) > self.max_waiting:
                self.counters.refused += len(tickets)
                raise Busy(f"{waiting} requests wait already: try again later.")
            if not (waiting or self._running):
                self.counters.last_tick = time.monotonic()  # from now on there is work
            self._waiting += tickets
            self._changed.notify()
        return tickets

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
        return self._thread.is_alive() and (idle or time.monotonic() - self.counters.last_tick < STUCK)

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
        self._drop_cancelled()
        self._admit()
        self._guarded(self._texts, self._step)
        self._guarded([one for one in self._running if one.cache is None][:1], self._run_piece)
        self.counters.last_tick = time.monotonic()

    @property
    def _texts(self) -> list[_Running]:
        """The requests whose prompts have run."""
        return [one for one in self._running if one.cache is not None]

    def _guarded(self, these: list[_Running], work: Callable[[list[_Running]], None]) -> None:
        """Do some work; if it fails, the requests that it was for end with an error, and the others go on."""
        if not these:
            return
        try:
            work(these)
        except _Abandoned:
            self._finish(these[0], Finished("cancelled"))
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
            row = Row(list(request.ids), len(request.ids), request.choice, request.seed, request.most)
            self._running.append(_Running(ticket, row, needed))

    def _run_piece(self, these: list[_Running]) -> None:
        """Run a piece of a prompt; behind the last one, choose the first token."""
        (one,) = these
        self._pace.begin()
        if one.prompt is None:  # only now: the prompt before it may have stored what it begins with
            grammar = one.ticket.request.grammar
            one.row.grammar = None if grammar is None else grammar.start()
            length = one.row.prompt + one.row.most + self.speculation.most
            one.prompt = Prompt(self.model, self.store, one.ticket, max_len=length, mtp=self.speculation.mtp)
            self.counters.cached_tokens += one.ticket.cached_tokens
        held = one.prompt.cache.lengths[0]
        with pauses(partial(self._between, one)):
            tokens = one.prompt.advance(self._pace.tokens(held, alone=not self._texts))
        self._pace.end(held, tokens)
        self.counters.prompt_tokens += tokens
        if one.prompt.done:
            one.cache, one.prompt = one.prompt.cache, None
            assert one.cache.last_logits is not None
            self._take(one.cache.last_logits, [], [one])

    def _between(self, one: _Running) -> None:
        """In a pause of a prompt's piece: the running texts take a step where it is time."""
        if self._closing or one.ticket.cancelled.is_set():
            raise _Abandoned
        if self._pace.pause():
            for other in self._texts:
                if other.ticket.cancelled.is_set():
                    self._finish(other, Finished("cancelled"))
            self._guarded(self._texts, self._step)
        self.counters.last_tick = time.monotonic()
        self._pace.go_on()

    def _step(self, these: list[_Running]) -> None:
        """One token or more for each running text, in one call."""
        began = time.monotonic()
        device, caches = self.model.device, [one.cache for one in these if one.cache is not None]
        with self.speculation.round([one.row for one in these], caches) as turn:
            tokens = [[one.row.text[-1], *guesses] for one, guesses in zip(these, turn.drafts, strict=True)]
            logits = self.model.step_many([torch.tensor(row, device=device) for row in tokens], caches, all_logits=True)
            self.counters.steps += 1
            parts = zip(these, turn.drafts, logits.split([len(row) for row in tokens]), strict=True)
            for one, guesses, after in parts:
                before = one.row.new
                self._guarded([one], partial(self._take, after, guesses))
                turn.accepted.append(max(one.row.new - before - 1, 0))
        self.counters.drafted += sum(map(len, turn.drafts))
        self.counters.accepted += sum(turn.accepted)
        self._pace.stepped(time.monotonic() - began)

    def _take(self, logits: torch.Tensor, guesses: Sequence[int], these: list[_Running]) -> None:
        """Choose a text's next tokens and give them out.

        Args:
            logits: (1 + guesses, vocab) after the text's last token and after each guess.
        """
        (one,) = these
        picked = one.row.take(logits, guesses)
        if not one.row.done and guesses:
            assert one.cache is not None
            one.cache.take_back([len(guesses) + 1 - len(picked)], logits=logits[len(picked) - 1][None])
        new, ends = one.row.text[one.row.prompt :], one.ticket.request.ends
        for left, item in zip(range(len(picked) - 1, -1, -1), picked, strict=True):
            self.counters.new_tokens += 1
            one.ticket.give(item)
            if ends is not None and ends(new[: len(new) - left]):
                self._finish(one, Finished("stop"))
                return
        if one.row.done:
            self._finish(one, Finished("stop" if picked[-1].token in one.row.choice.stop_tokens else "length"))

    def _finish(self, one: _Running, how: Finished) -> None:
        self._running = [other for other in self._running if other is not one]
        self._end(one.ticket, how)

    def _end(self, ticket: Ticket, how: Finished) -> None:
        self.counters.finished[how.reason] += 1
        ticket.give(how)
