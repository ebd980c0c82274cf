"""The command line: output, one-sentence errors, exit status."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import qwen3next
from layers.dispatch.backends import choose
from qwen3next import Qwen3Next, cli, presets
from qwen3next.commands import common

ROOT = Path(qwen3next.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny checkpoint whose tokens are bytes, so its text has much invalid UTF-8."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny"
    Qwen3Next(presets.tiny(initializer_range=0.1)).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def expected(folder, prompt, new, **options):
    """The continuation, computed with `generate` and the tokenizer only."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    model = qwen3next.load(folder)
    out = qwen3next.generate(model, torch.tensor([ids]), max_new_tokens=new, **options)
    return tokenizer.decode(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 3}])
def test_generate_prints_what_generate_makes(folder, capsys, options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert cli.main(["generate", str(folder), "--prompt", "Grüße", "--max-new-tokens", "40", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.removesuffix("\n") == expected(folder, "Grüße", 40, **options)
    assert "6 prompt tokens" not in err  # ü and ß are two bytes each
    assert "7 prompt tokens" in err
    assert " new in " in err
    assert "tok/s (cpu, float32)" in err


def test_generate_reads_file_and_stdin_alike(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once", encoding="utf-8")
    command = ["generate", str(folder), "--max-new-tokens", "5", "--quiet"]
    assert cli.main([*command, "--file", str(tmp_path / "prompt.txt")]) == 0
    from_file = capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once"))
    assert cli.main(command) == 0
    assert capsys.readouterr() == from_file
    assert from_file.err == ""


def test_generate_stops(folder, capsys):
    text = expected(folder, "Once", 30)
    mark = next(c for c in text if c.isascii() and c.isprintable())
    command = ["generate", str(folder), "--prompt", "Once", "--max-new-tokens", "30"]
    assert cli.main([*command, "--stop", "never", "--stop", mark]) == 0
    assert capsys.readouterr().out == text[: text.index(mark)] + "\n"
    first = int(qwen3next.generate(qwen3next.load(folder), torch.tensor([[5]]), max_new_tokens=1)[0, 1])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    command = ["generate", str(folder), "--prompt", tokenizer.decode([5]), "--stop-tokens", str(first)]
    assert cli.main(command) == 0
    assert ", 1 new in" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["preset", "folder", "file"])
def test_inspect(folder, capsys, form):
    target = {"preset": "tiny", "folder": str(folder), "file": str(folder / "config.json")}[form]
    assert cli.main(["inspect", target]) == 0
    out = capsys.readouterr().out
    assert "3 x Gated DeltaNet" in out
    assert "linear_attn.in_proj_qkv.weight" in out
    assert "1,048,576" in out


def test_inspect_hooks(capsys):
    assert cli.main(["inspect", "tiny", "--hooks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(Qwen3Next(presets.tiny()).hook_dict)


def test_explain(folder, capsys):
    assert cli.main(["explain", "qwen3_next_80b_a3b", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("on cpu, in bfloat16:")
    here = choose("delta_rule", "auto", torch.zeros(1, dtype=torch.bfloat16))  # with a compiler "cpp"
    assert re.search(rf"^delta_rule +{here} ", out, re.MULTILINE)
    assert cli.main(["explain", str(folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("on cpu, in float32:")


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["inspect", "nowhere"], "'nowhere' is neither a folder nor a config.json. There is no preset"),
        (["inspect", "{tmp}"], "config.json does not exist"),
        (["explain", "tiny", "--device", "gpu"], "'gpu' is not a device"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not a folder"),
        (["generate", "{tmp}", "--prompt", "x"], "tokenizer.json does not exist"),
        (["generate", "{folder}", "--prompt", ""], "qwen3next: The prompt is empty"),
        (["generate", "{folder}", "--prompt", "x", "--file", "y"], "choose one"),
        (["generate", "{folder}", "--file", "{tmp}/no.txt"], "no.txt"),
        (["generate", "{folder}", "--prompt", "x", "--temperature", "-1"], "must not be negative"),
        (
            ["generate", "{folder}", "--prompt", "x", "--max-new-tokens", "0"],
            "max_new_tokens must be at least 1",
        ),
    ],
)
def test_errors_are_one_sentence(args, sentence, folder, tmp_path, capsys):
    filled = [arg.replace("{tmp}", str(tmp_path)).replace("{folder}", str(folder)) for arg in args]
    assert cli.main(filled) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qwen3next: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_damaged_tokenizer_is_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert cli.main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "tokenizer.json is not a tokenizer" in capsys.readouterr().err


def test_interrupt(folder, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load", interrupted)
    assert cli.main(["generate", str(folder), "--prompt", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: qwen3next {command} ")
    assert f"$ qwen3next {command} " in out


def test_help_fits_a_screen_and_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(f"• {command}" in out for command in cli.COMMANDS)
    assert "`qwen3next COMMAND --help`" in out
    assert out.count("\n") < 50


def test_a_misspelt_command_is_told_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["inspct", "tiny"])
    assert end.value.code == 2
    assert "inspect" in capsys.readouterr().err


def test_a_command_chooses_its_exit_status(monkeypatch):
    def differs(same: bool = False) -> int:
        """Return the result as the exit status."""
        return 0 if same else 1

    monkeypatch.setitem(cli.COMMANDS, "differs", differs)
    assert cli.main(["differs"]) == 1
    assert cli.main(["differs", "--same"]) == 0


def run(*args, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen([sys.executable, "-m", "qwen3next.cli", *args], env=environment, **options)


def test_in_its_own_process(folder):
    process = run("generate", str(folder), "--max-new-tokens", "8", stdin=-1, stdout=-1, stderr=-1)
    out, err = process.communicate("Grüße".encode(), timeout=120)
    assert process.returncode == 0, err
    assert out.decode("utf-8").removesuffix("\n") == expected(folder, "Grüße", 8)


def test_a_closed_pipe_and_ctrl_c_are_silent(folder):
    process = run("generate", str(folder), "--prompt", "x", "--max-new-tokens", "20000", stdout=-1, stderr=-1)
    assert process.stdout is not None
    process.stdout.read(1)  # generation has started
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    told = err.decode().splitlines()
    assert [line for line in told if "torch's own operations run" not in line] == [""]  # on a CPU without kernels
    process = run("inspect", "tiny", stdout=-1, stderr=-1)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_context(capsys):
    assert cli.main(["context", "qwen3_next_80b_a3b", "--tokens", "256k", "--tokens", "4096"]) == 0
    out = capsys.readouterr().out
    assert "262,144" in out
    assert "6.07 GiB" in out
    assert "4,096" in out
    assert "longest context: 262,144 tokens" in out
    assert cli.main(["context", "tiny", "--tokens", "many"]) == 2
    assert "'many' is not a number of tokens" in capsys.readouterr().err


def test_generate_as_json_with_drafts_grammar_and_log_probabilities(folder, capsys):
    """The object holds what `Generation` gives; drafts change the counts alone."""
    command = ["generate", str(folder), "--prompt", "Once", "--max-new-tokens", "12", "--quiet", "--json"]
    found = []
    for draft_tokens in ("0", "2", "auto"):
        flags = ["--temperature", "1", "--seed", "3", "--logprobs", "2", "--draft-tokens", draft_tokens]
        assert cli.main([*command, *flags, "--logit-bias", "5=1.5", "--ban", "7", "--repetition-penalty", "1.2"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for other in found[1:]:
        assert other["texts"] == found[0]["texts"]
    (text,) = found[0]["texts"]
    assert len(text["tokens"]) == len(text["logprobs"]) == len(text["top_logprobs"])
    assert 7 not in text["tokens"]
    assert all(len(top) == 2 for top in text["top_logprobs"])
    assert found[1]["drafts"]["drafted"]
    assert set(found[0]["seconds"]) == {"first_token", "all"}


def test_generate_under_a_grammar(folder, capsys, tmp_path):
    schema = {"type": "integer", "minimum": 10, "maximum": 99}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "grammar.lark").write_text('start: "ab" | "cd"')
    command = ["generate", str(folder), "--prompt", "Once", "--quiet", "--stop-tokens", "256"]
    for flags, pattern in (
        (["--json-schema", str(tmp_path / "schema.json")], r"[1-9][0-9]"),
        (["--regex", "x{3}"], "xxx"),
        (["--grammar", str(tmp_path / "grammar.lark")], "ab|cd"),
    ):
        assert cli.main([*command, *flags]) == 0
        assert re.fullmatch(pattern, capsys.readouterr().out.strip())


def test_generate_several_texts_and_beams(folder, capsys):
    command = ["generate", str(folder), "--prompt", "Once", "--max-new-tokens", "4", "--quiet", "--n", "2"]
    assert cli.main([*command, "--temperature", "1", "--seed", "1"]) == 0
    assert capsys.readouterr().out.count("--- text") == 2
    assert cli.main([*command, "--beams", "3", "--json"]) == 0
    scores = [text["score"] for text in json.loads(capsys.readouterr().out)["texts"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--logit-bias", "5:1"], "is not TOKEN=NUMBER"),
        (["--regex", "a", "--grammar", "g.lark"], "exclude each other"),
        (["--json-schema", "missing.json"], "missing.json"),
        (["--beams", "2", "--temperature", "1"], "--beams takes no temperature"),
        (["--draft-tokens", "-1"], "draft_tokens must be a number from 0"),
        (["--min-p", "2"], "min_p must be"),
    ],
)
def test_generate_refuses_bad_choices(folder, capsys, flags, words):
    assert cli.main(["generate", str(folder), "--prompt", "Once", *flags]) == 2
    assert words in capsys.readouterr().err
