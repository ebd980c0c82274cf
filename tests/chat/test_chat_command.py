"""`qwen3next chat`: output on stdout and stderr, commands, and a real terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from chatting import PLAIN, PREFILLED, THINKING, scripted, tokenizer, write_chat_files

import qwen3next
from qwen3next import Qwen3Next, cli, presets
from qwen3next.commands import common
from qwen3next.commands.interrupt import patient_ctrl_c

ROOT = Path(qwen3next.__file__).parents[1]
END = "<|im_end|>"


@pytest.fixture
def chat(tmp_path, monkeypatch, capsys):
    """Run the command with these replies; returns status, stdout, stderr."""

    def run(*args, replies=(), stdin="", template=PLAIN, generation=()):
        coder = tokenizer()
        write_chat_files(tmp_path / "model", coder, template, **dict(generation))
        model = scripted(coder, *(text + END for text in replies))
        monkeypatch.setattr(common, "load", lambda *_, **__: model)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = cli.main(["chat", str(tmp_path / "model"), *map(str, args)])
        return status, *capsys.readouterr()

    return run


THOUGHT = "<think>\nhm\n</think>\n\nFour."


def test_one_message(chat):
    status, out, err = chat("--message", "2 + 2?", replies=[THOUGHT])
    assert (status, out) == (0, "<think>\nhm\n</think>\n\nFour.\n")
    assert re.fullmatch(r"\d+ prompt tokens, 0 of them in the cache, in .* s; \d+ new, .* tok/s\n", err)
    assert chat("--message", "2 + 2?", "--quiet", "--thinking=hide", replies=[THOUGHT]) == (0, "Four.\n", "")


def test_thinking_that_is_cut_ends_in_a_line_of_its_own(chat):
    options = ["--message", "x", "--quiet", "--max-new-tokens", "3"]
    assert chat(*options, replies=["abcdef"], template=PREFILLED)[1] == "<think>\nabc\n</think>\n"
    assert chat(*options, "--thinking=hide", replies=["abcdef"], template=PREFILLED)[1] == ""


def test_tokens_are_chosen_as_in_generate(chat):
    """Penalties, bias, bans and grammars; what is not given stays as generation_config.json has it."""
    first = tokenizer().token_to_id("a")
    ask = ["--message", "x", "--quiet", "--max-new-tokens", "9"]
    assert chat(*ask, replies=["abc"])[1] == "abc\n"
    assert "a" not in chat(*ask, "--ban", first, replies=["abc"])[1]
    assert "a" not in chat(*ask, "--logit-bias", f"{first}=-1e9", replies=["abc"])[1]
    assert "a" not in chat(*ask, "--min-new-tokens", 2, replies=["abc"], generation={"suppress_tokens": [first]})[1]
    status, _, err = chat(*ask, "--logit-bias", "a:3", replies=["abc"])
    assert (status, err.count("\n")) == (2, 1)
    assert "is not TOKEN=NUMBER" in err


def test_a_grammar_begins_behind_the_thinking_that_the_prompt_opens(chat):
    pytest.importorskip("llguidance")
    ask = ["--message", "x", "--quiet", "--regex", "[0-9]{3}", "--max-new-tokens", "30"]
    assert re.fullmatch("[0-9]{3}\n", chat(*ask, replies=["abc"])[1])
    thinking = chat(*ask, replies=["hm</think>abc"], template=PREFILLED)[1]
    assert re.fullmatch(r"<think>\nhm\n</think>\n\n[0-9]{3}\n", thinking)


def test_each_line_of_a_script_is_a_message(chat, tmp_path):
    script = 'one\n\n"""two\n  lines\n"""\n /slash\n/system Be brief.\n/save ' + f"{tmp_path / 'chat.json'}\n"
    status, out, err = chat(stdin=script, replies=["1", "2\n", THOUGHT])
    assert (status, out) == (0, "1\n2\n<think>\nhm\n</think>\n\nFour.\n")
    assert "Messages in the conversation: 7\n" in err
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two\n  lines"},
        {"role": "assistant", "content": "2\n"},
        {"role": "user", "content": " /slash"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "hm"},
    ]


def test_commands_change_the_history(chat, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    script = f"a\nb\n/undo\n/save {first}\n/reset\n/help\n/load {first}\nc\n/save {second}\n/exit\nnever\n"
    status, out, err = chat("--system", "s", stdin=script, replies=["1", "2", "3"])
    assert (status, out) == (0, "1\n2\n3\n")
    assert "/undo " in err
    roles = [[m["content"] for m in json.loads(path.read_text(encoding="utf-8"))] for path in (first, second)]
    assert roles == [["s", "a", "1"], ["s", "a", "1", "c", "3"]]


def test_options_of_the_template_and_of_sampling(chat):
    status, out, _ = chat("--message", "x", "--think=off", replies=["yes"], template=THINKING)
    assert (status, out) == (0, "yes\n")
    stop = {"do_sample": True, "temperature": 2.0, "eos_token_id": tokenizer().token_to_id("s")}
    assert chat("--message", "x", "--quiet", "--seed=1", replies=["yes"], generation=stop)[1] == "ye\n"


def test_ctrl_c_waits_for_the_token_once(monkeypatch):
    begun = []
    with pytest.raises(KeyboardInterrupt), patient_ctrl_c(lambda: bool(begun)):
        signal.raise_signal(signal.SIGINT)
    begun.append(True)
    with patient_ctrl_c(lambda: bool(begun)) as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "args, stdin, sentence",
    [
        (["--think=on"], "", "does not read enable_thinking: leave --think out"),
        (["--message", " "], "", "--message is empty"),
        (["--max-context=9"], "hello\nnever", "tokens, which leaves no room"),
        (["--max-context=0"], "", "max_context must be at least 1"),
        (["--max-new-tokens=0"], "x\nnever", "max_new_tokens must be at least 1"),
        ([], "/undo\nnever", "no message to remove"),
        ([], "/undoo\nnever", "There is no command /undoo"),
        ([], "/save\nnever", "/save needs a file name"),
        ([], "/save nowhere/chat.json\nnever", "nowhere"),
        ([], "/load nowhere.json\nnever", "nowhere.json does not exist"),
        ([], '"""a\nb', 'starts with """ has no end'),
    ],
)
def test_the_first_error_ends_a_script(chat, args, stdin, sentence):
    status, out, err = chat("--quiet", *args, stdin=stdin, replies=["x"] * 2)
    assert (status, out) == (2, "")
    assert err.startswith("qwen3next: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_folder_without_template(tmp_path, capsys):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert cli.main(["chat", str(tmp_path), "--message", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qwen3next: ")
    assert err.endswith(
        "has no chat template (chat_template.jinja, chat_template.json, or chat_template in "
        "tokenizer_config.json): add one, or use `qwen3next generate`, which continues plain text.\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with printable tokens that never ends a reply."""
    torch.manual_seed(0)
    path, coder = tmp_path_factory.mktemp("models") / "tiny", tokenizer(ascii_only=True)
    model = Qwen3Next(presets.tiny(vocab_size=coder.get_vocab_size(), initializer_range=0.1, eos_token_id=None))
    with torch.no_grad():
        model.embed_tokens.weight[-4:] = 0
    model.save_pretrained(path)
    write_chat_files(path, coder, PLAIN)
    return path


class Terminal:
    """The command on a new terminal, with its output that no test has read yet."""

    def __init__(self, *args):
        self.main, other = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qwen3next.cli", "chat", *map(str, args)]
        # In a new session this becomes the controlling terminal, so that Ctrl-C becomes SIGINT.
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(other)
        self.shown = ""

    def type(self, text):
        os.write(self.main, text.encode())

    def until(self, pattern, seconds=90):
        """The output up to and including the pattern."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, self.shown
            if select.select([self.main], [], [], 0.2)[0]:
                self.shown += os.read(self.main, 65536).decode()
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text


def test_a_terminal(folder, tmp_path):
    """Prompt, Ctrl-C during a reply, which is kept; an error; several lines; Ctrl-C at the prompt; Ctrl-D."""
    terminal = Terminal(folder, "--max-new-tokens", "5000")
    try:
        terminal.until(">>> ")
        terminal.type("Hello\n")
        terminal.until(r"Hello\r\n[^\r]*[!-~]{20}")  # the reply has started
        terminal.type("\x03")
        assert ", stopped" in terminal.until(">>> ")
        terminal.type(f"/save {tmp_path / 'chat.json'}\n")
        terminal.until("Messages in the conversation: 2.*\n>>> ")
        user, reply = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
        assert user["content"] == "Hello"
        assert len(reply["content"]) >= 20
        terminal.type("/nothing\n")
        terminal.until("There is no command /nothing.*\n>>> ")
        terminal.type('"""two\nlines"""\n')
        terminal.until(r"\.\.\. lines")
        terminal.until(r"\n[^\r]*[!-~]{5}")
        terminal.type("\x03")
        terminal.until(r"[1-9]\d* of them in the cache.*, stopped.*\n>>> ")
        terminal.type("forgotten")
        terminal.until("forgotten")
        time.sleep(0.5)  # Python notices a Ctrl-C between two waits for a key only at the next key
        terminal.type("\x03")
        terminal.until(">>> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.main)


def test_ctrl_c_outside_a_terminal_ends_the_command(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qwen3next.cli", "chat", str(folder), "--message", "x", "--max-new-tokens=9999"]
    process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"\n"
    assert process.returncode == 130
