"""The routes: OpenAI's /v1/models, /v1/completions, /v1/chat/completions and /v1/responses, and the server's own."""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from qwen3next.chat.template import ChatTemplate
from qwen3next.serving import tickets
from qwen3next.serving.answers import Answer, ChatAnswer
from qwen3next.serving.chats import Chats, checked_choice
from qwen3next.serving.engine import Engine
from qwen3next.serving.errors import FAILED, Failure, read_body
from qwen3next.serving.metrics import metrics
from qwen3next.serving.openapi import description
from qwen3next.serving.page import PAGE, PAGE_HEADERS
from qwen3next.serving.reader import PlainText
from qwen3next.serving.response_schemas import Response as ResponseBody
from qwen3next.serving.responses import ResponseAnswer
from qwen3next.serving.run import Run
from qwen3next.serving.schemas import Chat, Completion, Detokenize, Tokenize
from qwen3next.serving.tickets import Busy, Refused

LOG = logging.getLogger(__name__)


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
        self.engine, self.tokenizer, self.name, self.api_key = engine, tokenizer, name, api_key
        self.chats = Chats(engine, tokenizer, template)
        self.created = int(time.time())

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.engine.close)

        def get(path: str, handle: Callable[[Request], Awaitable[Response]], *, open_to_all: bool = False) -> Route:
            return Route(path, self._answered(handle, open_to_all=open_to_all), methods=["GET"])

        def post(path: str, handle: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, self._answered(handle, open_to_all=False), methods=["POST"])

        routes = [
            get("/", self.page, open_to_all=True),
            get("/health", self.health, open_to_all=True),
            get("/openapi.json", self.openapi, open_to_all=True),
            get("/metrics", self.metrics),
            get("/v1/models", self.models),
            post("/v1/completions", self.completions),
            post("/v1/chat/completions", self.chat_completions),
            post("/v1/responses", self.responses),
            post("/tokenize", self.tokenize),
            post("/detokenize", self.detokenize),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    def _answered(
        self, handle: Callable[[Request], Awaitable[Response]], *, open_to_all: bool
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
                return Failure(500, FAILED, kind="server_error").response()

        return endpoint

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            message = "The API key is missing or wrong: send it as a bearer token."
            raise Failure(401, message, kind="authentication_error")

    async def page(self, _request: Request) -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if self.engine.healthy else JSONResponse({"status": "stuck"}, 503)

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(description(self.name))

    async def metrics(self, _request: Request) -> Response:
        return Response(metrics(self.engine), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "qwen3next"}
        length = self.engine.model.config.longest_context
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": length}]})

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, Tokenize)
        self._check_model(body.model or self.name)
        (ids,) = await asyncio.to_thread(self._prompts, body.prompt)
        return JSONResponse({"tokens": ids, "count": len(ids)})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, Detokenize)
        self._check_model(body.model or self.name)
        if body.tokens and max(body.tokens) >= self.engine.model.vocab_size:
            raise Failure(400, "tokens has an id outside the vocabulary.", param="tokens")
        text = await asyncio.to_thread(self.tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, Completion)
        self._check_model(body.model)
        choice = checked_choice(body, self.engine, tuple(self.engine.model.stop_tokens), body.logprobs)
        prompts = await asyncio.to_thread(self._prompts, body.prompt)
        run = Run(
            self.engine,
            self.tokenizer,
            [tickets.Request(tuple(ids), body.max_tokens, choice) for ids in prompts],
            n=body.n,
            seed=body.seed,
            splitter=PlainText,
            stops=body.stops,
        )
        return await Answer(run, body, self.tokenizer).respond(request)

    async def chat_completions(self, request: Request) -> Response:
        body = await read_body(request, Chat)
        self._check_model(body.model)
        return await ChatAnswer(await self.chats.run(body), body, self.tokenizer).respond(request)

    async def responses(self, request: Request) -> Response:
        body = await read_body(request, ResponseBody)
        self._check_model(body.model)
        return await ResponseAnswer(await self.chats.run(body.chat()), body).respond(request)

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise Failure(404, f"There is no model {name!r} here: this is {self.name!r}.", param="model")

    def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self.tokenizer.encode(prompt).ids]
        if isinstance(prompt[0], int):
            return [prompt]
        return [self.tokenizer.encode(x).ids if isinstance(x, str) else x for x in prompt]


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = Failure(error.status_code, f"{error.detail}.").response()
    answer.headers.update(error.headers or {})
    return answer
