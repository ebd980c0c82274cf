"""From a chat to a run: the prompt by the checkpoint's template, the grammar, and what reads the reply."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from qwen3next.cache.hybrid import common_prefix
from qwen3next.chat.template import ChatTemplate
from qwen3next.chat.thinking import CLOSE, OPEN, ThinkingSplitter
from qwen3next.chat.tool_calls import CLOSE_CALL, OPEN_CALL, CallSplitter
from qwen3next.chat.tool_grammar import calls_grammar, writes_tags
from qwen3next.generation.choice import Choice
from qwen3next.generation.grammar import Grammar, token_table
from qwen3next.serving.engine import Engine
from qwen3next.serving.errors import Failure
from qwen3next.serving.run import Run
from qwen3next.serving.schemas import Chat, NamedTool, Sampling
from qwen3next.serving.tickets import Request

USUAL = 2048  # new tokens where a client names no number
THINKS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True}


class Chats:
    """Makes runs of chats.

    Args:
        template: None refuses chats.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None):
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.stop_tokens = tuple(engine.model.stop_tokens)
        ended_by = template.special_tokens.get("eos_token") if template else None
        token = tokenizer.token_to_id(ended_by) if ended_by else None
        self.stop_texts = [ended_by] if ended_by and token is None else []
        if token is not None and token not in self.stop_tokens:
            self.stop_tokens += (token,)
        self._table: Any = None  # llguidance's view of the tokenizer, made when first needed
        self._making = asyncio.Lock()

    async def run(self, body: Chat) -> Run:
        """Queue the texts of a chat. Raises: Failure, Refused, Busy."""
        if self.template is None:
            raise Failure(400, "This model has no chat template: use /v1/completions.")
        tools = body.callable
        self._check_choice(body, tools)
        messages, variables = [message.plain() for message in body.messages], self._variables(body)
        prompt = await asyncio.to_thread(self._render, messages, tools, variables)
        ids = await asyncio.to_thread(self._encode, prompt)
        if not ids:
            raise Failure(400, "The chat template gives an empty prompt for these messages.", param="messages")
        points = await asyncio.to_thread(self._points, messages, tools, variables, ids)
        opened = prompt.rstrip().endswith(OPEN)
        choice = checked_choice(
            body, self.engine, self.stop_tokens, (body.top_logprobs or 0) if body.logprobs else None
        )
        most = body.max_completion_tokens or body.max_tokens
        if most is None:
            most = self._usual(ids)
        grammar = await self._grammar(body, tools, opened=opened)

        def splitter() -> CallSplitter | ThinkingSplitter:
            return CallSplitter(tools, opened=opened) if tools else ThinkingSplitter(opened=opened)

        return Run(
            self.engine,
            self.tokenizer,
            [Request(tuple(ids), most, choice, 0, grammar, None, points)],
            n=body.n,
            seed=body.seed,
            splitter=splitter,
            stops=[*body.stops, *self.stop_texts],
            one_call=bool(tools) and body.parallel_tool_calls is False,
        )

    def _check_choice(self, body: Chat, tools: Sequence[Mapping[str, Any]]) -> None:
        names = [tool["function"]["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise Failure(400, "Two functions have the same name.", param="tools")
        if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
            name = body.tool_choice.function.name
            raise Failure(400, f"tool_choice names the function {name!r}, which is not in tools.", param="tool_choice")
        if body.tool_choice == "required" and not names:
            raise Failure(400, 'tool_choice is "required", but there are no tools.', param="tool_choice")
        form = body.response_format
        if tools and body.tool_choice not in (None, "auto") and form is not None and form.type != "text":
            raise Failure(400, "response_format and a tool_choice that requires a call exclude each other.")
        assert self.template is not None
        if tools and "tools" not in self.template.reads:
            raise Failure(400, "This model's chat template has no place for tools: leave them out.", param="tools")

    def _usual(self, ids: Sequence[int]) -> int:
        """New tokens where no number is asked for: `USUAL`, or as many as there is room for."""
        most = max(min(USUAL, self.engine.model.config.longest_context - len(ids)), 1)
        while most > 1 and self.engine.bytes_for(Request(tuple(ids), most)) > self.engine.max_memory:
            most //= 2
        return most

    def _variables(self, body: Chat) -> dict[str, Any]:
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            assert self.template is not None
            if "enable_thinking" not in self.template.reads:
                message = "This model's chat template cannot change how much it thinks: leave it out."
                raise Failure(400, message, param="reasoning_effort")
            variables.setdefault("enable_thinking", THINKS[body.reasoning_effort])
        return variables

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        assert self.template is not None
        try:
            return self.template.render(messages, tools=tools or None, variables=variables)
        except (ValueError, TypeError, KeyError) as error:
            raise Failure(400, f"The messages do not fit the chat template: {error}", param="messages") from None

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def _points(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        ids: Sequence[int],
    ) -> tuple[int, ...]:
        """The end of the user's last message, if replies follow it.

        Templates leave out the thinking of those replies once the user has written again, so that later prompts go
        another way from there.
        """
        last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages))
        if last + 1 >= len(messages):
            return ()
        try:
            before = self._encode(self._render(messages[: last + 1], tools, variables))
        except Failure:
            return ()
        return (common_prefix(torch.tensor(before), torch.tensor(ids)),)

    async def _grammar(self, body: Chat, tools: Sequence[Mapping[str, Any]], *, opened: bool) -> Grammar | None:
        form, forced = body.response_format, body.tool_choice
        behind = self._encode(CLOSE) if opened else []  # thinking is free
        if tools and forced not in (None, "auto"):
            wanted = forced.function.name if isinstance(forced, NamedTool) else None
            chosen = [tool for tool in tools if wanted in (None, tool["function"]["name"])]
            source = self._calls(chosen, several=wanted is None and body.parallel_tool_calls is not False)
            return await self._made("lark", source, param="tools", after=behind)
        if form is not None and form.type != "text":
            if form.type == "json_schema" and form.json_schema is None:
                raise Failure(400, "response_format has no json_schema.", param="response_format")
            schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
            return await self._made("json_schema", schema, param="response_format", after=behind)
        if any(tool["function"].get("strict") for tool in tools):
            free = [tool if tool["function"].get("strict") else _without_schema(tool) for tool in tools]
            source = self._calls(free, several=body.parallel_tool_calls is not False, opened=True)
            return await self._made("lark", source, param="tools", after=self._encode(OPEN_CALL))
        return None

    def _calls(self, tools: Sequence[Mapping[str, Any]], *, several: bool, opened: bool = False) -> str:
        assert self.template is not None
        single = all(self.tokenizer.token_to_id(tag) is not None for tag in (OPEN_CALL, CLOSE_CALL))
        tags = writes_tags(self.template.source)
        try:
            return calls_grammar(tools, tags=tags, single_tokens=single, several=several, opened=opened)
        except (AttributeError, TypeError, KeyError, ValueError):
            raise Failure(400, "The parameters of a function are not a JSON schema.", param="tools") from None

    async def _made(self, kind: str, source: Any, *, param: str, after: Sequence[int]) -> Grammar:
        try:
            async with self._making:
                if self._table is None:  # seconds for a large vocabulary
                    size, stops = self.engine.model.vocab_size, self.stop_tokens
                    self._table = await asyncio.to_thread(
                        token_table, self.tokenizer, vocab_size=size, stop_tokens=stops
                    )
            make = Grammar.lark if kind == "lark" else Grammar.json_schema
            return await asyncio.to_thread(make, source, self._table, after=after)
        except ValueError as error:
            raise Failure(400, str(error).splitlines()[0], param=param) from None


def _without_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {key: value for key, value in tool["function"].items() if key != "parameters"}}


def checked_choice(body: Sampling, engine: Engine, stop_tokens: tuple[int, ...], logprobs: int | None) -> Choice:
    """How a body wants tokens chosen. Raises: Failure for a value outside its range."""
    try:
        choice = body.choice(stop_tokens, logprobs)
        choice.check(engine.model.vocab_size)
    except ValueError as error:
        raise Failure(400, str(error)) from None
    return choice
