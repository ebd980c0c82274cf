"""Values of function arguments from text, by the JSON schema of the parameter.

The XML form of a call writes every value as text, so that only the schema tells 5 from "5".
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

TYPES = ("null", "boolean", "integer", "number", "object", "array")  # in the order in which they are tried
ALL = frozenset((*TYPES, "string"))
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}
DEEPEST = 32  # schemas within schemas that are followed


def argument(text: str, schema: Any, root: Any = None) -> Any:
    """The value that a text stands for.

    Of the types that the schema allows the first one fits that is not a string; Python's spelling of JSON (True, None,
    single quotes) is understood. A text that fits no type stays a string. Without a type, JSON is read as such.

    Args:
        schema: of the parameter; `root` is the schema in which its "$ref" are looked up.
    """
    for value in _listed(schema):
        if text == (value if isinstance(value, str) else json.dumps(value)):
            return value
    allowed = allowed_types(schema, root)
    if allowed == ALL:
        found = _json(text)
        return text if found is None and text.strip() != "null" else found
    for kind in TYPES:
        if kind in allowed:
            fits, value = _as(kind, text.strip())
            if fits:
                return value
    return text


def only_text(schema: Any, root: Any = None) -> bool:
    """Whether the schema allows strings alone, any text being one."""
    return allowed_types(schema, root) == {"string"}


def allowed_types(schema: Any, root: Any = None, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows."""
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        return ALL
    allowed = ALL
    if isinstance(ref := schema.get("$ref"), str):
        allowed &= allowed_types(_referred(ref, root), root, depth + 1)
    if (given := schema.get("type")) is not None:
        names = {NAMES.get(str(name), str(name)) for name in (given if isinstance(given, list) else [given])}
        allowed &= names if names <= ALL else ALL  # an unknown type says nothing
    elif "properties" in schema:
        allowed &= {"object"}
    elif "items" in schema:
        allowed &= {"array"}
    if values := _listed(schema):
        allowed &= frozenset(_type_of(value) for value in values)
    for key in ("anyOf", "oneOf"):
        if isinstance(several := schema.get(key), list) and several:
            allowed &= frozenset().union(*(allowed_types(one, root, depth + 1) for one in several))
    for one in schema.get("allOf") or ():
        allowed &= allowed_types(one, root, depth + 1)
    return allowed | {"null"} if schema.get("nullable") is True else allowed


def _listed(schema: Any) -> list[Any]:
    """The values that a schema lists, if it does."""
    if not isinstance(schema, Mapping):
        return []
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), list) else []


def _referred(ref: str, root: Any) -> Any:
    """What "#/$defs/name" names."""
    found = root
    for step in ref.removeprefix("#").strip("/").split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, Mapping) and step else found
    return found


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _as(kind: str, text: str) -> tuple[bool, Any]:
    """Whether the text is of this type, and its value."""
    if kind == "null":
        return WORDS.get(text, 0) is None, None
    if kind == "boolean":
        return isinstance(WORDS.get(text), bool), WORDS.get(text)
    if kind in ("integer", "number"):
        number = _json(text) if re.match(r"-?\d", text) else None
        if isinstance(number, float) and kind == "integer" and number.is_integer():
            number = int(number)
        fits = isinstance(number, int if kind == "integer" else (int, float)) and not isinstance(number, bool)
        return fits, number
    wanted = dict if kind == "object" else list
    found = _json(text)
    if not isinstance(found, wanted):
        found = _python(text)
    return isinstance(found, wanted), found


def _json(text: str) -> Any:
    """What JSON text says; None where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON.")


def _python(text: str) -> Any:
    """What a literal of Python says, if JSON can say it too; else None."""
    try:
        found = ast.literal_eval(text)
        json.dumps(found, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return found
