"""`qwen3next doctor`, `--json` of every command that reports, completion, and the page that documents them."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from test_cli import folder  # noqa: F401  a fixture

import qwen3next
from layers.cpp import build
from qwen3next import Qwen3Next, cli, presets
from qwen3next.commands import doctor

ROOT = Path(qwen3next.__file__).parents[1]
PAGE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")


def by_name(findings):
    return {one.what: one for one in findings}


def test_doctor_reports_this_machine(capsys):
    assert cli.main(["doctor", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] == all(one["state"] != "broken" for one in report["findings"])
    names = [one["what"] for one in report["findings"]]
    assert {"Python", "processor", "C++ kernels", "NVIDIA GPU", "cache folder", "[hf]"} <= set(names)
    assert all(one["bring"] for one in report["findings"] if one["state"] in ("missing", "broken"))
    cli.main(["doctor"])
    assert "[hf]" in capsys.readouterr().out  # no markup


def test_doctor_knows_the_extras_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def listed(lines):
        found = {}
        for line in lines:
            if line.startswith("qwen3next["):
                found |= listed(project["optional-dependencies"][line[10:-1]])
            else:
                name, _, oldest = line.partition(">=")
                found[name] = oldest
        return found

    assert listed(project["dependencies"]) == doctor.REQUIRED
    for extra, (_, packages) in doctor.EXTRAS.items():
        assert listed(project["optional-dependencies"][extra]) == packages
    assert set(project["optional-dependencies"]) - set(doctor.EXTRAS) == {
        "dev",
        "docs",
        "titan",
    }  # titan: in an environment of its own


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"transformers": "5.23.1"}, "ok", "transformers 5.23.1"),
        ({"transformers": "5.9"}, "broken", "transformers 5.9 is older than 5.23"),
        ({}, "missing", "not installed: transformers"),
    ],
)
def test_doctor_compares_versions(monkeypatch, versions, state, words):
    def version(name):
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = doctor._packages("[hf]", "transformers' classes", {"transformers": "5.23"})
    assert found.state == state
    assert words in found.found
    assert (found.bring == "") == (state == "ok")
    assert state == "ok" or found.bring.endswith('-m pip install --upgrade "qwen3next[hf]"')


@pytest.mark.parametrize(
    ("reason", "state", "bring"),
    [
        (None, "ok", ""),
        ("no C++ compiler was found; install g++", "missing", "apt-get install g++"),
        ("the environment variable QWEN3NEXT_CPU is none, which turns the C++ kernels off", "off", "unset"),
        ("g++ cannot compile the C++ kernels (error: x)", "broken", "CXX="),
    ],
)
def test_doctor_on_compilers(monkeypatch, capsys, reason, state, bring):
    monkeypatch.setattr(build, "missing", lambda: reason)
    found = by_name(doctor.examine())["C++ kernels"]
    assert found.state == state
    assert bring in found.bring
    monkeypatch.setattr(doctor, "examine", lambda: [found])
    assert cli.main(["doctor"]) == int(state == "broken")


def test_doctor_on_gpus_and_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    assert doctor._gpu().state == "broken"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _i: "NVIDIA H200")
    assert doctor._gpu().found == "2 x NVIDIA H200"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    assert doctor._cache_folder().state == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda _path, _mode: False)
    assert doctor._cache_folder().state == "broken"


def test_a_key_is_not_printed(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_API_KEY", "secret")
    assert "secret" not in by_name(doctor.examine())["environment variables"].found


def as_json(capsys, *args, status=0):
    assert cli.main([*map(str, args), "--json"]) == status
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_every_report_as_json(folder, capsys, tmp_path):  # noqa: F811
    found = as_json(capsys, "inspect", "tiny")
    assert found["parameters"]["total"] == found["parameters"]["main"] + found["parameters"]["mtp"] == 2_619_128
    assert len(found["layers"]) == 4
    assert found["layers"][3]["mixer"] == "full_attention"
    hooks = as_json(capsys, "inspect", "tiny", "--hooks")
    assert [hook["name"] for hook in hooks] == list(Qwen3Next(presets.tiny()).hook_dict)
    found = as_json(capsys, "explain", "tiny", "--device", "cpu", "--dtype", "bfloat16")
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16")
    assert {"decode", "delta_rule", "experts"} <= {row["operation"] for row in found["operations"]}
    (context,) = as_json(capsys, "context", "tiny", "--tokens", "4k")["contexts"]
    config = presets.tiny()
    assert context["keys_and_values"]["bfloat16"] == 4096 * config.bytes_per_token()
    found = as_json(capsys, "verify", folder)
    assert found["valid"]
    assert found["tensors"] > 50
    assert found["mtp"]
    other = tmp_path / "other"
    found = as_json(capsys, "convert", folder, other, "--drop-mtp")
    assert sum(found["files"].values()) == sum(file.stat().st_size for file in other.glob("*.safetensors"))
    found = as_json(capsys, "diff", folder, other, status=1)
    assert not found["equal"]
    assert {one["what"] for one in found["differences"]} == {"only in A"}
    assert as_json(capsys, "diff", folder, folder)["equal"]
    found = as_json(capsys, "quantize", folder, tmp_path / "small", "--weights", "int8", "-q")
    assert {one["bits"] for one in found["matrices"]} == {8}
    assert sum(found["files"].values()) > 0
    (other / "model.safetensors").unlink()
    found = as_json(capsys, "verify", other, status=1)
    assert not found["valid"]
    assert found["problems"]


def test_answers_as_json(folder, capsys, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("A short document.", encoding="utf-8")
    command = ["ask", folder, "--file", tmp_path / "text.txt", "--plain", "--store", "none", "--max-new-tokens", "4"]
    found = as_json(capsys, *command, "--question", "Why?", "-q")
    assert found["question"] == "Why?"
    assert found["new"] == 4
    assert found["prompt_tokens"] > len("A short document.")


def test_quiet_and_verbose(folder, capsys):  # noqa: F811
    command = ["generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"]
    assert cli.main([*command, "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*command, "-v"]) == 0
    err = capsys.readouterr().err
    assert "of weights loaded in" in err
    assert re.search(r"^decode: \w+ \(", err, re.MULTILINE)
    assert cli.main(["verify", str(folder), "-v"]) == 0
    assert "model.safetensors: " in capsys.readouterr().err
    assert cli.main(["generate", "nowhere", "--prompt", "x", "-v"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("qwen3next: nowhere is not a folder")


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qwen3next {qwen3next.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "qwen3next" in out
    assert all(command in out for command in ("generate", "doctor"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_choices(capsys, tmp_path):
    cli.main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")
    for words, wanted in (
        (["qwen3next", "ver"], "verify"),
        (["qwen3next", "generate", "--max-new"], "--max-new-tokens"),
        (["qwen3next", "explain", "--dtype", "bf"], "bfloat16"),
    ):
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        code = f"source ./script; {line}; _tyro_qwen3next; echo ${{COMPREPLY[@]}}"
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PATH": path})
        assert wanted in done.stdout.split(), (words, done.stdout, done.stderr)


def test_the_page_names_every_command_status_and_variable():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows[: len(cli.COMMANDS)] == list(cli.COMMANDS)
    sources = [
        file
        for name in ("layers", "qwen3next", "recipes", "tests")
        for file in (ROOT / name).rglob("*")
        if file.suffix in (".py", ".cpp", ".h")
    ]
    used = {name for file in sources for name in re.findall(r"QWEN3NEXT_[A-Z_]+\b", file.read_text(encoding="utf-8"))}
    used |= set(re.findall(r"QWEN3NEXT_[A-Z_]+\b", (ROOT / "Makefile").read_text(encoding="utf-8")))
    named = set(re.findall(r"`([A-Z][A-Z_0-9]*[A-Z0-9])`", PAGE.partition("## Environment variables")[2]))
    assert {name for name in used if not name.endswith("_")} <= named  # not "QWEN3NEXT_" + name
    assert set(doctor.VARIABLES) <= named  # the others are for tests
