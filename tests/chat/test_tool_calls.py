"""Function calls are read in both forms, for every way to cut the reply, and never lost; arguments have their types."""

import json

import pytest

from qwen3next.chat.argument_types import argument
from qwen3next.chat.tool_calls import CallPart, CallSplitter

PROPERTIES = {
    "s": {"type": "string"},
    "n": {"type": "integer"},
    "u": {"anyOf": [{"type": "null"}, {"type": "string"}]},
    "b": {"type": "boolean"},
    "o": {"type": "object"},
    "any": {},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "g"}},
]


def tags(*arguments, name="f"):
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def as_json(arguments, name="f"):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# reply, whether the prompt opened the thinking, thinking, answer, calls (name and arguments as JSON text)
CASES = {
    "tags": (
        "Let me see.\n\n" + tags(("s", "two\nlines "), ("n", "5"), ("b", "True"), ("o", "{'a': None}")),
        False,
        "",
        "Let me see.",
        [("f", '{"s": "two\\nlines ", "n": 5, "b": true, "o": {"a": null}}')],
    ),
    "JSON": (as_json({"s": "x"}), False, "", "", [("f", '{"s": "x"}')]),
    "several": (
        f"{as_json({}, 'g')}\n{tags(('s', 'y'))}\n{tags(name='g')}",
        False,
        "",
        "",
        [("g", "{}"), ("f", '{"s": "y"}'), ("g", "{}")],
    ),
    "text behind": (f"a {tags(name='g')}\n b", False, "", "a b", [("g", "{}")]),
    "behind thinking": (f"hm\n</think>\n\n{tags(('s', 'x'))}", True, "hm", "", [("f", '{"s": "x"}')]),
    "within open thinking": (f"hm {tags(('s', '</think>'))}", True, "hm ", "", [("f", '{"s": "</think>"}')]),
    "only thought of": (
        f"hm {as_json({})} no</think>{as_json({'n': 1})}",
        True,
        f"hm {as_json({})} no",
        "",
        [("f", '{"n": 1}')],
    ),
    "tags within a value": (
        tags(("s", "a </parameter> b </tool_call> <tool_call>\n<function=f>")),
        False,
        "",
        "",
        [("f", '{"s": "a </parameter> b </tool_call> <tool_call>\\n<function=f>"}')],
    ),
    "tags within JSON": (as_json({"s": '"}</tool_call>{'}), False, "", "", [("f", '{"s": "\\"}</tool_call>{"}')]),
    "closing tag of a value is missing": (
        "<tool_call>\n<function=f>\n<parameter=s>\nabc\n<parameter=n>\n7\n</function>\n</tool_call>",
        False,
        "",
        "",
        [("f", '{"s": "abc", "n": 7}')],
    ),
    "closing tags are missing": ("<tool_call>\n<function=f>\n<parameter=n>\n7", False, "", "", [("f", '{"n": 7}')]),
    "opening tag is missing": (tags(("n", "7"))[12:-13] + " so", False, "", "so", [("f", '{"n": 7}')]),
    "other order": ('<tool_call>{"arguments": {"n": 1}, "name": "f"}</tool_call>', False, "", "", [("f", '{"n": 1}')]),
    "JSON within JSON": (
        '<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>',
        False,
        "",
        "",
        [("f", '{"n": 1}')],
    ),
    "as Python writes it": (
        "<tool_call>{'name': 'f', 'arguments': {'b': True}}</tool_call>",
        False,
        "",
        "",
        [("f", '{"b": true}')],
    ),
    "broken arguments": (
        '<tool_call>{"name": "f", "arguments": {"n": oops}}</tool_call> b',
        False,
        "",
        "b",
        [("f", '{"n": oops}')],
    ),
    "unknown function": (tags(("x", "5"), ("y", "five"), name="h"), False, "", "", [("h", '{"x": 5, "y": "five"}')]),
    "no call": (
        "Write <tool_call> and <function=h> like <this.",
        False,
        "",
        "Write <tool_call> and <function=h> like <this.",
        [],
    ),
    "no name": ('<tool_call>{"n": 1}</tool_call>', False, "", '<tool_call>{"n": 1}</tool_call>', []),
}


def split(pieces, *, opened=False, stopped=True):
    splitter, said, calls = CallSplitter(TOOLS, opened=opened), {"thinking": "", "answer": ""}, []
    given = [part for text in pieces for part in splitter.push(text)] + splitter.finish(stopped=stopped)
    for part in given:
        if not isinstance(part, CallPart):
            said[part[0]] += part[1]
        elif part.index == len(calls):
            assert part.name
            calls.append([part.name, part.arguments])
        else:
            assert part.index == len(calls) - 1
            calls[-1][1] += part.arguments
    return said["thinking"], said["answer"], [tuple(call) for call in calls]


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_cut_it(case):
    text, opened, *expected = CASES[case]
    for pieces in ([text], list(text), *([text[:i], text[i:]] for i in range(len(text)))):
        assert split(pieces, opened=opened) == tuple(expected), pieces


def test_a_text_argument_comes_as_it_is_written():
    splitter = CallSplitter(TOOLS)
    head, *_ = splitter.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    assert (head.index, head.name) == (0, "f")
    assert [part.arguments for part in splitter.push("one, ")] == ['"one, ']
    assert [part.arguments for part in splitter.push('"two"\n')] == ['\\"two\\"']
    assert splitter.push("</param") == []
    assert [part.arguments for part in splitter.push("eter>\n</function>")] == ["", '"', "}"]


@pytest.mark.parametrize("form", [tags(("s", "rm -rf /tmp/x")), as_json({"s": "rm -rf /tmp/x"})])
def test_a_call_that_was_cut_off_is_no_valid_json(form):
    """Nobody may take its arguments for complete."""
    for n in range(form.index("rm"), form.index("tmp")):
        _, _, calls = split([form[:n]], stopped=False)
        with pytest.raises(ValueError, match="line 1"):
            json.loads(calls[0][1])


DEFS = {"$defs": {"Size": {"type": "integer"}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]}}}


@pytest.mark.parametrize(
    "text, schema, value",
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("-1e3", {"type": "number"}, -1000.0),
        ("NaN", {"type": "number"}, "NaN"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": "integer", "nullable": True}, None),
        ("7", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 7),
        ("seven", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "seven"),
        ("[1, 2]", {"oneOf": [{"anyOf": [{"type": "array"}, {"type": "null"}]}, {"type": "string"}]}, [1, 2]),
        ("['a', None]", {"type": "array"}, ["a", None]),
        ('{"a": {"b": [true]}}', {"type": "object"}, {"a": {"b": [True]}}),
        ("{'a': {'b': True}}", {"properties": {"a": {}}}, {"a": {"b": True}}),
        ("{1, 2}", {"type": "object"}, "{1, 2}"),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"enum": [1, 2]}, 2),
        ("x", {"const": "x"}, "x"),
        ("3", {"$ref": "#/$defs/Size"}, 3),
        ("3", {"$ref": "#/$defs/Loop"}, 3),
        ("3", {"$ref": "#/$defs/Missing"}, 3),
        ("3", {"allOf": [{"type": ["integer", "string"]}, {"type": "string"}]}, "3"),
        ("3", {"type": "int"}, 3),
        ("{'a': 1}", {"type": "dict"}, {"a": 1}),
        ("3", {"type": "whatever"}, 3),
        ("3", {}, 3),
        ("three", {}, "three"),
        ("null", None, None),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ],
)
def test_arguments_have_the_types_of_the_schema(text, schema, value):
    found = argument(text, schema, DEFS)
    assert (found, type(found)) == (value, type(value))
