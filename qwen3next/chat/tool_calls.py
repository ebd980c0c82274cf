"""Function calls in replies as they arrive, in the two forms that checkpoints are trained on.

    <tool_call>                               <tool_call>
    {"name": "f", "arguments": {"x": 1}}      <function=f>
    </tool_call>                              <parameter=x>
                                              1
                                              </parameter>
                                              </function>
                                              </tool_call>

Both are read whatever the checkpoint's template says. What is neither stays text.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3next.chat.argument_types import argument, only_text
from qwen3next.chat.thinking import CLOSE, Piece, ThinkingSplitter

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
END_TAGS = re.compile(r"(\s*</parameter>)?(\s*</function>)?\s*(</tool_call>)?\s*$")  # of a reply that lacks some
STRING = re.compile(r'"(?:[^"\\]|\\.)*("|$)', re.DOTALL)
SPACES = " \t\r\n"


@dataclass(frozen=True)
class CallPart:
    """A part of a call: the first one has its name, the others pieces of the JSON text of its arguments.

    Attributes:
        index: number of the call in its reply.
        complete: whether the call ends here.
    """

    index: int
    name: str = ""
    arguments: str = ""
    complete: bool = False


class CallSplitter:
    """Splits streamed text into thinking, answer and function calls. Tags may arrive in pieces.

    A call inside of thinking counts only if the thinking is never closed: a model may write about calls before it
    makes them. White space around calls is left out.

    Args:
        tools: as in OpenAI's chats: {"type": "function", "function": {"name": ..., "parameters": schema}}.
        opened: whether the prompt ended with `<think>`.
    Attributes:
        calls: how many calls there are so far.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, opened: bool = False):
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas = {f["name"]: f.get("parameters") or {} for f in functions}
        self._thinking = ThinkingSplitter(opened=opened)
        self._raw = ""
        self._call: _JSONCall | _XMLCall | None = None
        self._trim, self._gap = False, ""  # whether a call was last, and the white space before it
        self._certain = False  # whether calls inside of thinking count
        self.calls = 0

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside of thinking."""
        return self._thinking.thinking

    def push(self, text: str) -> list[Piece | CallPart]:
        """The pieces and parts of calls that this text completes, possibly none."""
        self._raw += text
        found: list[Piece | CallPart] = []
        while self._advance(found):
            pass
        return found

    def finish(self, *, stopped: bool = True) -> list[Piece | CallPart]:
        """What remains at the end of the reply.

        Args:
            stopped: whether the model ended the reply. Then a call that lacks only closing tags is complete; a reply
                that was cut off leaves its JSON open, so that nobody takes it for complete.
        """
        self._certain = True
        found = self.push("")
        if self._call is not None:
            self._raw = ""
            found += self._said(self._call.finish(stopped=stopped))
            self._call = None
        found += self._thinking.push(self._raw)
        self._raw = ""
        return found + self._thinking.finish()

    def _advance(self, found: list[Piece | CallPart]) -> bool:
        """Take what can be taken of the text that waits; False where more is needed."""
        if self._call is not None:
            parts, rest = self._call.push(self._raw)
            self._raw = ""
            found += self._said(parts)
            if rest is None:
                return False
            self._call, self._raw, self._trim = None, rest, True
            return bool(rest)
        if self._trim:
            self._raw = self._raw.lstrip(SPACES)
            if not self._raw:
                return False
            self._trim, self._raw, self._gap = False, self._gap + self._raw, ""
        begin, kind = self._next_call()
        if kind == "text":  # no call, as far as can be seen: only what may become one waits
            said = self._raw[:begin].rstrip(SPACES)  # white space may stand before a call
            self._raw = self._raw[len(said) :]
            found += self._thinking.push(said)
            return False
        said = self._raw[:begin] if self.thinking else self._raw[:begin].rstrip(SPACES)
        found += self._thinking.push(said)
        self._gap, self._raw = self._raw[len(said) : begin] or self._gap, self._raw[begin:]
        if self.thinking and not self._certain:
            closed = _thought(self._raw)
            if not closed:
                return False
            found += self._thinking.push(self._raw[:closed])
            self._raw = self._raw[closed:]
            return True
        self._raw = self._raw.removeprefix(OPEN_CALL)
        self._call = (_JSONCall if kind == "json" else _XMLCall)(self.calls, self._schemas, bare=kind == "bare")
        self.calls += 1
        return True

    def _said(self, parts: "list[str | CallPart]") -> list[Piece | CallPart]:
        """Parts as they are; text that turned out to be no call goes the way of other text."""
        found: list[Piece | CallPart] = []
        for part in parts:
            if isinstance(part, str):
                self.calls -= 1
                found += self._thinking.push(part)
            else:
                found.append(part)
        return found

    def _next_call(self) -> tuple[int, str]:
        """Where the next call begins, and its form; or up to where there is none, and "text"."""
        at = 0
        while (begin := self._raw.find("<", at)) >= 0:
            rest = self._raw[begin:]
            if rest.startswith(OPEN_CALL):
                inside = rest[len(OPEN_CALL) :].lstrip(SPACES)
                if inside.startswith("{"):
                    return begin, "json"
                if inside.startswith(FUNCTION):
                    return begin, "xml"
                if FUNCTION.startswith(inside):
                    return begin, "text"
            elif rest.startswith(FUNCTION):  # the opening tag is missing: counts if there is a function of this name
                name, closed, _ = rest[len(FUNCTION) :].partition(">")
                if closed and name.strip() in self._schemas and not self.thinking:
                    return begin, "bare"
                if not closed and any(known.startswith(name) for known in self._schemas):
                    return begin, "text"
            elif OPEN_CALL.startswith(rest) or FUNCTION.startswith(rest):
                return begin, "text"
            at = begin + 1
        return len(self._raw), "text"


def _thought(text: str) -> int:
    """Where the thinking closes behind calls that are complete, at the end of its tag; 0 where it does not."""
    at = 0
    while True:
        end = text.find(CLOSE_CALL, at)
        if end < 0:
            return 0
        closed, another = text.find(CLOSE, end), text.find(OPEN_CALL, end)
        if closed >= 0 and (another < 0 or closed < another):
            return closed + len(CLOSE)
        if another < 0:
            return 0
        at = another


class _JSONCall:
    """A call as a JSON object: its name comes as soon as it is there, its arguments when the object is complete."""

    def __init__(self, index: int, schemas: Mapping[str, Any], *, bare: bool):  # noqa: ARG002
        self.index, self.text = index, ""
        self.named = self.done = False

    def push(self, text: str) -> tuple[list[str | CallPart], str | None]:
        """Parts, and the text behind the call once it has ended."""
        self.text += text
        if self.done:
            return [], _behind(self.text)
        parts: list[str | CallPart] = []
        if not self.named and (header := HEADER.match(self.text)):
            self.named = True
            parts.append(CallPart(self.index, json.loads(header[1], strict=False)))
        if "}" not in text and ">" not in text:
            return parts, None
        start = len(self.text) - len(self.text.lstrip(SPACES))
        try:
            call, end = json.JSONDecoder(strict=False).raw_decode(self.text, start)
        except ValueError:
            end = STRING.sub(lambda found: " " * len(found[0]), self.text).find(CLOSE_CALL)
            if end < 0:
                return parts, None
            return parts + self._salvaged(self.text[:end]), self.text[end + len(CLOSE_CALL) :]
        except RecursionError:
            return parts, None
        parts += self._complete(call, self.text[start:end])
        self.text, self.done = self.text[end:], True
        return parts, _behind(self.text)

    def finish(self, *, stopped: bool) -> list[str | CallPart]:
        if self.done:
            return []
        if stopped:
            return self._salvaged(self.text)
        header = HEADER.match(self.text)
        return [CallPart(self.index, arguments=self.text[header.end() :])] if header else [OPEN_CALL + self.text]

    def _complete(self, call: Any, text: str) -> list[str | CallPart]:
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str):
            return [OPEN_CALL + text + CLOSE_CALL]
        given = call.get("arguments", call.get("parameters", {}))
        if isinstance(given, str):  # JSON within JSON
            try:
                given = json.loads(given, strict=False)
            except ValueError:
                return self._named(name, json.dumps(given, ensure_ascii=False))
        return self._named(name, json.dumps({} if given is None else given, ensure_ascii=False))

    def _salvaged(self, text: str) -> list[str | CallPart]:
        """The call in a text that is not JSON: in Python's spelling, or its name with what stands there."""
        try:
            call = ast.literal_eval(text.strip())
            json.dumps(call)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            call = None
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            return self._complete(call, text)
        header = HEADER.match(text)
        if not header:
            return [OPEN_CALL + text + CLOSE_CALL]
        return [CallPart(self.index, arguments=text[header.end() :].rstrip(SPACES).removesuffix("}"), complete=True)]

    def _named(self, name: str, arguments: str) -> list[str | CallPart]:
        first = [] if self.named else [CallPart(self.index, name)]
        return [*first, CallPart(self.index, arguments=arguments, complete=True)]


class _XMLCall:
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
            return parts, self.text if self.bare else _behind(self.text)
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


def _behind(text: str) -> str | None:
    """What follows a call's closing tag, or follows it where the tag is missing; None if that is not known yet."""
    start = text.lstrip(SPACES)
    if start.startswith(CLOSE_CALL):
        return start.removeprefix(CLOSE_CALL)
    return None if CLOSE_CALL.startswith(start) else start
