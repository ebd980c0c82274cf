"""The OpenAPI description of the interface, from the models that check request bodies."""

from typing import Any

from pydantic import BaseModel

from qwen3next.serving.response_schemas import Response
from qwen3next.serving.schemas import Chat, Completion, Detokenize, Tokenize

BODIES: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/completions": ("Continue a text.", Completion),
    "/v1/chat/completions": ("Answer a conversation.", Chat),
    "/v1/responses": ("Answer a conversation, as a list of items.", Response),
    "/tokenize": ("The tokens of a text.", Tokenize),
    "/detokenize": ("The text of tokens.", Detokenize),
}
PLAIN = {
    "/health": "200 while the engine advances, else 503.",
    "/v1/models": "The model that is served.",
    "/metrics": "Counters in Prometheus' form.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
FAILURES = {
    "400": "The request is wrong, or asks for what is not supported.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "429": "The queue is full.",
    "500": "The server failed.",
    "503": "The server ends.",
}


def description(name: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document for a server whose model has this name."""
    schemas: dict[str, Any] = {"Error": ERROR}
    paths: dict[str, Any] = {
        path: {
            "get": {"summary": text, "responses": {"200": {"description": text}, "503": {"description": "Not now."}}}
        }
        for path, text in PLAIN.items()
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, (summary, model) in BODIES.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"] = {"enum": [name, *([] if "model" in schema["required"] else [None])]}
        schemas[model.__name__] = schema
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
        answers: dict[str, Any] = {"200": {"description": "The answer, as JSON or as server-sent events."}}
        answers |= {status: {"description": text, "content": error} for status, text in FAILURES.items()}
        post = {"summary": summary, "requestBody": {"required": True, "content": body}, "responses": answers}
        paths[path] = {"post": post}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen3next serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }
