"""Errors as clients see them, in the shape of OpenAI's; request bodies, read and checked."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

MOST_BODY = 8 * 2**20  # bytes
BODY_SECONDS = 30.0  # for a whole body to arrive
M = TypeVar("M", bound=BaseModel)


class Failure(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.content = status, {"message": message, "type": kind, "param": param, "code": None}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse({"error": self.content}, status_code=self.status, headers=headers)


FAILED = "The server failed on this request."


async def read_body(request: Request, kind: type[M]) -> M:
    """The request's body. Raises: Failure for one that is too large, too slow, no JSON, or has unsupported fields."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                read += part
                if len(read) > MOST_BODY:
                    raise Failure(413, f"The body has more than {MOST_BODY // 2**20} MiB.")
    except TimeoutError:
        raise Failure(408, f"The body did not arrive within {BODY_SECONDS:g} seconds.") from None
    try:
        return kind.model_validate_json(bytes(read))
    except ValidationError as error:
        raise _explained(error, bytes(read)) from None


def _explained(error: ValidationError, body: bytes) -> Failure:
    """The one error that says most: the deepest, and of several forms of a field the one that has the right type."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        return Failure(400, "The body is not valid JSON.")
    content = json.loads(body)
    places = [_place(content, one["loc"], missing=one["type"] == "missing") for one in found]
    best = max(range(len(found)), key=lambda n: (len(places[n]), not found[n]["type"].endswith("_type"), -n))
    where = ".".join(map(str, places[best])) or None
    if found[best]["type"] == "extra_forbidden":
        return Failure(400, f"{where} is not supported: leave it out.", param=where)
    return Failure(400, f"{where or 'The body'}: {found[best]['msg'].rstrip('.')}.", param=where)


def _place(content: Any, loc: Sequence[int | str], *, missing: bool) -> list[int | str]:
    """The keys of a place in the body, without the names of alternatives that are not in it."""
    found: list[int | str] = []
    for n, key in enumerate(loc):
        in_list = isinstance(content, list) and isinstance(key, int) and key < len(content)
        if in_list or (isinstance(content, dict) and key in content):
            content = content[key]
        elif not (missing and n == len(loc) - 1):
            continue
        found.append(key)
    return found
