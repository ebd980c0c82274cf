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

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3next.chat.call_parts import CLOSE_CALL, FUNCTION, OPEN_CALL, SPACES, CallPart
from qwen3next.chat.json_call import JSONCall
from qwen3next.chat.tags_call import TagsCall
from qwen3next.chat.thinking import CLOSE, Piece, ThinkingSplitter

__all__ = ["CLOSE_CALL", "OPEN_CALL", "CallPart", "CallSplitter"]


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
        self._call: JSONCall | TagsCall | None = None
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
                that was cut off leaves its JSON open, so that it is not mistaken for complete.
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
        made = JSONCall(self.calls) if kind == "json" else TagsCall(self.calls, self._schemas, bare=kind == "bare")
        self._call = made
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
