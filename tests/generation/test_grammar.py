"""Texts under a grammar, through llguidance."""

import json
import re
import sys

import pytest
import torch
from conftest import small_model
from test_speculation import letters

import qwen3next as q
from qwen3next.generation.generate import Generation
from qwen3next.generation.grammar import Grammar, token_table

STOP = 96


@pytest.fixture(scope="module")
def model():
    return small_model()


def written(model, grammar, **options):
    """The new text of a generation, and whether it ended by the stop token."""
    run = Generation(model, torch.tensor([[3, 5, 7]]), grammar=grammar, stop_tokens=[STOP], **options)
    for _ in run:
        pass
    new = run.rows[0].text[3:]
    return "".join(chr(33 + t) for t in new if t < 94), new[-1] == STOP


@pytest.mark.parametrize("seed", range(3))
def test_a_regex_is_matched(model, seed):
    text, ended = written(
        model, Grammar.regex("[a-z]{3,8}=[0-9]+", letters(), stop_tokens=[STOP]), temperature=1.0, seed=seed
    )
    assert not ended or re.fullmatch("[a-z]{3,8}=[0-9]+", text)
    assert re.match("[a-z]{3,8}=[0-9]", text)


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_schema_is_followed(model, draft_tokens):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
        "required": ["n", "on"],
        "additionalProperties": False,
    }
    options = {"x-guidance": {"whitespace_flexible": False}}
    grammar = Grammar.json_schema(schema | options, letters(), stop_tokens=[STOP])
    text, ended = written(model, grammar, temperature=1.0, seed=1, max_new_tokens=60, draft_tokens=draft_tokens)
    assert ended
    found = json.loads(text)
    assert 0 <= found["n"] <= 99
    assert isinstance(found["on"], bool)


def test_a_context_free_grammar_is_followed(model):
    grammar = Grammar.lark('start: "a" start "b" | "c"', letters(), stop_tokens=[STOP])
    text, ended = written(model, grammar, temperature=2.0, seed=4, max_new_tokens=80)
    assert ended
    assert re.fullmatch("a*cb*", text)
    assert text.count("a") == text.count("b")


def test_what_stands_before_the_grammar_is_free(model):
    free, _ = written(model, None)
    marker = ord(free[4]) - 33
    text, _ = written(model, Grammar.regex("[0-9]*", letters(), stop_tokens=[STOP], after=[marker]), max_new_tokens=30)
    before, _, behind = text.partition(free[4])
    assert before == free[: free.index(free[4])]
    assert behind.isdigit()


def test_states_are_not_modified(model):
    grammar = Grammar.regex("ab|cd", letters(), stop_tokens=[STOP])
    start, (a, c, d) = grammar.start(), (ord(x) - 33 for x in "acd")
    assert start.allowed(97).nonzero().flatten().tolist() == [a, c]
    assert start.then(c).allowed(97).nonzero().flatten().tolist() == [d]
    assert start.allowed(97).nonzero().flatten().tolist() == [a, c]
    assert start.allowed(200).shape == (200,)
    assert start.then(c).then(d).allowed(97).nonzero().flatten().tolist() == [STOP]
    with pytest.raises(ValueError, match=f"Token {d} is not in the grammar here"):
        start.then(d)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Grammar.regex("(", letters(), stop_tokens=[STOP]), "regex cannot be followed"),
        (lambda: Grammar.json_schema({"type": "nothing"}, letters(), stop_tokens=[STOP]), "json schema"),
        (lambda: Grammar.lark("start: x", letters(), stop_tokens=[STOP]), "lark"),
        (lambda: Grammar.regex("a", letters()), "needs a token that ends the text"),
    ],
)
def test_bad_grammars_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_one_token_table_serves_many(model):
    table = token_table(letters(), stop_tokens=[STOP])
    assert written(model, Grammar.regex("x", table))[0] == "x"
    assert written(model, Grammar.regex("y", table))[0] == "y"


def test_without_llguidance_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'qwen3next\[grammar\]'"):
        Grammar.regex("a", letters(), stop_tokens=[STOP])


def test_a_batch_has_a_grammar_a_row(model):
    ids = torch.tensor([[3, 5, 7], [9, 9, 9]])
    grammar = Grammar.regex("[a-c]{4}", letters(), stop_tokens=[STOP])
    both = q.generate(model, ids, grammar=grammar, stop_tokens=[STOP], max_new_tokens=9)
    for row in both:
        assert re.fullmatch("[a-c]{4}", "".join(chr(33 + t) for t in row[3:].tolist() if t < 94))
