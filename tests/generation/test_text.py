"""Text from byte tokens: incomplete characters are never shown, and shown text never changes."""

import random

import pytest

from qwen3next.generation.text import TextStream


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_no_character_is_shown_before_its_last_byte():
    stream = TextStream(decode)
    steps = [stream.push(byte) for byte in "aé漢🎉".encode()]
    assert steps == ["a", "", "é", "", "", "漢", "", "", "", "🎉"]


@pytest.mark.parametrize("data", ["a漢".encode()[:-1], b"a\xff", "\ufffd".encode(), "a \ufffd\ufffd".encode(), b""])
def test_the_end_is_that_of_decoding_at_once(data):
    """U+FFFD itself, invalid bytes, and an incomplete character."""
    stream = TextStream(decode)
    assert "".join(stream.push(byte) for byte in data) + stream.finish() == decode(list(data))
    assert stream.finish() == ""


def test_a_stop_string_that_only_the_end_completes():
    stream = TextStream(decode, stop=["\ufffd"])
    assert "".join(stream.push(byte) for byte in b"a\xff") + stream.finish() == "a"
    assert stream.stopped


@pytest.mark.parametrize("seed", range(20))
def test_equals_decoding_at_once(seed):
    """Random bytes, broken sequences included, over several windows."""
    rng = random.Random(seed)
    data = b"".join(rng.choice([b"a", "é".encode(), "🎉".encode(), rng.randbytes(2)]) for _ in range(200))
    stream, shown = TextStream(decode), ""
    for i, byte in enumerate(data):
        shown += stream.push(byte)
        assert decode(list(data[: i + 1])).startswith(shown)
    assert shown + stream.finish() == decode(list(data))


@pytest.mark.parametrize(
    "text, stop, shown, stopped",
    [
        ("one END two", ("END",), "one ", True),
        ("one EN", ("END",), "one EN", False),  # an incomplete stop string is shown at the end
        ("EEND", ("END",), "E", True),
        ("a\n\nb", ("\n\n", "b"), "a", True),
        ("xyz", ("",), "xyz", False),
    ],
)
def test_stop_strings(text, stop, shown, stopped):
    stream = TextStream(decode, stop=stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        assert "END" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == shown
    assert stream.stopped is stopped
