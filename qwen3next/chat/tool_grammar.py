"""Grammars that make a reply call functions, in the form that the checkpoint's template teaches."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3next.chat.argument_types import only_text
from qwen3next.chat.call_parts import (
    CLOSE_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    OPEN_CALL,
    PARAMETER,
)

NEW_LINE = r'"\n"'
ANYTHING: dict[str, Any] = {"type": "object"}


def writes_tags(template: str) -> bool:
    """Whether a chat template teaches calls in tags, `<function=name>`; else they are JSON."""
    return FUNCTION in template


def calls_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    tags: bool,
    single_tokens: bool,
    several: bool = True,
    opened: bool = False,
) -> str:
    """A grammar in Lark's form (`Grammar.lark`) of calls to these functions, with arguments of their schemas.

    In tags, arguments come in the order of the schema's properties, and a text cannot contain the closing tag.

    Args:
        tools: as in `CallSplitter`.
        tags: calls in tags, else as JSON.
        single_tokens: whether the tokenizer has a token for `<tool_call>` and one for its end.
        several: whether more than one call may be made.
        opened: whether the text begins behind `<tool_call>`.
    """
    open_call, close_call = (OPEN_CALL, CLOSE_CALL) if single_tokens else (_text(OPEN_CALL), _text(CLOSE_CALL))
    functions = [tool.get("function", tool) for tool in tools]
    rules = [_in_tags(n, f) if tags else _as_json(n, f) for n, f in enumerate(functions)]
    body = f"body: {NEW_LINE} ({' | '.join(f'f{n}' for n in range(len(functions)))}) {NEW_LINE} {close_call}"
    more = f"({NEW_LINE} {open_call} body)*" if several else ""
    start = f"start: {'' if opened else open_call} body {more}"
    return "\n".join((start, body, *(line for lines in rules for line in lines)))


def _as_json(n: int, function: Mapping[str, Any]) -> list[str]:
    before = f'{{"name": {json.dumps(function["name"])}, "arguments": '
    return [f"f{n}: {_text(before)} a{n} {_text('}')}", _json(f"a{n}", _schema(function))]


def _in_tags(n: int, function: Mapping[str, Any]) -> list[str]:
    schema = _schema(function)
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    parts, lines = [], []
    for i, (key, part) in enumerate(properties.items()):
        name, value = f"p{n}_{i}", f"v{n}_{i}"
        parts.append(name if key in required else f"{name}?")
        before, behind = _text(f"{PARAMETER}{key}>\n"), _text(f"\n{END_PARAMETER}\n")
        if not only_text(part, schema):
            lines += [f"{name}: {before} {value} {behind}", _json(value, _with_definitions(part, schema))]
        elif "enum" in part or "const" in part:
            values = part["enum"] if "enum" in part else [part["const"]]
            lines += [f"{name}: {before} ({' | '.join(map(_text, values))}) {behind}"]
        else:
            lines += [f"{name}: {before} {value} {NEW_LINE}"]
            lines += [f"{value}[suffix={_text(chr(10) + END_PARAMETER)}]: /(?s:.*)/"]
    first = _text(f"{FUNCTION}{function['name']}>\n")
    return [" ".join((f"f{n}: {first}", *parts, _text(END_FUNCTION))), *lines]


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    given = function.get("parameters")
    return given if isinstance(given, Mapping) and given else ANYTHING


def _with_definitions(part: Any, schema: Mapping[str, Any]) -> Any:
    """A part of a schema that is looked up on its own."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {**part, **shared} if isinstance(part, Mapping) else part


def _json(name: str, schema: Any) -> str:
    strict = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    return f"{name}: %json {json.dumps({**schema, **strict} if isinstance(schema, Mapping) else schema)}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
