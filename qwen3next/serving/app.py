"""The HTTP interface, as OpenAI's: /v1/models, /v1/completions, /v1/chat/completions; /tokenize, /health, /metrics."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from qwen3next.chat.reply import ReplyReader
from qwen3next.chat.template import ChatTemplate
from qwen3next.chat.thinking import OPEN
from qwen3next.generation.choice import Picked, row_seed
from qwen3next.generation.grammar import Grammar, token_table
from qwen3next.serving import engine as engines
from qwen3next.serving.engine import Busy, Engine, Finished, Refused, Ticket
from qwen3next.serving.schemas import Chat, Completion, Detokenize, Sampling, Tokenize

LOG = logging.getLogger(__name__)
MOST_BODY = 8 * 2**20  # bytes
M = TypeVar("M", bound=BaseModel)
Piece = tuple[str, str]  # "thinking" or "answer", and text


class Failure(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None = None, kind: str = "invalid_request_error"):
        self.status, self.content = status, {"message": message, "type": kind, "param": param, "code": None}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse({"error": self.content}, status_code=self.status, headers=headers)


class Server:
    """The application for one model.

    Args:
        engine: started and closed with the application.
        name: of the model, as clients call it.
        template: for chats; None refuses them.
        api_key: what clients must send as a bearer token; "" lets everybody in.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        name: str,
        template: ChatTemplate | None = None,
        api_key: str = "",
    ):
        self.engine, self.tokenizer, self.name, self.template, self.api_key = engine, tokenizer, name, template, api_key
        self.stop_tokens = tuple(engine.model.stop_tokens)
        self._table: Any = None  # llguidance's view of the tokenizer, made when first needed
        self.created = int(time.time())

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.engine.close)

        routes = [
            Route("/health", self._answered(self.health, open_to_all=True)),
            Route("/metrics", self._answered(self.metrics)),
            Route("/v1/models", self._answered(self.models)),
            Route("/v1/completions", self._answered(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._answered(self.chats), methods=["POST"]),
            Route("/tokenize", self._answered(self.tokenize), methods=["POST"]),
            Route("/detokenize", self._answered(self.detokenize), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    def _answered(
        self, handle: Callable[[Request], Awaitable[Response]], *, open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the key, with errors as answers."""

        async def endpoint(request: Request) -> Response:
            try:
                if not open_to_all:
                    self._check_key(request)
                return await handle(request)
            except Failure as failure:
                return failure.response()
            except Refused as error:
                return Failure(400, str(error)).response()
            except Busy as error:
                return Failure(429, str(error), kind="rate_limit_error").response()
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # no traceback, path or prompt leaves the server
                LOG.error("a request failed: %s", type(error).__name__)
                return Failure(500, "The server failed on this request.", kind="server_error").response()

        return endpoint

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise Failure(
                401, "The API key is missing or wrong: send it as a bearer token.", kind="authentication_error"
            )

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if self.engine.healthy else JSONResponse({"status": "stuck"}, 503)

    async def metrics(self, _request: Request) -> Response:
        registry, e = CollectorRegistry(), self.engine
        numbers = {
            "requests_waiting": e.queued,
            "requests_running": e.running,
            "cache_bytes_reserved": e.reserved,
            "cache_bytes": e.max_memory,
            "prompt_tokens_total": e.counters.prompt_tokens,
            "generated_tokens_total": e.counters.new_tokens,
            "steps_total": e.counters.steps,
            "requests_refused_total": e.counters.refused,
        }
        for name, value in numbers.items():
            Gauge(f"qwen3next_{name}", name.replace("_", " "), registry=registry).set(value)
        finished = Gauge("qwen3next_requests_finished_total", "by reason", ["reason"], registry=registry)
        for reason, count in e.counters.finished.items():
            finished.labels(reason).set(count)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "qwen3next"}
        length = self.engine.model.config.longest_context
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": length}]})

    async def tokenize(self, request: Request) -> Response:
        body = await _body(request, Tokenize)
        ids = self.tokenizer.encode(body.prompt).ids
        return JSONResponse({"tokens": ids, "count": len(ids)})

    async def detokenize(self, request: Request) -> Response:
        body = await _body(request, Detokenize)
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < self.engine.model.vocab_size:
            raise Failure(400, "tokens has an id outside the vocabulary.", param="tokens")
        return JSONResponse({"prompt": self.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def completions(self, request: Request) -> Response:
        body = await _body(request, Completion)
        self._check_model(body)
        prompts = [tuple(ids) for ids in self._prompts(body.prompt)]
        choice = self._choice(body, body.logprobs)
        run = Run(self, body, "text_completion", "cmpl", prompts)
        for ids in prompts:
            run.add(ids, choice, body.max_tokens, thinks=False)
        return await run.answer(request)

    async def chats(self, request: Request) -> Response:
        body = await _body(request, Chat)
        self._check_model(body)
        if self.template is None:
            raise Failure(400, "This model has no chat template: use /v1/completions.")
        try:
            prompt = self.template.render(body.messages, variables=body.chat_template_kwargs)
        except (ValueError, TypeError, KeyError) as error:
            raise Failure(400, f"The messages do not fit the chat template: {error}", param="messages") from None
        ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=False).ids)
        opened = prompt.rstrip().endswith(OPEN)
        choice = self._choice(body, body.top_logprobs if body.logprobs else None)
        most = body.max_completion_tokens or body.max_tokens
        if most is None:
            most = max(min(2048, self.engine.model.config.longest_context - len(ids)), 1)
        run = Run(self, body, "chat.completion", "chatcmpl", [ids])
        run.add(ids, choice, most, thinks=True, opened=opened, grammar=await self._grammar(body))
        return await run.answer(request)

    def _check_model(self, body: Sampling) -> None:
        if body.model != self.name:
            raise Failure(404, f"There is no model {body.model!r} here: this is {self.name!r}.", param="model")

    def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self.tokenizer.encode(prompt).ids]
        if not prompt:
            raise Failure(400, "prompt is empty: give a text or token ids.", param="prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        return [self.tokenizer.encode(x).ids if isinstance(x, str) else x for x in prompt]

    def _choice(self, body: Sampling, logprobs: int | None) -> Any:
        try:
            choice = body.choice(self.stop_tokens, logprobs)
            choice.check(self.engine.model.vocab_size)
        except ValueError as error:
            raise Failure(400, str(error)) from None
        return choice

    async def _grammar(self, body: Chat) -> Grammar | None:
        form = body.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_schema" and form.json_schema is None:
            raise Failure(400, "response_format has no json_schema.", param="response_format")
        schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
        try:
            if self._table is None:  # seconds for a large vocabulary
                size, stops = self.engine.model.vocab_size, self.stop_tokens
                self._table = await asyncio.to_thread(token_table, self.tokenizer, vocab_size=size, stop_tokens=stops)
            return await asyncio.to_thread(Grammar.json_schema, schema, self._table)
        except ValueError as error:
            raise Failure(400, str(error), param="response_format") from None


class Reader:
    """One text: what its tokens say, piece by piece."""

    def __init__(self, server: Server, ticket: Ticket, *, stops: Sequence[str], thinks: bool, opened: bool):
        self.ticket, self.server = ticket, server
        self.reader = ReplyReader(
            server.tokenizer, stop_tokens=ticket.request.choice.stop_tokens, stop=stops, opened=opened
        )
        self.thinks, self.reason = thinks, ""
        self.picked: list[Picked] = []
        self.said = {"thinking": "", "answer": ""}
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._news.set()  # something may have come already

        def wake() -> None:
            with suppress(RuntimeError):  # the loop may have ended meanwhile
                loop.call_soon_threadsafe(self._news.set)

        ticket.on_item = wake
        if not thinks:  # plain text shows what a chat hides
            self.reader._splitter = _Plain()  # type: ignore[assignment]

    async def pieces(self) -> AsyncIterator[tuple[list[Piece], list[Picked]]]:
        """Text as it is complete, and the tokens that came with it; ends with the text.

        Raises: Failure where the engine failed.
        """
        while not self.reason:
            await self._news.wait()
            self._news.clear()
            new: list[Picked] = []
            said: list[Piece] = []
            for item in self.ticket.taken():
                if isinstance(item, Finished):
                    self.reason = self.reason or item.reason
                    if item.reason == "error":
                        raise Failure(500, "The server failed on this request.", kind="server_error")
                elif not self.reason:
                    new.append(item)
                    said += self.reader.push(item.token)
                    if self.reader.ended:
                        self.reason = "stop"
                        self.ticket.cancel()  # where a stop string ended it
            if self.reason:
                said += self.reader.finish()
            self.picked += new
            for kind, text in said:
                self.said[kind] += text
            if said or new or self.reason:
                yield said, new


class _Plain:
    """Stands in for the splitter of thinking where text is not a chat."""

    def push(self, text: str) -> list[Piece]:
        return [("answer", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Run:
    """The texts of one HTTP request, and the shapes of its answer."""

    def __init__(self, server: Server, body: Sampling, kind: str, prefix: str, prompts: Sequence[tuple[int, ...]]):
        self.server, self.body, self.kind = server, body, kind
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        self.prompt_tokens = sum(map(len, prompts))
        self.readers: list[Reader] = []

    def add(
        self,
        ids: tuple[int, ...],
        choice: Any,
        most: int,
        *,
        thinks: bool,
        opened: bool = False,
        grammar: Grammar | None = None,
    ) -> None:
        """Queue the n texts of a prompt. Raises: Refused, Busy; nothing of the request stays queued then."""
        seed = int(torch.randint(2**62, ())) if self.body.seed is None else self.body.seed
        try:
            for _ in range(self.body.n):
                number = row_seed(seed, len(self.readers))
                ticket = self.server.engine.submit(engines.Request(ids, most, choice, number, grammar))
                self.readers.append(Reader(self.server, ticket, stops=self.body.stops, thinks=thinks, opened=opened))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for reader in self.readers:
            reader.ticket.cancel()

    async def answer(self, request: Request) -> Response:
        if self.body.stream:
            return StreamingResponse(self._events(), media_type="text/event-stream")
        gone = asyncio.create_task(_disconnected(request))
        texts = asyncio.gather(*(self._whole(reader) for reader in self.readers))
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
        choices = [self._choice(n, reader) for n, reader in enumerate(self.readers)]
        return JSONResponse({**self.head, "object": self.kind, "choices": choices, "usage": self._usage()})

    async def _whole(self, reader: Reader) -> None:
        async for _ in reader.pieces():
            pass

    def _usage(self) -> dict[str, Any]:
        made = sum(len(reader.picked) for reader in self.readers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def _choice(self, index: int, reader: Reader) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "finish_reason": reader.reason, "logprobs": None}
        if self.kind == "text_completion":
            found["text"] = reader.said["answer"]
        else:
            thinking = reader.said["thinking"]
            both = {"reasoning": thinking, "reasoning_content": thinking} if thinking else {}
            found["message"] = {"role": "assistant", "content": reader.said["answer"], **both}
        if reader.ticket.request.choice.logprobs is not None:
            found["logprobs"] = self._logprobs(reader.picked)
        return found

    def _logprobs(self, picked: Sequence[Picked]) -> dict[str, Any]:
        def text(token: int) -> str:
            return self.server.tokenizer.decode([token], skip_special_tokens=False)

        if self.kind == "text_completion":
            return {
                "tokens": [text(p.token) for p in picked],
                "token_logprobs": [p.logprob for p in picked],
                "top_logprobs": [{text(token): value for token, value in p.top} for p in picked],
                "text_offset": [],
            }

        def entry(token: int, value: float) -> dict[str, Any]:
            said = text(token)
            return {"token": said, "logprob": value, "bytes": list(said.encode())}

        content = [entry(p.token, p.logprob) | {"top_logprobs": [entry(*top) for top in p.top]} for p in picked]
        return {"content": content}

    async def _events(self) -> AsyncIterator[str]:
        """Server-sent events: pieces of all texts as they come, then the usage if it was asked for."""
        news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        async def follow(index: int, reader: Reader) -> None:
            try:
                async for said, new in reader.pieces():
                    news.put_nowait((index, (said, new)))
            except Failure as failure:
                news.put_nowait((index, failure))
            news.put_nowait((index, None))

        tasks = [asyncio.create_task(follow(n, reader)) for n, reader in enumerate(self.readers)]
        kind, left = self.kind if self.kind == "text_completion" else f"{self.kind}.chunk", len(tasks)
        head = {**self.head, "object": kind}
        try:
            if kind != "text_completion":
                for index in range(left):
                    yield _event({**head, "choices": [_chunk(index, delta={"role": "assistant", "content": ""})]})
            while left:
                index, item = await news.get()
                if item is None:
                    left -= 1
                    reason = self.readers[index].reason
                    last: dict[str, Any] = {"text": ""} if kind == "text_completion" else {"delta": {}}
                    yield _event({**head, "choices": [_chunk(index, finish_reason=reason, **last)]})
                elif isinstance(item, Failure):
                    yield _event({"error": item.content})
                    return
                else:
                    for choice in self._chunks(index, *item):
                        yield _event({**head, "choices": [choice]})
            if self.body.include_usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    def _chunks(self, index: int, said: list[Piece], new: list[Picked]) -> list[dict[str, Any]]:
        """The pieces of one text; log-probabilities go with the first, or alone where there is no text yet."""
        asked = new and self.readers[index].ticket.request.choice.logprobs is not None
        logprobs = self._logprobs(new) if asked else None
        pieces = said or ([("answer", "")] if logprobs else [])
        found = []
        for kind, text in pieces:
            if self.kind == "text_completion":
                part: dict[str, Any] = {"text": text}
            elif kind == "thinking":
                part = {"delta": {"reasoning": text, "reasoning_content": text}}
            else:
                part = {"delta": {"content": text}}
            found.append(_chunk(index, logprobs=logprobs, **part))
            logprobs = None
        return found


def _chunk(index: int, *, finish_reason: str | None = None, logprobs: Any = None, **part: Any) -> dict[str, Any]:
    return {"index": index, "finish_reason": finish_reason, "logprobs": logprobs, **part}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, kind: type[M]) -> M:
    """The request's body. Raises: Failure for one that is too large, no JSON, or has fields that are not supported."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > MOST_BODY:
            raise Failure(413, f"The body has more than {MOST_BODY // 2**20} MiB.")
    try:
        return kind.model_validate_json(bytes(read))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or None
        if first["type"] == "extra_forbidden":
            raise Failure(400, f"{where} is not supported: leave it out.", param=where) from None
        if first["type"] == "json_invalid":
            raise Failure(400, "The body is not valid JSON.") from None
        raise Failure(400, f"{where}: {first['msg']}.", param=where) from None


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Failure(error.status_code, f"{error.detail}.").response()
