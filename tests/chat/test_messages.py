"""Histories: changed, saved and loaded completely, or refused with a clear error."""

import json

import pytest

from qwen3next.chat.messages import History, check_messages

EXCHANGE = [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]


def history(*messages, system=None):
    made = History(system=system)
    made.messages = [*made.messages, *messages]
    return made


def test_system_prompt():
    h = history(*EXCHANGE)
    assert h.system is None
    h.set_system("Be brief.")
    h.set_system("Be long.")
    assert h.messages == [{"role": "system", "content": "Be long."}, *EXCHANGE]
    h.reset()
    assert h.messages == [{"role": "system", "content": "Be long."}]
    h.set_system(None)
    assert h.messages == []


def test_undo_takes_back_the_last_exchange():
    tools = [{"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "x"}]
    h = history(*EXCHANGE, {"role": "user", "content": "again"}, *tools, system="s")
    h.undo()
    assert h.messages == [{"role": "system", "content": "s"}, *EXCHANGE]
    h.undo()
    assert h.messages == [{"role": "system", "content": "s"}]
    with pytest.raises(ValueError, match="no message to remove"):
        h.undo()


def test_save_and_load(tmp_path):
    path = tmp_path / "chat.json"
    history(*EXCHANGE, system="s").save(path)
    assert "ä" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
    loaded = History()
    loaded.load(str(path))
    assert loaded.messages == [{"role": "system", "content": "s"}, *EXCHANGE]


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "chat.json"
    history(*EXCHANGE).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        history({"role": "user", "content": object()}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def text(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio"])
def test_pictures_and_sounds_are_refused(kind):
    with pytest.raises(ValueError, match=f"Message 1 has a part of type '{kind}': this model reads text only"):
        check_messages(text({"type": "text", "text": "What is this?"}, {"type": kind, kind: "x.png"}))


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"messages": []}, "must hold a JSON list"),
        (["hello"], "Message 1 must have the form"),
        ([*EXCHANGE, {"content": "x"}], "Message 3 must have the form"),
        ([{"role": "user"}], "Message 1 has no content"),
        ([{"role": "user", "content": 3}], "Message 1 has no content"),
        (text("x"), "part of type 'str'"),
        (text({"image": "x"}), "part of type None"),
        (text({"type": "text"}), "part of type 'text'"),
    ],
)
def test_bad_files_leave_the_history(tmp_path, values, sentence):
    path, h = tmp_path / "chat.json", history(*EXCHANGE)
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=sentence) as caught:
        h.load(path)
    assert "chat.json" in str(caught.value)
    assert h.messages == EXCHANGE


@pytest.mark.parametrize("content", [b"{", b"\xff", None])
def test_what_is_no_json_is_one_sentence(tmp_path, content):
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"chat.json (is not a saved conversation|does not exist)"):
        History().load(path)


def test_parts_of_text_are_allowed():
    check_messages(text({"type": "text", "text": "a"}, {"type": "text", "text": "b"}))
