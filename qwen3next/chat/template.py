"""A checkpoint's chat template: renders messages as the prompt that the model was trained on."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta

from qwen3next.chat.sandbox import environment
from qwen3next.checkpoints.gguf.header import read_files
from qwen3next.checkpoints.gguf.tokenizer import TEMPLATE, special_tokens
from qwen3next.checkpoints.reader import GGUF
from qwen3next.files.json_files import read_object

# Templates that accept arguments as JSON text test the type of the arguments.
ASKS_ARGUMENTS = re.compile(r"arguments\s+is\s+(not\s+)?(string|mapping)\b")
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys under which messages may hold thinking


class ChatTemplate:
    """Renders as transformers' `apply_chat_template(..., tokenize=False)` does, without importing transformers.

    A template is a program from the checkpoint: it runs in jinja2's sandbox, on copies of its inputs.

    Args:
        source: the template's text.
        special_tokens: the variables bos_token, eos_token, …
    Raises: ValueError for a template that jinja2 cannot parse.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None):
        self.source, self.special_tokens = source, dict(special_tokens or {})
        try:
            self._template = environment().from_string(source)
            self.reads = frozenset(meta.find_undeclared_variables(environment().parse(source)))
        except TemplateSyntaxError as error:
            raise ValueError(f"The chat template is broken at line {error.lineno}: {error.message}") from error
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise ValueError(f"The chat template cannot be compiled: {_first_line(error)}") from error

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate":
        """A folder's template (chat_template.jinja, chat_template.json or tokenizer_config.json), or a GGUF file's.

        Raises: ValueError if there is none, or if it is invalid.
        """
        template = cls.find(folder)
        if template is None:
            raise ValueError(
                f"{folder} has no chat template (chat_template.jinja, chat_template.json, or chat_template in "
                "tokenizer_config.json): add one, or use `qwen3next generate`, which continues plain text."
            )
        return template

    @classmethod
    def find(cls, folder: str | Path) -> "ChatTemplate | None":
        """As `load`, but returns None if there is no template."""
        folder = Path(folder)
        if folder.suffix == GGUF and folder.is_file():
            metadata = read_files(folder).metadata
            found = metadata.get(TEMPLATE)
            return cls(found, special_tokens=special_tokens(metadata)) if isinstance(found, str) else None
        config = read_object(folder / "tokenizer_config.json", "a tokenizer's configuration", optional=True)
        try:
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not UTF-8 text.") from None
        except FileNotFoundError:
            legacy = read_object(folder / "chat_template.json", "a chat template", optional=True)
            found = legacy.get("chat_template") or config.get("chat_template")
            if not found:
                return None
            source = _default(found, folder)
        given = {key: value for key, value in config.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in given.items()}
        return cls(source, special_tokens={key: text for key, text in texts.items() if isinstance(text, str)})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages.

        Args:
            messages: {"role": ..., "content": ...}; optional are "reasoning_content" (thinking) and "tool_calls", whose
                arguments are an object, or a JSON string as in OpenAI's API.
            tools: JSON schemas of functions.
            documents: documents for templates that read them.
            add_generation_prompt: end the prompt where the assistant's next message begins.
            variables: other variables of the template, e.g. {"enable_thinking": False}.
        Raises: ValueError for values that are not JSON, or any error inside the template.
        """
        given = self.special_tokens | dict(variables or {})
        plain_messages = [_message(m) for m in messages]
        if not ASKS_ARGUMENTS.search(self.source):
            plain_messages = [_with_objects(m, i) for i, m in enumerate(plain_messages, start=1)]
        given |= {"messages": plain_messages, "tools": tools, "documents": documents}
        try:
            plain = json.loads(json.dumps(given | {"add_generation_prompt": add_generation_prompt}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The inputs of a chat template must be plain JSON values: {error}.") from error
        late = [i for i, m in enumerate(plain["messages"]) if i and m.get("role") == "system"]
        try:
            prompt = self._template.render(plain)
        except Exception as error:  # a template is foreign code and can raise anything
            hint = f" (Message {late[0] + 1} is a system message; only the first message may be one.)" if late else ""
            raise ValueError(f"The chat template refuses this conversation: {_first_line(error)}{hint}") from error
        for i in late:
            if not all(_stands_in(text, prompt) for text in _texts(plain["messages"][i].get("content"))):
                raise ValueError(
                    f"Message {i + 1} has role 'system', which the chat template ignores at this position: move its "
                    "text to the first message."
                )
        return prompt


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Remove keys that are None, which templates would print, and add thinking under every key that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    thinking = next((message[name] for name in REASONING if name in message), None)
    return message if thinking is None else {"thinking": thinking, **message, "reasoning_content": thinking}


def _with_objects(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Parse tool-call arguments that are JSON strings into objects, which templates would otherwise quote again."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    read = []
    for i, call in enumerate(calls):
        if not isinstance(call, Mapping):
            return message
        function = call.get("function", call)
        given = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(given, str):
            where = f"Message {number} has tool_calls[{i}] with arguments {given[:40]!r}"
            try:
                arguments = json.loads(given) if given.strip() else {}
            except ValueError:
                raise ValueError(f"{where}, which are not JSON: give an object.") from None
            if not isinstance(arguments, dict):
                raise ValueError(f"{where}, which are not a JSON object: give an object.")
            changed = {**function, "arguments": arguments}
            call = {**call, "function": changed} if "function" in call else changed
        read.append(call)
    return {**message, "tool_calls": read}


def _texts(content: Any) -> list[str]:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def _stands_in(text: str, prompt: str) -> bool:
    """Whether the prompt contains the text, as it is or as a JSON string."""
    return text.strip() in prompt or json.dumps(text.strip(), ensure_ascii=False)[1:-1] in prompt


def _default(found: object, folder: Path) -> str:
    """The template, or the one named "default" of a list of named templates."""
    if isinstance(found, list) and all(isinstance(x, dict) for x in found):
        named = {x.get("name"): x.get("template") for x in found}
        if "default" not in named:
            raise ValueError(f"{folder} has chat templates named {sorted(map(str, named))}, but none named 'default'.")
        found = named["default"]
    if not isinstance(found, str):
        raise ValueError(f"{folder}: chat_template must be text, or a list of templates with names.")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
