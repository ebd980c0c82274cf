"""A function call in tags, as Qwen3-Coder writes it, as it arrives."""

import json
import re
from collections.abc import Mapping
from typing import Any

from qwen3next.chat.argument_types import argument, only_text
from qwen3next.chat.call_parts import (
    CLOSE_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    OPEN_CALL,
    PARAMETER,
    SPACES,
    CallPart,
    behind_call,
)

END_TAGS = re.compile(r"(\s*</parameter>)?(\s*</function>)?\s*(</tool_call>)?\s*$")  # of a reply that lacks some


class TagsCall:
    """A call in tags. Arguments come one by one; text arguments as they are written."""

    def __init__(self, index: int, schemas: Mapping[str, Any], *, bare: bool):
        self.index, self.schemas, self.bare = index, schemas, bare
        self.text, self.state = "", "name"
        self.schema: Any = {}
        self.properties: Mapping[str, Any] = {}
        self.property: Any = {}
        self.keys: list[str] = []  # of the arguments so far
        self.streams = self.begun = False  # whether the argument is a text that is given out as it comes

    def push(self, text: str) -> tuple[list[str | CallPart], str | None]:
        """Parts, and the text behind the call once it has ended."""
        self.text += text
        parts: list[str | CallPart] = []
        while True:
            said = {"name": self._name, "tags": self._tags, "value": self._value}.get(self.state, lambda: None)()
            if said is None:
                break
            parts += said
        if self.state == "end":
            return parts, self.text if self.bare else behind_call(self.text)
        return parts, None

    def finish(self, *, stopped: bool) -> list[str | CallPart]:
        if self.state == "name":
            return [OPEN_CALL + self.text]
        if self.state == "end":
            return []
        if not stopped:
            return self._streamed(self.text) if self.state == "value" and self.streams else []
        parts = self._ended(END_TAGS.sub("", self.text)) if self.state == "value" else []
        return parts + self._closed()

    def _name(self) -> list[str | CallPart] | None:
        _, begun, rest = self.text.partition(FUNCTION)
        name, closed, rest = rest.partition(">")
        if not begun or not closed:
            return None
        name = name.strip(SPACES + "\"'")
        self.schema = self.schemas.get(name) or {}
        properties = self.schema.get("properties") if isinstance(self.schema, Mapping) else None
        self.properties = properties if isinstance(properties, Mapping) else {}
        self.text, self.state = rest, "tags"
        return [CallPart(self.index, name)]

    def _tags(self) -> list[str | CallPart] | None:
        """Between arguments; what is no tag there is left out."""
        self.text = self.text.lstrip(SPACES)
        if self.text.startswith(PARAMETER):
            key, closed, rest = self.text[len(PARAMETER) :].partition(">")
            if not closed:
                return None
            key = key.strip(SPACES + "\"'")
            self.property = self.properties.get(key)
            self.streams, self.begun = only_text(self.property, self.schema), False
            self.text, self.state = rest, "value"
            before = "{" if not self.keys else ", "
            self.keys.append(key)
            return [CallPart(self.index, arguments=f"{before}{json.dumps(key, ensure_ascii=False)}: ")]
        for tag in (END_FUNCTION, CLOSE_CALL):
            if self.text.startswith(tag):
                self.text = self.text.removeprefix(tag) if tag == END_FUNCTION else self.text
                return self._closed()
        if any(tag.startswith(self.text) for tag in (PARAMETER, END_FUNCTION, CLOSE_CALL)):
            return None
        skipped = self.text.find("<", 1)
        self.text = self.text[skipped:] if skipped > 0 else ""
        return []

    def _value(self) -> list[str | CallPart] | None:
        """Up to the end of a value, or what of a text is sure to belong to it."""
        end, after = self._end_of_value()
        if after is not None:
            value, self.text, self.state = self.text[:end], self.text[after:], "tags"
            return self._ended(value)
        sure = self.text[:end].removesuffix("\n")  # it may stand before the closing tag
        if not self.streams or not sure or (sure == "\n" and not self.begun):
            return None
        self.text = self.text[len(sure) :]
        return self._streamed(sure)

    def _end_of_value(self) -> tuple[int, int | None]:
        """Where the value ends and what follows it begins; or up to where it is sure not to end, and None.

        A closing tag counts only if another tag follows it: a value may hold such tags. A value without one ends on a
        line that begins the next argument of the schema, or ends the call.
        """
        at = 0
        while (begin := self.text.find("<", at)) >= 0:
            rest, new_line = self.text[begin:], self.text[:begin].endswith("\n")
            if rest.startswith(END_PARAMETER):
                after = rest[len(END_PARAMETER) :].lstrip(SPACES)
                if after.startswith((PARAMETER, END_FUNCTION, CLOSE_CALL)):
                    return begin, len(self.text) - len(after)
                if any(tag.startswith(after) for tag in (PARAMETER, END_FUNCTION, CLOSE_CALL)):
                    return begin, None
            elif new_line and rest.startswith(PARAMETER):
                key, closed, _ = rest[len(PARAMETER) :].partition(">")
                if closed and key in self.properties and key not in self.keys:
                    return begin, begin
                if not closed and any(known.startswith(key) for known in self.properties):
                    return begin, None
            elif new_line and rest.startswith(END_FUNCTION):
                after = rest[len(END_FUNCTION) :].lstrip(SPACES)
                if after.startswith(CLOSE_CALL):
                    return begin, begin
                if CLOSE_CALL.startswith(after):
                    return begin, None
            elif any(tag.startswith(rest) for tag in (PARAMETER, END_PARAMETER, END_FUNCTION)):
                return begin, None
            at = begin + 1
        return len(self.text), None

    def _streamed(self, text: str) -> list[str | CallPart]:
        """A piece of a text argument."""
        before = "" if self.begun else '"'
        text = text if self.begun else text.removeprefix("\n")
        self.begun = True
        return [CallPart(self.index, arguments=before + json.dumps(text, ensure_ascii=False)[1:-1])]

    def _ended(self, value: str) -> list[str | CallPart]:
        """The rest of an argument. Templates put a line break before and behind it."""
        value = value.removesuffix("\n")
        if self.streams:
            return [*self._streamed(value), CallPart(self.index, arguments='"')]
        found = argument(value.removeprefix("\n"), self.property, self.schema)
        return [CallPart(self.index, arguments=json.dumps(found, ensure_ascii=False))]

    def _closed(self) -> list[str | CallPart]:
        self.state = "end"
        return [CallPart(self.index, arguments="}" if self.keys else "{}", complete=True)]
