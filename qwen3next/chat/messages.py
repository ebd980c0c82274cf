"""The messages of a conversation, as chat templates and other programs know them: plain JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3next.files.json_files import read, write

Message = dict[str, Any]
Content = str | list[dict[str, Any]]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises: ValueError for a message without role or content, or with a part that is not text."""
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'Message {i} is not of the form {{"role": ..., "content": ...}}.')
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(f"Message {i} has a part of type {kind!r}: this is a text model, give text only.")
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"Message {i} has no content: give text.")


class History:
    """Messages so far. The list is replaced, never changed, so that whoever holds it keeps a whole one.

    Attributes:
        messages: {"role": ..., "content": ...}; a reply that thought has "reasoning_content" beside its content.
    """

    def __init__(self, *, system: str | None = None):
        self.messages: list[Message] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt, if there is one."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def set_system(self, text: str | None) -> None:
        """Give the conversation another system prompt; None or "" leaves it to the template."""
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = self.messages[: self.system is not None]

    def undo(self) -> None:
        """Take back the user's last message and what followed. Raises: ValueError where there is none."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("There is no message to take back.")
        self.messages = self.messages[: asked[-1]]

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, whole or not at all."""
        write(Path(path), self.messages)

    def load(self, path: str | Path) -> None:
        """Continue the messages of a JSON file. Raises: ValueError that names it, with the history as it was."""
        messages = read(Path(path), "a saved conversation")
        if not isinstance(messages, list):
            raise ValueError(f"{path} must hold a JSON list of messages.")
        try:
            check_messages(messages)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.messages = messages
