"""Thinking and answer are separated for every way to cut the tags into pieces."""

import pytest

from qwen3next.chat.thinking import ThinkingSplitter

# text, whether the prompt opened the thinking, thinking, answer
CASES = {
    "both": ("<think>\nfirst\n\nsecond\n</think>\n\nThe answer.\n", False, "first\n\nsecond", "The answer.\n"),
    "opened": ("first\n</think>\n\nanswer", True, "first", "answer"),
    "opened twice": ("\n<think>\nfirst</think>answer", True, "first", "answer"),
    "no thinking": ("\n answer\n", False, "", "\n answer\n"),
    "empty thinking": ("<think>\n\n</think>\n\nanswer", False, "", "answer"),
    "opened and closed at once": ("</think>\n\nanswer", True, "", "answer"),
    "unclosed": ("<think>\nfirst </thin", False, "first </thin", ""),
    "unopened": ("a </think> b", False, "", "a </think> b"),
    "later tags are text": ("<think>a</think>Write <think> and </think>.", False, "a", "Write <think> and </think>."),
    "answer before": ("So <think>a</think>", False, "", "So <think>a</think>"),
    "almost a tag": ("<thinking> a", False, "", "<thinking> a"),
    "cut within the tag": ("<thi", False, "", "<thi"),
    "almost closed": ("<think>a </think </think>b", False, "a </think ", "b"),
    "whitespace before": ("\n <think>a</think>b", False, "a", "b"),
    "nothing": ("", False, "", ""),
}


def split(pieces, opened):
    """The pieces joined by kind; all thinking must come before the answer."""
    splitter = ThinkingSplitter(opened=opened)
    given = [pair for text in pieces for pair in splitter.push(text)] + splitter.finish()
    assert all(text for _, text in given)
    kinds = [kind for kind, _ in given]
    assert kinds == sorted(kinds, reverse=True)
    return tuple("".join(text for k, text in given if k == kind) for kind in ("thinking", "answer"))


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_cut_it(case):
    text, opened, *expected = CASES[case]
    cuts = [[text], list(text)]
    cuts += [[text[:i], text[i:]] for i in range(len(text) + 1)]
    cuts += [[text[:i], text[i:j], text[j:]] for i in range(len(text)) for j in range(i, len(text))]
    for pieces in cuts:
        assert split(pieces, opened) == tuple(expected), pieces


def test_text_does_not_wait_longer_than_a_tag_needs():
    splitter = ThinkingSplitter()
    steps = [splitter.push(x) for x in ["<think>", "\n", "a", "\n", "b </", "x", "</think>", "\n", "c", " <"]]
    assert steps == [
        [],
        [],
        [("thinking", "a")],
        [],  # may be the newline before the closing tag
        [("thinking", "\nb ")],
        [("thinking", "</x")],
        [],
        [],
        [("answer", "c")],
        [("answer", " <")],
    ]
