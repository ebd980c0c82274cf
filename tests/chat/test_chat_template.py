"""Prompts equal those of transformers' apply_chat_template; invalid templates raise one clear error."""

import json

import pytest
from chatting import PLAIN, TEMPLATES, tokenizer, write_chat_files
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen3next.chat.template import ChatTemplate

pytestmark = pytest.mark.oracle

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter in <Zürich> & 'Genf'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CHATS = {
    "one": [{"role": "user", "content": "Grüße  <b>&</b>\n"}],
    "several": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "\none and one\n"},
        {"role": "user", "content": "And 2 + 2?"},
    ],
    "thought aloud": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ny"},
    ],
    "calls": [
        {"role": "system", "content": "Call."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No.", "thinking": "It said no.", "tool_calls": []},
        {"role": "user", "content": "Good."},
        {"role": "user", "content": "beyond the break"},
    ],
}
TOKENS = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}


def theirs(template, messages, tools=None, documents=None, add_generation_prompt=True, variables=None):
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **TOKENS)
    made.chat_template = template
    options = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    return made.apply_chat_template(messages, tokenize=False, **options, **(variables or {}))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": [WEATHER]},
        {"variables": {"enable_thinking": False}},
        {"variables": {"enable_thinking": True, "bos_token": "<<"}},
    ],
    ids=["plain", "whole", "tools", "no thinking", "thinking"],
)
def test_equals_transformers(name, chat, options):
    ours = ChatTemplate(TEMPLATES[name], special_tokens=TOKENS)
    if name == "tools" and chat in ("one", "thought aloud") and "tools" not in options:
        with pytest.raises(ValueError, match="Begin with a system message <&>"):
            ours.render(CHATS[chat], **options)
        return
    if name == "thinking" and chat == "calls":
        with pytest.raises(ValueError, match="refuses this conversation"):
            ours.render(CHATS[chat], **options)
        return
    assert ours.render(CHATS[chat], **options) == theirs(TEMPLATES[name], CHATS[chat], **options)


@pytest.mark.parametrize(
    "source",
    [
        "{{ documents | tojson(indent=2, sort_keys=true) }}",
        "{{ messages | tojson }}",  # with the additional names of thinking
        "{{ dict(a=1) }}{% set n = namespace({'a': 2}, self=3) %}{% set n.b = 4 %}{{ n.a }}{{ n.self ~ n.b }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{{ 'a' if tools is none }}{{ nothing }}{{ strftime_now('%Y-%m') }}\n",
        "  {# gone #}\n   {% if true %}\n  kept\n   {% endif %}\n\n{{- ' x' }}\n",
    ],
)
def test_details_equal_transformers(source):
    documents = [{"title": "<t>", "text": "é"}]
    ours = ChatTemplate(source).render(CHATS["several"], documents=documents)
    assert ours == theirs(source, CHATS["several"], documents=documents)


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("{% for m in messages %}", "broken at line 1"),
        ("\n{{ messages[0 }}", "broken at line 2"),
        ("{{ raise_exception('Roles\\nmust alternate') }}", "refuses this conversation: Roles"),
        ("{{ messages.append(1) }}", "is unsafe|refuses this"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ dict.update(messages[0], role='x') }}", "refuses this conversation"),
        ("{% set n = namespace(__init__=1) %}", "must not begin with _"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "must not begin with _"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ 1 + messages[0].content }}", "refuses this conversation"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_misbehaves_is_one_sentence(source, sentence):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match=sentence) as caught:
        ChatTemplate(source).render(messages)
    assert "\n" not in str(caught.value)
    assert messages == [{"role": "user", "content": "x"}]


def test_what_is_no_json_is_refused():
    with pytest.raises(ValueError, match="plain JSON"):
        ChatTemplate(PLAIN).render([{"role": "user", "content": object()}])


def test_what_a_template_reads():
    assert "enable_thinking" in ChatTemplate(TEMPLATES["thinking"]).reads
    assert "enable_thinking" not in ChatTemplate(PLAIN).reads


def write(folder, **files):
    for name, content in files.items():
        path = folder / {"jinja": "chat_template.jinja", "json": "chat_template.json"}.get(name, f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


NAMED = [{"name": "rag", "template": "no"}, {"name": "default", "template": "from config"}]


def test_a_folder_equals_transformers(tmp_path):
    write_chat_files(tmp_path, tokenizer(), TEMPLATES["tools"])
    options = {"tools": [WEATHER], "add_generation_prompt": True}
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHATS["calls"], tokenize=False, **options)
    assert ChatTemplate.load(tmp_path).render(CHATS["calls"], **options) == theirs


@pytest.mark.parametrize("value", ["from config", NAMED])
def test_the_places_of_a_template(tmp_path, value):
    """The order in which places of a template are searched, as in transformers."""
    write(tmp_path, tokenizer_config={"chat_template": value})
    assert ChatTemplate.load(tmp_path).source == "from config"
    write(tmp_path, json={"chat_template": "from json"})
    assert ChatTemplate.load(str(tmp_path)).source == "from json"
    write(tmp_path, jinja="from {{ eos_token }}\n")
    assert ChatTemplate.load(tmp_path).render([]) == "from "


def test_special_tokens_are_texts_or_objects(tmp_path):
    tokens = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None, "unk_token": "?"}
    write(
        tmp_path,
        jinja="{{ eos_token }}{{ unk_token }}{{ bos_token }}",
        tokenizer_config={"add_bos_token": False} | tokens,
    )
    assert ChatTemplate.load(tmp_path).render([]) == "<|im_end|>?"


@pytest.mark.parametrize(
    "files, sentence",
    [
        ({}, "has no chat template .*: add one, or use `qwen3next generate`, which continues plain text"),
        ({"tokenizer_config": {"chat_template": None}}, "has no chat template"),
        ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}}, r"named \['rag'\], but none"),
        ({"tokenizer_config": {"chat_template": 3}}, "must be text"),
        ({"tokenizer_config": "{"}, "is not a tokenizer"),
        ({"tokenizer_config": []}, "must hold a JSON object"),
        ({"jinja": "{% if %}"}, "broken at line 1"),
    ],
)
def test_damaged_folders_are_one_sentence(tmp_path, files, sentence):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=sentence):
        ChatTemplate.load(tmp_path)


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        ChatTemplate.load(tmp_path)


ASKS = PLAIN.replace(
    "{{ message.content }}",
    """{{ message.content or "" }}{% for call in message.tool_calls or [] %}
{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}
{{ call.function.arguments | tojson }}{% endif %}{% endfor %}""",
)
ITEMS = PLAIN.replace(
    "{{ message.content }}",
    """{{ message.content or "" }}{% for call in message.tool_calls or [] %}
{% for name, value in call.function.arguments | items %}<{{ name }}>{{ value }}{% endfor %}{% endfor %}""",
)


def called(arguments):
    function = {"name": "weather", "arguments": arguments}
    call = {"type": "function", "id": "1", "function": function}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]


@pytest.mark.parametrize("source", [TEMPLATES["tools"], ITEMS], ids=["tojson", "items"])
def test_arguments_as_json_text_are_the_object(source):
    """Arguments of tool calls as JSON text, as in OpenAI's interface."""
    arguments, messages = {"city": "Zürich", "days": 2}, called(json.dumps({"city": "Zürich", "days": 2}))
    system = [{"role": "system", "content": "s"}]
    want = theirs(source, system + called(arguments))
    assert ChatTemplate(source, special_tokens=TOKENS).render(system + messages) == want
    assert messages == called(json.dumps(arguments))
    assert ChatTemplate(ITEMS).render(called("")) == ChatTemplate(ITEMS).render(called({}))


def test_a_template_that_reads_json_text_gets_it_as_it_is():
    for arguments in ('{"a":1}', {"a": 1}):
        assert ChatTemplate(ASKS).render(called(arguments)) == theirs(ASKS, called(arguments))


@pytest.mark.parametrize("arguments, sentence", [("{", "which are not JSON"), ("[1]", "which are not a JSON object")])
def test_arguments_that_are_none(arguments, sentence):
    with pytest.raises(ValueError, match=r"Message 2 has tool_calls\[0\] with arguments .*" + sentence):
        ChatTemplate(ITEMS).render(called(arguments))


LATE = [
    {"role": "system", "content": "One."},
    {"role": "system", "content": "Two."},
    {"role": "user", "content": "x"},
    {"role": "system", "content": [{"type": "text", "text": "Three."}]},
]


def test_late_and_several_system_messages():
    """System messages at any place that the template supports; one that it omits or refuses is an error."""
    assert ChatTemplate(PLAIN).render(LATE[:3]) == theirs(PLAIN, LATE[:3])
    drops = PLAIN.replace("%}\n<", "%}{% if loop.first or message.role != 'system' %}\n<", 1)
    drops = drops.replace("<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor")
    assert "One." in ChatTemplate(drops).render(LATE[::2])
    for messages, number in ((LATE[:3], 2), (LATE[2:], 2)):
        with pytest.raises(ValueError, match=f"Message {number} has role 'system', which the chat template ignores"):
            ChatTemplate(drops).render(messages)
    refuses = (
        "{% if messages[1:] | selectattr('role', 'equalto', 'system') | list %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"conversation: no \(Message 2 is a system message"):
        ChatTemplate(refuses).render(LATE)
