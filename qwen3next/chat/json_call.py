"""A function call in its JSON form, as it arrives."""

import ast
import json
import re
from typing import Any

from qwen3next.chat.call_parts import CLOSE_CALL, OPEN_CALL, SPACES, CallPart, behind_call

HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
STRING = re.compile(r'"(?:[^"\\]|\\.)*("|$)', re.DOTALL)


class JSONCall:
    """A call as a JSON object: its name comes as soon as it is there, its arguments when the object is complete."""

    def __init__(self, index: int):
        self.index, self.text = index, ""
        self.named = self.done = False

    def push(self, text: str) -> tuple[list[str | CallPart], str | None]:
        """Parts, and the text behind the call once it has ended."""
        self.text += text
        if self.done:
            return [], behind_call(self.text)
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
        return parts, behind_call(self.text)

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
