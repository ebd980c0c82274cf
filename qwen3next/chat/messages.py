"""The messages of a conversation, as plain JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3next.files.json_files import read, write

Message = dict[str, Any]
Content = str | list[dict[str, Any]]


def check_messages(messages: Sequence[Any]) -> None:
    """Check messages. Raises: ValueError for one without role or content, or with a part that is not text."""
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'Message {i} must have the form {{"role": ..., "content": ...}}.')
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(f"Message {i} has a part of type {kind!r}: this model reads text only.")
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"Message {i} has no content: give text.")


class History:
    """The messages so far. Every change makes a new list, so that a reference to an older one stays valid.

    Attributes:
        messages: {"role": ..., "content": ...}; a reply with thinking also has "reasoning_content".
    """

    def __init__(self, *, system: str | None = None):
        self.messages: list[Message] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt, or None."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt; None or "" leaves it to the template."""
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Remove all messages except the system prompt."""
        self.messages = self.messages[: self.system is not None]

    def undo(self) -> None:
        """Remove the user's last message and everything after it. Raises: ValueError if there is none."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("There is no message to remove.")
        self.messages = self.messages[: asked[-1]]

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, atomically."""
        write(Path(path), self.messages)

    def load(self, path: str | Path) -> None:
        """Replace the messages by those of a JSON file. Raises: ValueError that names it; the history is unchanged."""
        messages = read(Path(path), "a saved conversation")
        if not isinstance(messages, list):
            raise ValueError(f"{path} must hold a JSON list of messages.")
        try:
            check_messages(messages)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.messages = messages
