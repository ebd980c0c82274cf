"""The effect of QWEN3NEXT_CPU and QWEN3NEXT_PRECISION, independent of the machine that runs the test."""

import os
import subprocess
import sys

import pytest
import torch

import layers.cpp.build as build
from layers.cpp import cpu
from qwen3next.cli import keep_to_processors
from recipes.training.settings import pick_precision

FEATURES = {
    "old": frozenset(("sse2", "avx")),
    "avx2": frozenset(cpu.LEVELS["avx2"]),
    "avx512": frozenset(cpu.LEVELS["avx2"] + cpu.LEVELS["avx512"]),
    "avx512_bf16": frozenset(cpu.LEVELS["avx2"] + cpu.LEVELS["avx512"] + cpu.LEVELS["avx512_bf16"]),
    "amx": frozenset(sum(cpu.LEVELS.values(), ())),
}
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Emulate a processor with the features of a level, and set the variables."""
    monkeypatch.delenv("QWEN3NEXT_PRECISION", raising=False)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")

    def make(level, choice=None):
        monkeypatch.setattr(cpu, "_features", lambda: FEATURES[level])
        monkeypatch.delenv("QWEN3NEXT_CPU", raising=False)
        if choice is not None:
            monkeypatch.setenv("QWEN3NEXT_CPU", choice)

    return make


def decisions() -> tuple[tuple[str, ...], str, str]:
    return cpu.flags(), cpu.kind(), pick_precision("auto", CPU)[0]


V3, V4, NATIVE = ("-march=x86-64-v3",), ("-march=x86-64-v4",), ("-march=native",)


@pytest.mark.parametrize(
    "level, choice, flags, kind, precision",
    [
        ("old", None, NATIVE, "other", "fp32"),
        ("avx2", None, NATIVE, "avx2", "fp32"),
        ("avx512", "native", NATIVE, "avx512", "fp32"),
        ("avx512_bf16", "", NATIVE, "avx512_bf16", "bf16"),
        ("amx", None, NATIVE, "amx", "bf16"),
        ("amx", "avx512_bf16", (*V4, "-mavx512bf16"), "avx512_bf16", "bf16"),
        ("amx", "avx512", V4, "avx512", "fp32"),
        ("avx512_bf16", "avx2", V3, "avx2", "fp32"),
        ("avx512_bf16", "none", NATIVE, "avx512_bf16", "bf16"),
        ("avx2", "amx", NATIVE, "amx", "bf16"),  # what is decided, not what is executed
    ],
)
def test_what_a_choice_decides(machine, level, choice, flags, kind, precision):
    machine(level, choice)
    assert decisions() == (flags, kind, precision)


@pytest.mark.parametrize("level, choice", [("old", "avx2"), ("avx2", "avx512"), ("avx512", "avx512_bf16")])
def test_a_choice_that_cannot_be_executed_is_refused(machine, level, choice):
    machine(level, choice)
    with pytest.raises(ValueError, match=f"'{choice}', which this processor cannot execute: choose none or .*native"):
        cpu.choice()
    assert choice not in cpu.possible()
    assert {"none", "amx", "native"} <= set(cpu.possible())


def test_other_processors_have_no_x86_choices(machine, monkeypatch):
    machine("old", "amx")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match=r"cannot execute: choose none or native\."):
        cpu.choice()


def test_unknown_words_are_refused(machine, monkeypatch):
    machine("amx", "sse4")
    with pytest.raises(
        ValueError, match="QWEN3NEXT_CPU is 'sse4': choose none, avx2, avx512, avx512_bf16, amx or nati"
    ):
        cpu.choice()
    machine("amx")
    monkeypatch.setenv("QWEN3NEXT_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"QWEN3NEXT_PRECISION is 'fp16': choose fp32, bf16 or auto\."):
        pick_precision("auto", CPU)


@pytest.mark.parametrize("level", ["avx2", "amx"])
def test_precision_is_forced_on_auto_alone(machine, monkeypatch, level):
    machine(level)
    for forced in ("fp32", "bf16"):
        monkeypatch.setenv("QWEN3NEXT_PRECISION", forced)
        assert pick_precision("auto", CPU) == (forced, "as QWEN3NEXT_PRECISION says")
        assert pick_precision("fp32", CPU) == ("fp32", "as asked")
    monkeypatch.setenv("QWEN3NEXT_PRECISION", "auto")
    assert pick_precision("auto", CPU)[0] == {"avx2": "fp32", "amx": "bf16"}[level]


def test_none_is_no_compiled_kernels(machine):
    machine("amx", "none")
    with pytest.raises(build._Unavailable, match=r"QWEN3NEXT_CPU is none, which turns the C\+\+ kernels off"):
        build._compiled()


def test_each_choice_has_a_file_of_its_own(machine, monkeypatch, tmp_path):
    """And the kernels are compiled for it."""
    seen = []

    class Compiler:
        returncode = 0

        def __init__(self, command, **_):
            seen.append(command)

        def communicate(self):
            return "", ""

    def run(command):
        if "-shared" in command:
            open(command[-1], "w").close()
        return "compiler 1"

    monkeypatch.setattr(build, "_compiler", lambda: "cc")
    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "_folder", lambda: tmp_path)
    monkeypatch.setattr(build.subprocess, "Popen", Compiler)
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    files = set()
    for choice in ("avx2", "avx512", "avx512_bf16", "amx", "native"):
        machine("amx", choice)
        seen.clear()
        files.add(build._compiled())
        assert seen
        assert all(set(cpu.flags()) <= set(command) for command in seen)
        assert build._compiled() in files
    assert len(files) == len(set(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("choice", [name for name in cpu.possible() if name in cpu.TORCH])
def test_torch_keeps_to_the_choice(choice):
    """In a separate process, because torch reads the variables once; its second line is ATen's choice."""
    program = (
        "import layers, os, torch; "
        "print({k: v for k, v in os.environ.items() if k.startswith(('ATEN', 'ONEDNN_MAX', 'MKL_ENABLE'))}); "
        "print(torch.backends.cpu.get_cpu_capability())"
    )
    environment = os.environ | {"QWEN3NEXT_CPU": choice}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    variables, capability = told.stdout.splitlines()
    assert eval(variables) == cpu.TORCH[choice]
    assert capability.lower() == cpu.TORCH[choice]["ATEN_CPU_CAPABILITY"]


def test_these_tests_keep_to_the_choice_that_was_made():
    bound = cpu.TORCH.get(cpu.choice())
    if bound is not None:
        assert torch.backends.cpu.get_cpu_capability().lower() == bound["ATEN_CPU_CAPABILITY"]
    if cpu.choice() == "none":
        assert "QWEN3NEXT_CPU is none" in build.missing()


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (["-m", "qwen3next.cli", "inspect", "tiny"], 2),
        (["-m", "qwen3next.cli", "doctor"], 2),
        (["-m", "recipes.demo", "--data", "none"], 1),
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_a_wrong_choice_ends_in_the_sentence(program, status):
    environment = os.environ | {"QWEN3NEXT_CPU": "sse4"}
    told = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (status, "")
    (line,) = told.stderr.splitlines()
    assert "QWEN3NEXT_CPU is 'sse4': choose none, avx2" in line


def test_a_wrong_choice_is_refused_by_the_first_that_asks():
    """An import binds nothing by it; a forward raises."""
    program = """
import os, torch, qwen3next as q
assert "ATEN_CPU_CAPABILITY" not in os.environ
q.Qwen3Next(q.presets.tiny())(torch.arange(5)[None])
"""
    environment = {**os.environ, "QWEN3NEXT_CPU": "sse4"}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith("ValueError: QWEN3NEXT_CPU is 'sse4': choose none, avx2")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "900000 100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({}, 4),
    ],
)
def test_processors_keep_to_affinity_and_quota(monkeypatch, tmp_path, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu.processors(tmp_path) == expected


def test_the_command_keeps_to_the_processors(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "processors", lambda: 1)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        keep_to_processors()
        assert torch.get_num_threads() == 2  # as asked
        monkeypatch.delenv("OMP_NUM_THREADS")
        keep_to_processors()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is set on Linux")
def test_a_process_that_is_bound_to_one_processor_has_one_thread():
    program = "import torch, layers; from layers.cpp import cpu; print(torch.get_num_threads(), cpu.processors())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    one = min(os.sched_getaffinity(0))
    told = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{one}}}); {program}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    "given, expected",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(given, expected):
    """The variable has its value when torch is loaded, which reads it then."""
    program = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "            sys.meta_path.remove(self)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import layers"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment | given, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [expected]
