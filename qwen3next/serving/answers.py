"""The shapes of answers to completions and chats, whole and as events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from tokenizers import Tokenizer

from qwen3next.chat.tool_calls import CallPart
from qwen3next.generation.choice import Picked
from qwen3next.serving.errors import FAILED, Failure
from qwen3next.serving.reader import News, Reader
from qwen3next.serving.run import Events, Run
from qwen3next.serving.schemas import Sampling


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


class Answer:
    """An answer of one kind; subclasses say what a text looks like.

    Attributes:
        object, chunk: its names in the answer, whole and in events.
    """

    object = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, run: Run, body: Sampling, tokenizer: Tokenizer):
        self.run, self.body, self.tokenizer = run, body, tokenizer
        self.head = {"id": new_id(self.prefix), "created": int(time.time()), "model": body.model}

    async def respond(self, request: HTTPRequest) -> Response:
        if self.body.stream:
            return Events(self.run, self._events())
        await self.run.complete(request)
        choices = [
            {"index": n, "finish_reason": reader.reason, "logprobs": self._whole_logprobs(reader), **self.whole(reader)}
            for n, reader in enumerate(self.run.readers)
        ]
        return JSONResponse({**self.head, "object": self.object, "choices": choices, "usage": self._usage()})

    def whole(self, reader: Reader) -> dict[str, Any]:
        """A text that has ended."""
        return {"text": reader.said["answer"]}

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first piece of a text."""
        return []

    def parts(self, index: int, news: News) -> list[dict[str, Any]]:  # noqa: ARG002
        """The pieces of a text."""
        return [{"text": part[1]} for part in news.said if not isinstance(part, CallPart)]

    def empty(self) -> dict[str, Any]:
        """A piece without text, which carries log-probabilities or the end."""
        return {"text": ""}

    def logprobs(self, picked: Sequence[Picked], start: int) -> dict[str, Any]:
        """Log-probabilities of tokens; `start` is the place of the first one in the text."""
        texts = [self._text(p.token) for p in picked]
        offsets = [start + sum(map(len, texts[:n])) for n in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [p.logprob for p in picked],
            "top_logprobs": [{self._text(token): value for token, value in p.top} for p in picked],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _whole_logprobs(self, reader: Reader) -> dict[str, Any] | None:
        asked = reader.ticket.request.choice.logprobs is not None
        return self.logprobs(reader.picked, 0) if asked else None

    def _usage(self) -> dict[str, Any]:
        made = self.run.new_tokens
        return {
            "prompt_tokens": self.run.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.run.prompt_tokens + made,
            "prompt_tokens_details": {
                "cached_tokens": self.run.cached_tokens,
                "x_not_cached": self.run.not_cached,
            },
            "completion_tokens_details": {"reasoning_tokens": self.run.thinking_tokens},
        }

    async def _events(self) -> AsyncIterator[str]:
        """Pieces of all texts as they come, then the usage if it was asked for."""
        head = {**self.head, "object": self.chunk}

        def event(index: int, part: dict[str, Any], *, reason: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": index, "finish_reason": reason, "logprobs": logprobs, **part}
            return _event({**head, "choices": [choice]})

        try:
            for index in range(len(self.run.readers)):
                for part in self.opening():
                    yield event(index, part)
            starts = [0] * len(self.run.readers)
            async for index, news in self.run.news():
                reader = self.run.readers[index]
                if news is None:
                    yield event(index, self.empty(), reason=reader.reason)
                    continue
                logprobs = None
                if news.picked and reader.ticket.request.choice.logprobs is not None:
                    logprobs = self.logprobs(news.picked, starts[index])
                    starts[index] += sum(len(self._text(p.token)) for p in news.picked)
                # They go with the first piece, or alone where there is no text yet.
                for part in self.parts(index, news) or ([self.empty()] if logprobs else []):
                    yield event(index, part, logprobs=logprobs)
                    logprobs = None
        except Failure as failure:
            yield _event({"error": failure.content})
            return
        except Exception:
            yield _event({"error": Failure(500, FAILED, kind="server_error").content})
            return
        if self.body.include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


class ChatAnswer(Answer):
    """A chat: thinking, answer and function calls apart."""

    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, run: Run, body: Sampling, tokenizer: Tokenizer):
        super().__init__(run, body, tokenizer)
        self._ids: dict[tuple[int, int], str] = {}  # of calls, by text and number

    def whole(self, reader: Reader) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reader.said["answer"], "refusal": None}
        message["annotations"] = []
        if thinking := reader.said["thinking"]:
            message |= {"reasoning": thinking, "reasoning_content": thinking}
        if reader.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": new_id("call"), "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in reader.calls
            ]
        return {"message": message}

    def opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def parts(self, index: int, news: News) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in news.said:
            if isinstance(part, CallPart):
                found.append({"tool_calls": [self._call(index, part)]})
            elif part[0] == "thinking":
                found.append({"reasoning": part[1], "reasoning_content": part[1]})
            else:
                found.append({"content": part[1]})
        return [{"delta": delta} for delta in found]

    def empty(self) -> dict[str, Any]:
        return {"delta": {}}

    def logprobs(self, picked: Sequence[Picked], start: int) -> dict[str, Any]:  # noqa: ARG002
        def entry(token: int, value: float) -> dict[str, Any]:
            said = self._text(token)
            return {"token": said, "logprob": value, "bytes": list(said.encode())}

        content = [entry(p.token, p.logprob) | {"top_logprobs": [entry(*top) for top in p.top]} for p in picked]
        return {"content": content, "refusal": None}

    def _call(self, index: int, part: CallPart) -> dict[str, Any]:
        """The first part of a call has its id and name."""
        if (key := (index, part.index)) in self._ids:
            return {"index": part.index, "function": {"arguments": part.arguments}}
        self._ids[key] = new_id("call")
        function = {"name": part.name, "arguments": part.arguments}
        return {"index": part.index, "id": self._ids[key], "type": "function", "function": function}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
