"""What clients may send to /v1/responses. The server keeps nothing, so what needs an earlier response is refused."""

from typing import Annotated, Any, Literal

from pydantic import Field

from qwen3next.serving.errors import Failure
from qwen3next.serving.schemas import Chat, Function, NamedFunction, Never, Strict

ROLES = Literal["system", "developer", "user", "assistant"]
Status = Literal["in_progress", "completed", "incomplete"] | None


class ContentPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: ROLES
    content: str | list[ContentPart]
    id: str | None = None
    status: Status = None
    phase: str | None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status = None


class CallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]
    id: str | None = None
    status: Status = None


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    status: Status = None


Item = InputMessage | CallItem | CallOutput | ReasoningItem


class FlatTool(Function):
    type: Literal["function"]


class FlatNamed(NamedFunction):
    type: Literal["function"]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None


class Reasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: None = None


class Response(Strict):
    model: str
    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    tools: list[FlatTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FlatNamed | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    store: Never | None = None
    previous_response_id: str | None = None
    truncation: Literal["disabled"] | None = None
    include: list[str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    background: Never | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    user: str | None = None

    def chat(self) -> Chat:
        """The same as a chat. Raises: Failure for what needs a server that keeps responses."""
        if self.previous_response_id is not None:
            message = "This server keeps no responses: send the whole conversation as input."
            raise Failure(400, message, param="previous_response_id")
        if self.include:
            raise Failure(400, f"{self.include[0]} is not supported: leave it out.", param="include")
        form = self.text.format if self.text else None
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": bool(self.stream),
            "max_completion_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tool_choice": self.tool_choice,
        }
        if self.tools:
            asked["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, FlatNamed):
            asked["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if form is not None and form.type != "text":
            asked["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                if form.schema_ is None:
                    raise Failure(400, "text.format has no schema.", param="text")
                asked["response_format"]["json_schema"] = {"name": form.name or "", "schema": form.schema_}
        return Chat.model_validate(asked)

    def _messages(self) -> list[dict[str, Any]]:
        """The items as messages: thinking and calls belong to the assistant's message that they stand at."""
        found = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        turn: dict[str, Any] | None = None  # the assistant's message that is under way
        for item in items:
            if isinstance(item, CallOutput):
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
                turn = None
            elif isinstance(item, InputMessage) and item.role != "assistant":
                role = "system" if item.role == "developer" else item.role
                found.append({"role": role, "content": _text(item.content)})
                turn = None
            else:
                if turn is None or isinstance(item, ReasoningItem):
                    turn = {"role": "assistant", "content": ""}
                    found.append(turn)
                if isinstance(item, ReasoningItem):
                    turn["reasoning_content"] = "".join(part.text for part in item.content or item.summary)
                elif isinstance(item, InputMessage):
                    turn["content"] += _text(item.content)
                else:
                    function = {"name": item.name, "arguments": item.arguments}
                    turn.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
        return found


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
