"""`qwen3next ask` and `Document`: one prefill and many questions, in the same and in a later process."""

import functools
import io
import re
import sys

import pytest
import torch
from chatting import PLAIN, PREFILLED, tokenizer, write_chat_files
from conftest import small_model

import qwen3next as q
from qwen3next import cli
from qwen3next.chat.template import ChatTemplate

BOOK = "It was a dark night. " * 30


@pytest.fixture
def folder(tmp_path):
    """A small random checkpoint whose replies are printable text."""
    coder = tokenizer(ascii_only=True)
    small_model(vocab_size=coder.get_vocab_size()).save_pretrained(tmp_path / "model")
    write_chat_files(tmp_path / "model", coder, PLAIN)
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    return tmp_path


@pytest.fixture
def ask(folder, monkeypatch, capsys):
    """Run the command; returns status, stdout, stderr."""

    def run(*args, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        begin = ["ask", str(folder / "model"), "--file", str(folder / "book.txt"), "--max-new-tokens", "5"]
        status = cli.main([*begin, *map(str, args)])
        return status, *capsys.readouterr()

    return run


def cold(folder, question, *, plain=False, system=None):
    """The answer without a prefix store or a cache of the document."""
    model, coder = q.load(folder / "model"), tokenizer(ascii_only=True)
    system = [{"role": "system", "content": system}] if system else []
    text = BOOK + question
    if not plain:
        message = {"role": "user", "content": f"{BOOK.rstrip()}\n\n{question}"}
        text = ChatTemplate.load(folder / "model").render([*system, message])
    ids = torch.tensor([coder.encode(text, add_special_tokens=False).ids])
    new = q.generate(model, ids, max_new_tokens=5)[0, ids.shape[1] :]
    return coder.decode(new.tolist(), skip_special_tokens=True) + "\n"


def known(err):
    """Tokens known of the document and of each question."""
    return [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of them cached", err)]


def test_a_document_is_read_once_and_for_all(ask, folder):
    status, out, err = ask("--question", "Who?", "--question", "Where was it?")
    assert (status, out) == (0, cold(folder, "Who?") + cold(folder, "Where was it?"))
    at_first = known(err)
    assert at_first[0] == 0
    assert min(at_first[1:]) > len(BOOK) - 10
    status, out, err = ask(stdin="Where was it?\n\nWhen?\n")
    assert (status, out) == (0, cold(folder, "Where was it?") + cold(folder, "When?"))
    assert known(err)[0] > len(BOOK) - 10
    assert (folder / "cache" / "qwen3next" / "prefixes").is_dir()


def test_options(ask, folder):
    assert ask("--question", "Who?", "--quiet") == (0, cold(folder, "Who?"), "")
    assert ask("--question", "Who?", "--quiet", "--system", "Be brief.")[1] == cold(folder, "Who?", system="Be brief.")
    assert ask("--question", " Then ", "--quiet", "--plain")[1] == cold(folder, " Then ", plain=True)
    assert ask("--question", "Who?", "--quiet", "--chunk-size", 64, "--store", folder / "else")[:2] == (
        0,
        cold(folder, "Who?"),
    )
    assert (folder / "else").is_dir()
    before = sorted(folder.rglob("*"))
    assert ask("--question", "Whose?", "--quiet", "--store", "none")[1] == cold(folder, "Whose?")
    assert sorted(folder.rglob("*")) == before
    assert ask("--question", "Who?", "--quiet", "--kv-dtype", "int8")[0] == 0
    assert ask("--question", "Who?", "--quiet", "--context-factor", 2)[0] == 0
    sampled = [ask("--question", "Who?", "--quiet", "--temperature", 1, "--seed", n)[1] for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_tokens_are_chosen_as_in_generate(ask):
    """Bans, bias and grammars: the options of `generate` and `chat`."""
    first = ask("--question", "Who?", "--quiet")[1][0]
    token = tokenizer(ascii_only=True).token_to_id(first)
    for options in (("--ban", token), ("--logit-bias", f"{token}=-1e9")):
        said = ask("--question", "Who?", "--quiet", *options)[1]
        assert said.strip()
        assert first not in said
    status, _, err = ask("--question", "Who?", "--logit-bias", "a:3")
    assert status == 2
    assert "is not TOKEN=NUMBER" in err


def test_an_answer_follows_a_grammar(ask, folder):
    """And begins behind the thinking that the prompt opens: none of it is left in five tokens."""
    pytest.importorskip("llguidance")
    assert re.fullmatch(r"[0-9]{3}\n", ask("--question", "When?", "--quiet", "--regex", "[0-9]{3}")[1])
    write_chat_files(folder / "model", tokenizer(ascii_only=True), PREFILLED)
    free = ask("--question", "When?", "--quiet")[1]
    assert free.startswith("<think>")
    assert ask("--question", "When?", "--quiet", "--regex", "[0-9]{3}")[1] == free


def test_without_a_template_the_text_goes_on(ask, folder):
    (folder / "model" / "chat_template.jinja").unlink()
    assert ask("--question", "And ", "--quiet")[1] == cold(folder, "And ", plain=True)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--question", " "), "--question is empty"),
        (("--question", "x", "--memory", "1kB"), "cannot hold one state"),
        (("--question", "x", "--memory", "much"), "is not a size"),
        (("--question", "x", "--chunk-size", 0), "chunk_size must be at least 1"),
        (("--question", "x", "--context-factor", 0.5), "must be at least 1"),
        (("--question", "x", "--plain", "--system", "y"), "system and variables need a chat template"),
    ],
)
def test_bad_options_get_a_sentence(ask, args, sentence):
    status, out, err = ask(*args)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") <= 2


@pytest.mark.parametrize(("content", "sentence"), [(b"", "document is empty"), (b"\xff\xfe", "not UTF-8")])
def test_bad_files_get_a_sentence(ask, folder, content, sentence):
    (folder / "book.txt").write_bytes(content)
    status, _, err = ask("--question", "x")
    assert status == 2
    assert sentence in err
    (folder / "book.txt").unlink()
    assert ask("--question", "x")[0] == 2


def test_a_killed_reading_goes_on_where_it_was(ask, folder, monkeypatch):
    """Prefilled parts are on disk after a kill; the spacing of states is small for this test."""
    monkeypatch.setattr("qwen3next.commands.ask.PrefixStore", functools.partial(q.PrefixStore, spacing=128))
    real, calls = q.PrefixStore.add, []

    def killed(self, cache):
        calls.append(cache.lengths[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, cache)

    monkeypatch.setattr(q.PrefixStore, "add", killed)
    assert ask("--question", "Who?")[0] == 130
    monkeypatch.setattr(q.PrefixStore, "add", real)
    status, out, err = ask("--question", "Who?")
    assert (status, out) == (0, cold(folder, "Who?"))
    assert known(err)[0] == 256


def test_from_python(folder):
    model = q.load(folder / "model")
    document = q.Document(model, tokenizer(ascii_only=True), BOOK, template=ChatTemplate.load(folder / "model"))
    assert list(document.read())[-1] == (document.tokens, document.tokens)
    answers = ["".join(text for _, text in document.answer(x, max_new_tokens=5)) for x in ("Who?", "Why?")]
    assert answers == [cold(folder, "Who?").rstrip("\n"), cold(folder, "Why?").rstrip("\n")]
    assert document.stats.reused >= document.tokens
    with pytest.raises(ValueError, match="question is empty"):
        next(document.answer(""))
