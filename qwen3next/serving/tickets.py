"""What the engine is asked for, and what it gives back."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from qwen3next.generation.choice import Choice, Picked
from qwen3next.generation.grammar import Grammar


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
        points: numbers of prompt tokens after which later prompts may differ; the prefix store keeps states there.
    """

    ids: tuple[int, ...]
    most: int
    choice: Choice = field(default_factory=Choice)
    seed: int = 0
    grammar: Grammar | None = None
    ends: Callable[[list[int]], bool] | None = None
    points: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a text: "stop", "length", "cancelled", or "error" with its sentence."""

    reason: str
    error: str = ""


class Ticket:
    """A request on its way: iterate over it for `Picked` tokens, the last item being a `Finished`.

    Attributes:
        cached_tokens: tokens of the prompt that came from the prefix store; known when the first token is there.
        not_cached: the reason why no more tokens came from it; "" if all did.
    """

    def __init__(self, request: Request):
        self.request, self.cancelled = request, threading.Event()
        self._items: queue.SimpleQueue[Picked | Finished] = queue.SimpleQueue()
        self.on_item: Callable[[], None] = lambda: None  # called from the engine's thread after each item
        self.cached_tokens, self.not_cached = 0, "The prompt has not been run."

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
