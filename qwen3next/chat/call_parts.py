"""The markup of function calls in replies, and the parts in which calls are given out."""

from dataclasses import dataclass

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
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


def behind_call(text: str) -> str | None:
    """What follows a call's closing tag, or follows it where the tag is missing; None if that is not known yet."""
    start = text.lstrip(SPACES)
    if start.startswith(CLOSE_CALL):
        return start.removeprefix(CLOSE_CALL)
    return None if CLOSE_CALL.startswith(start) else start
