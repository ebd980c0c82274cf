"""One text of a request: what its tokens say, piece by piece as they come from the engine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from qwen3next.chat.reply import TokenReader
from qwen3next.chat.thinking import Piece, ThinkingSplitter
from qwen3next.chat.tool_calls import CallPart, CallSplitter
from qwen3next.generation.choice import Picked
from qwen3next.serving.errors import FAILED, Failure
from qwen3next.serving.tickets import Finished, Ticket

ENDS = "The server ends: ask again later."
Said = Piece | CallPart


class News(NamedTuple):
    """What came since the last time: text and parts of calls that are complete, and the tokens."""

    said: list[Said]
    picked: list[Picked]


@dataclass
class Call:
    """A function call so far."""

    name: str
    arguments: str = ""


class PlainText:
    """Stands in for the splitter of a chat where text has no markup."""

    thinking = False

    def push(self, text: str) -> list[Piece]:
        return [("answer", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Reader:
    """Reads the tokens of one ticket.

    Args:
        stops: strings that end the text.
        splitter: what tells thinking, answer and calls apart.
        one_call: end the text behind its first call.
    Attributes:
        said: the text so far, by kind.
        calls: the calls so far.
        thinking_tokens: tokens that were part of thinking.
        reason: why the text ended: "stop", "length" or "tool_calls"; "" before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ticket: Ticket,
        splitter: PlainText | ThinkingSplitter | CallSplitter,
        *,
        stops: Sequence[str],
        one_call: bool = False,
    ):
        self.ticket, self.splitter, self.one_call, self.reason = ticket, splitter, one_call, ""
        self._tokens = TokenReader(tokenizer, stop_tokens=ticket.request.choice.stop_tokens, stop=stops)
        self.picked: list[Picked] = []
        self.said = {"thinking": "", "answer": ""}
        self.calls: list[Call] = []
        self.thinking_tokens = 0
        self._news = asyncio.Event()
        self._news.set()  # something may have come already
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop may have ended meanwhile
                loop.call_soon_threadsafe(self._news.set)

        ticket.on_item = wake

    async def pieces(self) -> AsyncIterator[News]:
        """What is new; ends with the text.

        Raises: Failure where the engine failed.
        """
        while not self.reason:
            await self._news.wait()
            self._news.clear()
            news = News([], [])
            for item in self.ticket.taken():
                if isinstance(item, Finished):
                    if item.reason == "error" and not self.reason:
                        raise Failure(500, FAILED, kind="server_error")
                    if item.reason == "cancelled" and not self.reason:  # not by this reader
                        raise Failure(503, ENDS, kind="server_error")
                    self.reason = self.reason or item.reason
                elif not self.reason:
                    news.picked.append(item)
                    self.thinking_tokens += self.splitter.thinking
                    self._hear(news, self.splitter.push(self._tokens.push(item.token)))
                    if self._tokens.ended or (self.one_call and self._called(news)):
                        self.reason = "stop"
                        self.ticket.cancel()  # where a stop string or a call ended it
            if self.reason:
                self._hear(news, self._rest())
                if self.calls and self.reason == "stop":
                    self.reason = "tool_calls"
            self.picked += news.picked
            if news.said or news.picked or self.reason:
                yield news

    def _rest(self) -> Sequence[Said]:
        said: list[Said] = [*self.splitter.push(self._tokens.finish())]
        if isinstance(self.splitter, CallSplitter):
            return said + self.splitter.finish(stopped=self.reason == "stop")
        return [*said, *self.splitter.finish()]

    def _hear(self, news: News, said: Sequence[Said]) -> None:
        for part in said:
            if self.one_call and self._called(news):
                return
            news.said.append(part)
            if not isinstance(part, CallPart):
                self.said[part[0]] += part[1]
            elif part.index == len(self.calls):
                self.calls.append(Call(part.name, part.arguments))
            else:
                self.calls[part.index].arguments += part.arguments

    def _called(self, news: News) -> bool:
        return any(isinstance(part, CallPart) and part.complete for part in news.said)
