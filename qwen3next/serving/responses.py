"""The shape of answers to /v1/responses: a list of items, whole and as events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse
from starlette.responses import Response as HTTPResponse

from qwen3next.chat.tool_calls import CallPart
from qwen3next.serving.errors import FAILED, Failure
from qwen3next.serving.reader import Said
from qwen3next.serving.response_schemas import Response
from qwen3next.serving.run import Events, Run

Event = dict[str, Any]


class ResponseAnswer:
    """An answer to /v1/responses. Thinking, text and each call are items, in the order in which they come."""

    def __init__(self, run: Run, body: Response):
        self.run, self.body = run, body
        (self.reader,) = run.readers
        self.id, self.created = _id("resp"), int(time.time())
        self.items: list[dict[str, Any]] = []  # that are complete
        self._open: dict[str, Any] | None = None  # the item under way
        self._number = 0  # of the next event

    async def respond(self, request: HTTPRequest) -> HTTPResponse:
        if self.body.stream:
            return Events(self.run, self._events())
        await self.run.complete(request)
        for _ in self._item_events(self._whole()):
            pass
        return JSONResponse(self._response())

    def _whole(self) -> list[Said]:
        """The text that has ended, as if it had come in one piece."""
        said = self.reader.said
        found: list[Said] = [(kind, said[kind]) for kind in ("thinking", "answer") if said[kind]]
        calls = [CallPart(n, call.name, call.arguments) for n, call in enumerate(self.reader.calls)]
        return [*found, *calls]

    async def _events(self) -> AsyncIterator[str]:
        yield self._sent({"type": "response.created", "response": self._response()})
        yield self._sent({"type": "response.in_progress", "response": self._response()})
        try:
            async for _, news in self.run.news():
                if news is not None:
                    for event in self._part_events(news.said):
                        yield self._sent(event)
        except Exception as failure:
            message = str(failure) if isinstance(failure, Failure) else FAILED
            failed = self._response() | {"status": "failed", "error": {"code": "server_error", "message": message}}
            yield self._sent({"type": "response.failed", "response": failed})
            return
        for event in self._end_item():
            yield self._sent(event)
        answer = self._response()
        yield self._sent({"type": f"response.{answer['status']}", "response": answer})

    def _sent(self, event: Event) -> str:
        content = {**event, "sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"

    def _item_events(self, said: list[Said]) -> Iterator[Event]:
        yield from self._part_events(said)
        yield from self._end_item()

    def _part_events(self, said: list[Said]) -> Iterator[Event]:
        for part in said:
            if isinstance(part, CallPart):
                yield from self._call_part(part)
                continue
            kind, text = part
            item = "reasoning" if kind == "thinking" else "message"
            if self._open is None or self._open["type"] != item:
                yield from self._end_item()
                yield from self._begin_text(item)
            assert self._open is not None
            self._open["content"][0]["text"] += text
            name = "reasoning_text" if item == "reasoning" else "output_text"
            extra: Event = {"logprobs": []} if item == "message" else {}
            yield {"type": f"response.{name}.delta", **self._place(), "content_index": 0, "delta": text, **extra}

    def _call_part(self, part: CallPart) -> Iterator[Event]:
        if self._open is None or self._open.get("number") != part.index:
            yield from self._end_item()
            item = {"type": "function_call", "id": _id("fc"), "call_id": _id("call"), "name": part.name}
            yield from self._begin({**item, "arguments": "", "status": "in_progress"})
            assert self._open is not None
            self._open["number"] = part.index
        assert self._open is not None
        if part.arguments:
            self._open["arguments"] += part.arguments
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": part.arguments}

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self._open = item
        yield {"type": "response.output_item.added", "output_index": len(self.items), "item": dict(item)}

    def _begin_text(self, kind: str) -> Iterator[Event]:
        if kind == "reasoning":
            yield from self._begin(
                {"type": kind, "id": _id("rs"), "summary": [], "content": [], "status": "in_progress"}
            )
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            message = {"type": kind, "id": _id("msg"), "role": "assistant", "content": [], "status": "in_progress"}
            yield from self._begin(message)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        assert self._open is not None
        self._open["content"] = [part]
        yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(part)}

    def _end_item(self) -> Iterator[Event]:
        item, place = self._open, self._place()
        if item is None:
            return
        item.pop("number", None)
        cut = self.reader.reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        else:
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            extra: Event = {"logprobs": []} if item["type"] == "message" else {}
            (part,) = item["content"]
            yield {"type": f"response.{name}.done", **place, "content_index": 0, "text": part["text"], **extra}
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": part}
        self._open = None
        self.items.append(item)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        """The item under way."""
        return {} if self._open is None else {"item_id": self._open["id"], "output_index": len(self.items)}

    def _response(self) -> dict[str, Any]:
        body, reason = self.body, self.reader.reason
        status = "in_progress" if not reason else "incomplete" if reason == "length" else "completed"
        choice = body.tool_choice
        form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if reason else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": body.model,
            "output": self.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "background": False,
            "service_tier": "default",
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_logprobs": 0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_tool(tool.model_dump()) for tool in body.tools or ()],
            "truncation": "disabled",
            "usage": self._usage() if reason else None,
            "user": body.user,
            "safety_identifier": None,
            "prompt_cache_key": None,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        run = self.run
        return {
            "input_tokens": run.prompt_tokens,
            "input_tokens_details": {"cached_tokens": run.cached_tokens, "x_not_cached": run.not_cached},
            "output_tokens": run.new_tokens,
            "output_tokens_details": {"reasoning_tokens": run.thinking_tokens},
            "total_tokens": run.prompt_tokens + run.new_tokens,
        }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "strict": bool(tool["strict"])}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
