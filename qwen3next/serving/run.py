"""The run of an HTTP request: its texts are submitted, read and cancelled together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from qwen3next.chat.thinking import ThinkingSplitter
from qwen3next.chat.tool_calls import CallSplitter
from qwen3next.generation.choice import row_seed
from qwen3next.serving.engine import Engine
from qwen3next.serving.reader import News, PlainText, Reader
from qwen3next.serving.tickets import Request


class Run:
    """The texts of one HTTP request.

    Args:
        requests: one for each prompt.
        n: texts of each prompt. Each gets a seed of its own, drawn from `seed`; None draws one.
        splitter: makes what reads a text.
        stops, one_call: as in `Reader`.
    Raises: Refused, Busy; nothing of the request stays queued then.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        n: int,
        seed: int | None,
        splitter: Callable[[], PlainText | ThinkingSplitter | CallSplitter],
        stops: Sequence[str] = (),
        one_call: bool = False,
    ):
        self.n, self.prompt_tokens = n, sum(len(request.ids) for request in requests)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        texts = [request for request in requests for _ in range(n)]
        seeded = [
            Request(r.ids, r.most, r.choice, row_seed(seed, k), r.grammar, r.ends, r.points)
            for k, r in enumerate(texts)
        ]
        self.readers = [
            Reader(tokenizer, ticket, splitter(), stops=stops, one_call=one_call)
            for ticket in engine.submit_all(seeded)
        ]

    def cancel(self) -> None:
        for reader in self.readers:
            reader.ticket.cancel()

    async def complete(self, request: HTTPRequest) -> None:
        """Wait for all texts. Raises: ClientDisconnect, Failure; the texts are cancelled then."""
        gone = asyncio.create_task(_disconnected(request))
        texts = asyncio.gather(*(_whole(reader) for reader in self.readers))
        try:
            futures: set[asyncio.Future[Any]] = {gone, texts}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if not texts.done():
                raise ClientDisconnect
            await texts
        finally:
            self.cancel()
            gone.cancel()
            texts.cancel()

    async def news(self) -> AsyncIterator[tuple[int, News | None]]:
        """What is new in which text, None once it has ended. Raises: Failure; the texts are cancelled then."""
        found: asyncio.Queue[tuple[int, News | Exception | None]] = asyncio.Queue()

        async def follow(index: int, reader: Reader) -> None:
            try:
                async for news in reader.pieces():
                    found.put_nowait((index, news))
                found.put_nowait((index, None))
            except Exception as failure:
                found.put_nowait((index, failure))

        tasks = [asyncio.create_task(follow(n, reader)) for n, reader in enumerate(self.readers)]
        left = len(tasks)
        try:
            while left:
                index, item = await found.get()
                if isinstance(item, Exception):
                    raise item
                left -= item is None
                yield index, item
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    @property
    def new_tokens(self) -> int:
        return sum(len(reader.picked) for reader in self.readers)

    @property
    def thinking_tokens(self) -> int:
        return sum(reader.thinking_tokens for reader in self.readers)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix store; the later texts of a prompt are not counted."""
        return sum(reader.ticket.cached_tokens for reader in self.readers[:: self.n])

    @property
    def not_cached(self) -> str:
        """Why no more of them did, for the first prompt."""
        return self.readers[0].ticket.not_cached


class Events(StreamingResponse):
    """Server-sent events; whatever ends the answer cancels the run."""

    def __init__(self, run: Run, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._texts = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._texts.cancel()


async def _whole(reader: Reader) -> None:
    async for _ in reader.pieces():
        pass


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
