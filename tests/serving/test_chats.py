"""Chats and responses with replies that are given: tools, thinking, usage, events, through OpenAI's own client."""

import json

import pytest
from conftest import small_model
from served import GivenReplies, Server, byte_tokenizer, running, serving

from qwen3next.chat.template import ChatTemplate
from qwen3next.chat.tool_grammar import calls_grammar
from qwen3next.generation.grammar import Grammar, token_table

openai = pytest.importorskip("openai")

TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}
{%- if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}

{% endfor %}{% if add_generation_prompt %}bot:{% endif %}{{ "<think>" if enable_thinking }}"""
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TAGS = "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Rain?"}]}


@pytest.fixture(scope="module")
def given():
    tokenizer = byte_tokenizer(markup=True)
    engine = GivenReplies(tokenizer)
    server = Server(engine, tokenizer, name="tiny", template=ChatTemplate(TEMPLATE))
    with running(server) as address:
        yield engine, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def prompt_of(engine):
    return engine.tokenizer.decode(engine.requests[-1].ids, skip_special_tokens=False)


def streamed(client, **asked):
    """The message that the pieces of a stream make together, and its reason."""
    message, reason = {"content": "", "reasoning": "", "calls": []}, None
    for chunk in client.chat.completions.create(**ASKED, **asked, stream=True):
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        message["content"] += choice.delta.content or ""
        message["reasoning"] += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or ():
            if call.index == len(message["calls"]):
                assert call.id
                assert call.type == "function"
                message["calls"].append([call.function.name, ""])
            message["calls"][call.index][1] += call.function.arguments or ""
    return message, reason


@pytest.mark.parametrize("reply", [CALL + TAGS, f"Let me see.\n{TAGS}\n{CALL}"])
def test_tools(given, reply):
    engine, client = given
    engine.replies = [reply, reply]
    answer = client.chat.completions.create(**ASKED, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content in (None, "Let me see.")
    found = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls]
    assert {name for name, _ in found} == {"weather"}
    assert {json.loads(arguments)["city"] for _, arguments in found} == {"Zürich", "Bern"}
    message, reason = streamed(client, tools=TOOLS)
    assert (message["calls"], reason) == (found, "tool_calls")
    assert message["content"] == (choice.message.content or "")
    assert json.loads(prompt_of(engine).splitlines()[0]) == TOOLS[0]


def test_a_call_and_its_result_go_back_as_they_came(given):
    engine, client = given
    engine.replies = [f"</think>{CALL}", "It rains."]
    options = {"tools": TOOLS, "extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    message = client.chat.completions.create(**ASKED, **options).choices[0].message
    (call,) = message.tool_calls
    history = [*ASKED["messages"], message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    answer = client.chat.completions.create(model="tiny", messages=history, tools=TOOLS)
    assert answer.choices[0].message.content == "It rains."
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>' in prompt_of(engine)
    assert "tool:rain" in prompt_of(engine)
    assert engine.requests[-1].points == (len(engine.tokenizer.encode(f"{json.dumps(TOOLS[0])}\nuser:Rain?").ids) + 1,)


def test_one_call_where_no_more_are_wanted(given):
    engine, client = given
    engine.replies = [CALL + TAGS] * 2
    answer = client.chat.completions.create(**ASKED, tools=TOOLS, parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1
    message, reason = streamed(client, tools=TOOLS, parallel_tool_calls=False)
    assert (len(message["calls"]), reason) == (1, "tool_calls")


def test_without_tools_their_markup_is_text(given):
    engine, client = given
    engine.replies = [CALL, CALL]
    assert client.chat.completions.create(**ASKED).choices[0].message.content == CALL
    answer = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert "weather" not in prompt_of(engine)


def test_thinking_has_both_names_and_is_counted(given):
    engine, client = given
    engine.replies = ["I think.</think>\n\nYes."] * 2
    asked = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    answer = client.chat.completions.create(**ASKED, **asked)
    message, usage = answer.choices[0].message, answer.usage
    assert (message.reasoning, message.reasoning_content, message.content) == ("I think.", "I think.", "Yes.")
    assert usage.completion_tokens_details.reasoning_tokens == len("I think.") + 1  # and the closing tag
    assert usage.prompt_tokens_details.cached_tokens == 7
    assert usage.prompt_tokens_details.x_not_cached == "Given."
    assert streamed(client, **asked)[0] == {"content": "Yes.", "reasoning": "I think.", "calls": []}
    engine.replies = ["no</think>"]
    client.chat.completions.create(**ASKED, reasoning_effort="low")
    assert prompt_of(engine).endswith("<think>")


FORMS = {"JSON": TEMPLATE, "tags": TEMPLATE + "{# <function= #}"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
    ],
    ids=["required", "named"],
)
def test_a_call_can_be_required(form, options):
    """A random model makes calls that fit the schema."""
    tokenizer = byte_tokenizer(markup=True)
    model = small_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=256)
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    bounded = {**WEATHER, "parameters": {**WEATHER["parameters"], "properties": {"city": {"enum": ["Bern", "Zug"]}}}}
    tools = [{"type": "function", "function": bounded}, other]
    for address, _ in serving(model, tokenizer, template=FORMS[form]):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            **ASKED, **options, tools=tools, parallel_tool_calls=False, max_tokens=200, seed=3
        )
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        if call.function.name == "weather":
            assert json.loads(call.function.arguments)["city"] in ("Bern", "Zug")
        else:
            assert options["tool_choice"] == "required"
            assert call.function.arguments == "{}"


def test_the_grammar_of_calls():
    """It takes what it should, in both forms, and nothing else."""
    tokenizer = byte_tokenizer(markup=True)
    table = token_table(tokenizer, stop_tokens=[256])

    def takes(source, text):
        state = Grammar.lark(source, table).start()
        for token in tokenizer.encode(text).ids:
            if not state.allowed(tokenizer.get_vocab_size())[token]:
                return False
            state = state.then(token)
        return bool(state.allowed(tokenizer.get_vocab_size())[256])

    forms = {
        tags: calls_grammar(TOOLS, tags=tags, single_tokens=True, several=several)
        for tags, several in ((True, False), (False, True))
    }
    assert takes(forms[True], TAGS)
    assert takes(forms[True], TAGS.replace("</function>", "<parameter=days>\n3\n</parameter>\n</function>"))
    assert not takes(forms[True], TAGS.replace("</function>", "<parameter=days>\nx\n</parameter>\n</function>"))
    assert not takes(forms[True], TAGS.replace("=city", "=town"))
    assert not takes(forms[True], f"{TAGS}\n{TAGS}")
    assert takes(forms[False], CALL)
    assert takes(forms[False], f"{CALL}\n{CALL}")
    assert not takes(forms[False], CALL.replace('Zürich"', 'Zürich", "x": 1'))
    assert not takes(forms[False], "text")


def test_strict_functions_are_held_to_their_schema(given):
    engine, client = given
    engine.replies = ["x"]
    client.chat.completions.create(**ASKED, tools=[{"type": "function", "function": {**WEATHER, "strict": True}}])
    grammar = engine.requests[-1].grammar
    assert grammar.after == (engine.tokenizer.token_to_id("<tool_call>"),)


def test_a_grammar_begins_behind_thinking(given):
    engine, client = given
    engine.replies = ["</think>{}", "{}"]
    form = {"response_format": {"type": "json_object"}}
    client.chat.completions.create(**ASKED, **form, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert engine.requests[-1].grammar.after == (engine.tokenizer.token_to_id("</think>"),)
    client.chat.completions.create(**ASKED, **form)
    assert engine.requests[-1].grammar.after == ()


def test_a_server_that_ends_says_so(given):
    engine, client = given
    engine.replies, engine.ends = ["x" * 50] * 2, True
    with pytest.raises(openai.InternalServerError, match="The server ends"):
        client.chat.completions.create(**ASKED)
    with pytest.raises(openai.APIError, match="The server ends"):
        list(client.chat.completions.create(**ASKED, stream=True))
    engine.ends = False


FLAT = {"type": "function", **WEATHER}


def test_responses(given):
    engine, client = given
    engine.replies = ["I think.</think>\n\nLet me see.\n" + CALL]
    answer = client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input="Rain?",
        tools=[FLAT],
        reasoning={"effort": "low"},
        metadata={"a": "b"},
    )
    assert prompt_of(engine).splitlines()[1:] == ["system:Be brief.", "user:Rain?", "bot:<think>"]
    thinking, message, call = answer.output
    assert thinking.content[0].text == "I think."
    assert message.content[0].text == answer.output_text == "Let me see."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Zürich"})
    assert (answer.status, answer.metadata, answer.store) == ("completed", {"a": "b"}, False)
    assert answer.usage.input_tokens_details.cached_tokens == 7
    assert answer.usage.output_tokens_details.reasoning_tokens == 9
    engine.replies = ["It rains."]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = client.responses.create(
        model="tiny", input=[{"role": "user", "content": "Rain?"}, *answer.output, output], tools=[FLAT]
    )
    assert again.output_text == "It rains."
    assert prompt_of(engine).splitlines()[1:] == [
        "user:Rain?",
        'assistant:Let me see.[I think.]<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>',
        "tool:rain",
        "bot:",
    ]


def test_a_stream_of_a_response_says_what_the_whole_says(given):
    engine, client = given
    asked = {"model": "tiny", "input": "Rain?", "tools": [FLAT], "reasoning": {"effort": "low"}}
    engine.replies = [f"I think.</think>\n\nLet me see.\n{TAGS}{CALL}"] * 2
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    final = events[-1].response
    content = [item.model_dump(exclude={"id", "call_id"}) for item in final.output]
    assert content == [item.model_dump(exclude={"id", "call_id"}) for item in whole.output]
    assert final.usage == whole.usage
    deltas = {"reasoning_text": "", "output_text": "", "function_call_arguments": ""}
    for event in events:
        kind, _, last = event.type.removeprefix("response.").rpartition(".")
        if last == "delta":
            deltas[kind] += event.delta
    assert deltas["reasoning_text"] == "I think."
    assert deltas["output_text"] == "Let me see."
    assert deltas["function_call_arguments"] == "".join(item.arguments for item in final.output[2:])
    added = [event.output_index for event in events if event.type == "response.output_item.added"]
    assert (
        added == [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2, 3]
    )
    engine.replies = ["</think>Yes."]
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == "Yes."


def test_a_response_that_is_cut_off_is_incomplete(given):
    engine, client = given
    engine.replies = ["a long answer"] * 2
    answer = client.responses.create(model="tiny", input="x", max_output_tokens=6)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output_text == "a long"
    *_, last = client.responses.create(model="tiny", input="x", max_output_tokens=6, stream=True)
    assert last.type == "response.incomplete"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"previous_response_id": "resp_1"}, "keeps no responses: send the whole conversation"),
        ({"store": True}, "store: .* does not do that: leave it out, or false"),
        ({"include": ["web_search_call.results"]}, "web_search_call.results is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation is not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format has no schema"),
    ],
)
def test_what_responses_cannot_do_is_said(given, options, words):
    with pytest.raises(openai.BadRequestError, match=words):
        given[1].responses.create(**{"model": "tiny", "input": "x"} | options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tools": TOOLS * 2}, "the same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "which is not in tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 5}}}],
                "tool_choice": "required",
            },
            "cannot be followed|not a lark|JSON schema",
        ),
        ({"response_format": {"type": "json_schema"}}, "has no json_schema"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities is not supported"),
    ],
)
def test_what_chats_cannot_do_is_said(given, options, words):
    with pytest.raises(openai.BadRequestError, match=words):
        given[1].chat.completions.create(**ASKED | options)
