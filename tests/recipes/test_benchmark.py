"""The benchmark runs, compares equal work and writes its results. Speeds are not asserted, because they are noisy."""

import json
import os
import signal
import struct
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import qwen3next as q
from qwen3next.inspect import on_meta
from recipes import benchmark
from recipes.benchmark import Options, compare, main
from recipes.measure import llama_cpp
from recipes.measure.benchmark_cases import Case
from recipes.measure.benchmark_rows import Row, line
from recipes.measure.llama_cpp import write_gguf
from recipes.measure.measuring import machine
from recipes.measure.work import active_weight_bytes, forward_flops, linear_weights

SMALL = {
    "preset": "tiny",
    "dtypes": ("float32",),
    "prefill": ("1x70", "2x20"),
    "decode": (1, 2),
    "at_once": (3,),
    "decode_after": 5,
    "steps": 2,
    "train": ("1x20",),
    "question": (40, 3),
    "operators": (70,),
    "repetitions": 1,
    "device": "cpu",
}
ROOT = Path(__file__).parent.parent.parent
PEER = """
def make(folder, dtype, device):
    assert (folder / "config.json").is_file()
    def sides(what):
        return {"idle": lambda: None} if what.startswith("prefill") else {}
    return sides
"""


def test_ratios_are_of_pairs():
    """Ours does nothing and theirs a little, so the ratio is above one and within its range."""
    case = Case("x", 3, sides={"qwen3next": lambda: None, "theirs": lambda: sum(range(20_000))})
    (row,) = compare(case, 3, dtype="float32", limit=0.0)
    assert 1 < row.lowest <= row.ratio <= row.highest
    assert (row.what, row.peer, row.tokens) == ("x", "theirs", 3)


def test_runs_and_writes(tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    out = tmp_path / "new" / "result"
    rows = main(Options(**SMALL, out=out, peer=tmp_path / "peer.py"))
    assert [r.what for r in rows if r.peer != "idle"] == [
        "prefill 1 x 70",
        "prefill 2 x 20",
        "decode 1 x 1 after 5",
        "decode 2 x 1 after 5",
        "decode 1 x 3 after 5",
        "int8 weights, decode after 5",
        "int4 weights, decode after 5",
        "int8 weights, prefill of 20",
        "int4 weights, prefill of 20",
        "question of 3 after 40",
        "train 1 x 20",
        "experts alone, 70",
        "delta rule 16:32 x 128, 70",
        "delta rule and gradients 16:32 x 128, 70",
        "draft of 1",
        "draft of 3",
        "take back 2 of 4",
        "generate, drafts auto by auto, greedy",
    ]
    assert [r.what for r in rows if r.peer == "idle"] == ["prefill 1 x 70", "prefill 2 x 20"]
    assert all(row.memory >= 0 and row.peer_memory >= 0 for row in rows if sys.platform == "linux")
    written = json.loads(out.with_suffix(".json").read_text())
    assert len(written["rows"]) == len(rows)
    assert written["commit"]
    assert written["machine_can"]["float32_flops_per_second"] > 1e9
    assert "| prefill 1 x 70 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_every_row_says_what_ran_and_where(tmp_path):
    rows = main(
        Options(
            **SMALL | {"train": ("1x8",), "operators": (8,), "at_once": ()}, only=("train", "decode 1"), llama_cpp="no"
        )
    )
    assert [row.what for row in rows] == ["decode 1 x 1 after 5", "train 1 x 8"]
    assert all("threads" in row.machine for row in rows)
    assert rows[0].runs in ("decode cpp", "decode torch")
    assert "delta_rule" in rows[1].runs
    assert "attention sdpa" in rows[1].runs  # the C++ attention has no gradients
    assert rows[1].runs in line(rows[1])
    assert rows[1].machine in line(rows[1])


SLOW = """
import pathlib, time
def make(folder, dtype, device):
    def sides(what):
        if what == "decode 1 x 1 after 5" and not pathlib.Path(__file__).with_name("go").exists():
            time.sleep(600)
        return {}
    return sides
"""


def test_a_killed_run_leaves_its_rows_and_resume_goes_on(tmp_path, capsys):
    """Rows come out of a pipe while the run goes on; after a kill the file holds them, and the rest is added."""
    (tmp_path / "slow.py").write_text(SLOW)
    out = tmp_path / "result"
    options = "--preset tiny --dtypes float32 --prefill 1x70 2x20 --decode 1 --decode-after 5 --steps 2 --train 1x20 "
    options += "--question 40 3 --operators 70 --at-once --repetitions 1 --device cpu --llama-cpp no "
    options += "--only prefill decode experts"
    command = [sys.executable, "-m", "recipes.benchmark", *options.split(), "--out", str(out)]
    command += ["--peer", str(tmp_path / "slow.py")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        lines = [run.stdout.readline() for _ in range(2)]  # the third row never comes
    finally:
        os.kill(run.pid, signal.SIGKILL)
        errors = run.communicate()[1]
    assert ["prefill 1 x 70" in lines[0], "prefill 2 x 20" in lines[1]] == [True, True], errors
    left = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["what"] for row in left] == ["prefill 1 x 70", "prefill 2 x 20"]
    assert "| prefill 2 x 20 |" in out.with_suffix(".md").read_text()

    (tmp_path / "go").touch()
    rows = main(Options(resume=out.with_suffix(".json")))
    whats = [r.what for r in rows if "weights" not in r.what]
    assert whats == ["prefill 1 x 70", "prefill 2 x 20", "decode 1 x 1 after 5", "experts alone, 70"]
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["rows"][:2] == left  # not measured again
    assert len(written["rows"]) == len(rows)
    assert "prefill 1 x 70" not in capsys.readouterr().out.partition("Measured")[0]


def test_resume_refuses_what_does_not_belong_together(tmp_path):
    path = tmp_path / "result.json"
    row = Row("float32", "prefill 1 x 70", "transformers", 70, 1.0, 2.0, 2.0, 2.0, 2.0, 0.5)
    results = benchmark.Results({"preset": "tiny"}, machine(), path.with_suffix(""), {"read_bytes_per_second": 1e9})
    results.add([row])
    with pytest.raises(ValueError, match="give no others"):
        main(Options(resume=path, preset="tiny"))
    with pytest.raises(ValueError, match=r"has machine .* and this is 'another'"):
        benchmark.read_results(path, machine() | {"machine": "another"})
    assert benchmark.read_results(path, machine()).rows == [row]
    path.write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="is not a result of this recipes"):
        main(Options(resume=path))
    with pytest.raises(ValueError, match="does not exist"):
        main(Options(resume=tmp_path / "none.json"))


def test_without_llama_cpp_a_row_says_so_if_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "found", lambda: None)
    options = Options(**SMALL, only=("prefill 1",), llama_cpp="yes")
    rows = main(options)
    assert [row.peer for row in rows] == ["llama.cpp", "transformers"]
    assert "llama.cpp was not found" in rows[0].note
    assert rows[0].note in capsys.readouterr().out
    assert [row.peer for row in main(replace(options, llama_cpp="auto"))] == ["transformers"]


def test_broken_bindings_of_llama_cpp_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise OSError('libllama.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "")
    llama_cpp._broken.cache_clear()
    try:
        assert llama_cpp.found() is None
        assert "cannot be imported (libllama.so: no such file): pip install" in llama_cpp.why_not()
    finally:
        llama_cpp._broken.cache_clear()


class OnlyAddresses:
    """llama.cpp's interface, which keeps the address of the tokens and not the array."""

    def llama_batch_get_one(self, tokens, count):
        self.tokens = weakref.ref(tokens)
        return count

    def llama_decode(self, _context, count):
        self.read = list(self.tokens())[:count]
        return 0


def test_tokens_stay_alive_while_llama_cpp_reads_them():
    bindings = llama_cpp.Bindings.__new__(llama_cpp.Bindings)
    bindings.api = OnlyAddresses()
    bindings.evaluate(None, [3, 1, 2])
    assert bindings.api.read == [3, 1, 2]


BENCH = """#!/bin/sh
echo "$@" > "$(dirname "$0")/called"
echo '[{"avg_ns": 2500000}]'
"""


def test_llama_bench_is_asked_for_its_own_time(tmp_path, monkeypatch):
    """The program is one that only answers: what it is called with, and that its seconds are taken, is tested."""
    folder, program = tmp_path / "model", tmp_path / "llama-bench"
    q.Qwen3Next(q.presets.tiny(mtp_num_hidden_layers=0)).save_pretrained(folder)
    program.write_text(BENCH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(llama_cpp, "found", lambda: "llama-bench")
    peer = llama_cpp.LlamaCpp(folder, "float32", threads=1, steps=4)
    assert peer.sides("train 1 x 20") == {}
    case = Case("decode 1 x 1 after 5", 4, sides={"qwen3next": lambda: None} | peer.sides("decode 1 x 1 after 5"))
    (row,) = compare(case, 1, dtype="float32", limit=0.0)
    assert row.theirs == 2.5e-3
    called = (tmp_path / "called").read_text()
    assert "-p 0 -n 4 -d 5" in called
    assert "float32.gguf -t 1" in called
    program.write_text("#!/bin/sh\necho no such model >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"llama-bench failed \(no such model\)"):
        peer.sides("prefill 1 x 70")["llama.cpp"]()


def test_a_gguf_file_has_every_tensor_once(tmp_path):
    """Read back by its offsets: q, k, v and z of one layer are those of the checkpoint, other counts are its sizes."""
    model = q.Qwen3Next(q.presets.tiny(mtp_num_hidden_layers=0))
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", torch.float32)
    raw = (tmp_path / "x.gguf").read_bytes()
    magic, version, tensors, _ = struct.unpack_from("<4sIQQ", raw)
    assert (magic, version) == (b"GGUF", 3)
    assert tensors == 2 + 4 * 10 + 3 * 8 + 6  # outer; norms and experts of four layers; mixers of two kinds
    weight = model.blocks[0].linear_attn.in_proj_z.weight.detach().contiguous()
    assert raw.count(weight.numpy().tobytes()) == 1
    q.Qwen3Next(q.presets.tiny()).save_pretrained(tmp_path / "mtp")
    with pytest.raises(ValueError, match="without MTP"):
        write_gguf(tmp_path / "mtp", tmp_path / "y.gguf", torch.float32)


def test_llama_cpp_computes_the_same(tmp_path):
    """Where its bindings are installed: logits of the same weights, and rows of prefill and decoding."""
    pytest.importorskip("llama_cpp")
    rows = main(Options(**SMALL | {"prefill": ("1x70",), "decode": (1,)}, only=("prefill", "decode")))
    assert [row.what for row in rows if row.peer == "llama.cpp"] == ["prefill 1 x 70", "decode 1 x 1 after 5"]


def test_bad_options_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no preset 'giant'"):
        main(Options(preset="giant"))
    with pytest.raises(ValueError, match="'float16' cannot be measured"):
        main(Options(dtypes=("float16",)))
    with pytest.raises(ValueError, match="is not a Python file"):
        main(Options(peer=tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="does not define make"):
        main(Options(peer=tmp_path / "empty.py"))


def test_work_is_counted_as_the_model_has_it():
    """Against counted parameters: all multiplied weights, and the chosen share of the routed experts."""
    config, weights = q.presets.medium(mtp_num_hidden_layers=0), 0
    for name, p in on_meta(config).blocks.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
        weights += p.numel() * share if p.ndim > 1 and "conv" not in name else 0
    assert linear_weights(config) == weights
    assert active_weight_bytes(config, 2) == 2 * (weights + config.hidden_size * config.vocab_size)
    two = active_weight_bytes(config, 2, tokens=2) - active_weight_bytes(config, 2)  # 4 of 32, then 3.5 others
    assert two == 2 * 8 * 3 * 512 * 256 * 3.5
    # A single token: all products, a query with one key, one step of the recurrence.
    config = q.presets.tiny(mtp_num_hidden_layers=0)
    rest = forward_flops(config, 1) - 2 * (linear_weights(config) + config.hidden_size * config.vocab_size)
    assert rest == 3 * 4 * 6 * 32 * 32 + 1 * 4 * 4 * 32
