"""The GPU check, run on a CPU with tiny sizes: all sections, and no lost rows if a section fails, crashes or hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import qwen3next as q
from layers.state.kv_cache import KVCache
from recipes import gpu_check
from recipes.gpu import parent
from recipes.gpu.bench import Bench, Settings, build, layers_that_fit
from recipes.gpu.decode import fill, put_random
from recipes.gpu.nominal import nominal_by_name
from recipes.gpu.peer import name_of, peer_of, what_runs
from recipes.gpu.sections import SECTIONS
from recipes.gpu.time_limit import OutOfTime, at_most
from recipes.gpu_check import Options, main
from recipes.measure import gpu_parity
from recipes.measure.gpu_parity import comparisons, parity

ROOT = Path(__file__).parents[2]
TINY = {"device": "cpu", "preset": "tiny", "quick": True}
CPU = torch.device("cpu")


@pytest.fixture
def sections(monkeypatch):
    """Lets the processes find tests/recipes/gpu_sections.py, and kills a hanging one soon."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(parent, "GRACE", 1.0)
    return "gpu_sections"


def told(rows):
    return [(row["section"], row["what"]) for row in rows]


CAN = {"read_bytes_per_second": 1e10, "bfloat16_flops_per_second": 1e11}


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "parity"])
def test_every_job_runs(name):
    """In this process, with rates given. The comparisons of single kernels have a test of their own."""
    bench = Bench(Settings("cpu", "tiny", quick=True, can=CAN), time.monotonic() + 600)
    names, rows = [], []
    for job in SECTIONS[name].jobs(bench):
        names.append(job.name)
        rows += job.run()
    assert len(names) == len(set(names))
    assert rows
    assert all(row["within"] for row in rows if "within" in row)
    json.dumps(rows)


@pytest.mark.slow
def test_all_sections_run_and_are_written(tmp_path):
    only = tuple(name for name in SECTIONS if name != "parity")
    rows = main(Options(**TINY, out=tmp_path / "new", only=only, seconds=300))
    assert [row for row in rows if "failed" in row or "stopped" in row] == []
    assert {row["section"] for row in rows} == SECTIONS.keys() - {"parity"}
    (written,) = tmp_path.glob("new/*-cpu.json")
    content = json.loads(written.read_text())
    assert content["rows"] == json.loads(json.dumps(rows))
    assert content["done"].keys() == {row["section"] for row in rows}
    text = written.with_suffix(".md").read_text()
    assert all(f"## {name}" in text for name in only)
    assert all(row["within"] for row in rows if "within" in row)
    decoded = [row for row in rows if row["what"].startswith("decode 1 x 1 after 64, cpp")]
    assert "12 of 48 layers" in decoded[0]["what"]
    assert decoded[0]["ms for 48 layers, extrapolated from 12"] == pytest.approx(decoded[0]["ms"] * 4)
    assert "decode cpp" in decoded[0]["runs"]
    assert any("torch_chunk_gated_delta_rule" in row.get("runs", "") for row in rows)


def test_parity_runs_every_comparison():
    rows = list(parity(CPU, (65,), quick=True))
    assert [row for row in rows if "failed" in row] == []
    assert all(row["within"] for row in rows if "within" in row)
    assert sum("within" in row for row in rows) > 60
    assert {row["what"] for row in rows} == {c.name for c in comparisons()}
    assert any(row["what"].startswith("delta_rule: fla") and "not run" in row for row in rows)


def test_a_crash_costs_only_its_own_job(tmp_path, sections):
    rows = main(Options(**TINY, out=tmp_path, only=("crashes", "last"), seconds=60), module=sections)
    assert told(rows) == [
        ("crashes", "one"),
        ("crashes", "before the crash"),
        ("crashes", "crash"),
        ("crashes", "three"),
        ("last", "last"),
    ]
    assert "SIGABRT" in rows[2]["failed"]
    assert rows[0]["pid"] != rows[3]["pid"] != rows[4]["pid"]
    assert "the last words" in next(tmp_path.glob("*.log")).read_text()


def test_an_error_is_a_row_and_the_next_job_runs_in_the_same_process(tmp_path, sections):
    rows = main(Options(**TINY, out=tmp_path, only=("raises",), seconds=60), module=sections)
    assert [row["what"] for row in rows] == ["before the error", "error", "after"]
    assert rows[1]["failed"] == "RuntimeError: CUDA error: an illegal memory access"


@pytest.mark.slow
@pytest.mark.parametrize("section, job, after", [("hangs", "hang", "then"), ("sleeps", "sleep", "awake")])
def test_a_job_that_does_not_end_is_stopped(tmp_path, sections, section, job, after, monkeypatch):
    """By its own alarm, or from outside where Python does not come to run it."""
    monkeypatch.setattr(gpu_check, "shares", lambda *_: 40.0)  # of which a job has at most 60%
    began = time.perf_counter()
    rows = main(Options(**TINY, out=tmp_path, only=(section,)), module=sections)
    assert time.perf_counter() - began < 60
    assert [row["what"] for row in rows] == [f"before the {job}", job, after]
    assert "stopped" in rows[1]
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert content["done"] == {section: [after]}  # the other is tried again by a run that is resumed


def test_a_section_that_cannot_begin_is_a_row(tmp_path, sections):
    rows = main(Options(**TINY, out=tmp_path, only=("breaks", "last"), seconds=60), module=sections)
    assert [row["what"] for row in rows] == ["the section's process", "last"]
    assert "no attribute 'name'" in rows[0]["failed"]


def test_rows_outlive_a_killed_run_which_is_then_resumed(tmp_path, sections, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv("GPU_SECTIONS_GO", str(go))
    code = (
        "from recipes.gpu_check import *; from pathlib import Path; "
        f"main(Options(**{TINY}, out=Path({str(tmp_path)!r}), only=('slow', 'last'), seconds=600), module={sections!r})"
    )
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    try:
        rows = _rows_when(tmp_path, lambda rows: len(rows) == 2)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert told(rows) == [("slow", "quick"), ("slow", "slow begins")]
    _wait(lambda: not _alive(rows[1]["pid"]))  # the section's process does not outlive the run
    (first,) = tmp_path.glob("*.json")
    go.touch()
    rows = main(Options(**TINY, out=tmp_path / "more", only=("slow", "last"), resume=first), module=sections)
    assert told(rows) == [("slow", "quick"), ("slow", "slow begins"), ("slow", "slow ends"), ("last", "last")]
    assert rows[2]["infinite"] == "inf"
    second = tmp_path / "more" / first.name
    assert len(json.loads(second.read_text())["machines"]) == 2
    assert "name x, ms 1.5" in second.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="was made with seed 0, not 1"):
        main(Options(**TINY, out=tmp_path, resume=first, seed=1), module=sections)
    with pytest.raises(ValueError, match="is no result of this program"):
        main(Options(**TINY, out=tmp_path, resume=tmp_path / "none.json"), module=sections)


def _rows_when(folder, ready):
    found = []

    def look():
        for file in folder.glob("*.json"):
            found[:] = json.loads(file.read_text())["rows"]
        return ready(found)

    _wait(look)
    return list(found)


def _wait(until, seconds=60):
    ends = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < ends
        time.sleep(0.02)


def _alive(pid):
    """Whether a process runs; one that nobody has waited for yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_time_that_is_left_over_goes_to_the_later_sections():
    weights = {name: section.weight for name, section in SECTIONS.items()}
    first, last = next(iter(SECTIONS)), list(SECTIONS)[-1]
    assert parent.shares(SECTIONS, 500.0, first) == pytest.approx(500 * weights[first] / sum(weights.values()))
    assert parent.shares(SECTIONS, 123.0, last) == 123.0


def test_a_time_limit_passes_through_code_that_reports_every_exception(monkeypatch):
    """Parity notes whatever a kernel raises, as a job does: a time limit is none of it."""

    def slow(*_args, **_options):
        time.sleep(30)

    assert not issubclass(OutOfTime, Exception)
    monkeypatch.setattr(gpu_parity, "causal_conv", slow)
    monkeypatch.setattr(gpu_parity, "DEFINITIONS", {"causal_conv": "torch"})
    monkeypatch.setattr(gpu_parity, "CASES", {"causal_conv": gpu_parity.CASES["causal_conv"]})
    with pytest.raises(OutOfTime), at_most(0.2):
        list(parity(CPU, (65,)))


def test_without_a_gpu_it_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and a torch built for CUDA"):
        main(Options(out=tmp_path))
    with pytest.raises(ValueError, match="no preset 'giant'"):
        main(Options(out=tmp_path, device="cpu", preset="giant"))
    with pytest.raises(ValueError, match="no section 'speed'"):
        main(Options(out=tmp_path, device="cpu", only=("speed",)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_parity_notices_a_wrong_kernel(monkeypatch, wrong):
    """Wrong values; and gradients that are not numbers beside right values."""
    real = gpu_parity.causal_conv

    def kernel(*args, backend, **options):
        y, state = real(*args, backend=backend, **options)
        if backend == "torch":
            return y, state
        if wrong == wrong:
            return wrong * y, state
        y = y.clone()
        if y.requires_grad:
            y.register_hook(lambda grad: grad * wrong)
        return y, state

    monkeypatch.setattr(gpu_parity, "causal_conv", kernel)
    monkeypatch.setattr(gpu_parity, "DEFINITIONS", {"causal_conv": "torch"})
    monkeypatch.setattr(gpu_parity, "CASES", {"causal_conv": gpu_parity.CASES["causal_conv"]})
    rows = [row for row in parity(CPU, (65,)) if "gradients" in row]
    assert rows
    assert not any(row["within"] for row in rows)


def test_layers_that_fit_are_whole_periods_and_their_weights_fit():
    config = q.presets.qwen3_next_80b_a3b(mtp_num_hidden_layers=0)
    on_h200 = layers_that_fit(config, int(150e9), copies=1, margin=0.15)
    assert on_h200 == 36
    assert layers_that_fit(config, int(150e9), copies=2, margin=0.4) == 12
    assert layers_that_fit(config, int(1e12), copies=1, margin=0.15) == 48
    with pytest.raises(ValueError, match="Not even 4 layers"):
        layers_that_fit(config, int(12e9), copies=1, margin=0.1)
    bench = Bench(Settings("cpu", "tiny", quick=True), time.monotonic() + 60)
    row = bench.load(margin=0.5)
    assert row["weight bytes"] <= row["bytes free before"] * 0.5
    assert bench.config.layer_types[:4] == ("linear_attention",) * 3 + ("full_attention",)


def test_a_model_is_made_in_its_dtype_without_a_copy():
    model = build(q.presets.tiny(), CPU, 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert model.A_log.std() > 0 if hasattr(model, "A_log") else model.blocks[0].linear_attn.A_log.float().std() > 0


def test_a_cache_that_time_does_not_allow_to_fill_gets_random_keys_and_values():
    """Of the right lengths and in all layers, so that decoding goes on behind them."""
    bench = Bench(Settings("cpu", "tiny", quick=True, can=CAN), time.monotonic() - 1)
    filled = fill(bench, 9000, 4)
    assert filled.how == "real prefill of 4096 tokens, then 4904 random keys and values"
    empty = bench.model.new_cache(max_len=80)
    put_random(bench.model, empty, bench.ids(1, 70), seed=0)
    for cache, length in ((filled.cache, 9000), (empty, 70)):
        assert cache.lengths == (length,)
        keys = [state.read(0, length).k for state in cache.layers if isinstance(state, KVCache)]
        assert all(float(k[:, :, -1].float().std()) > 0.3 for k in keys)
        assert all(float(s.recurrent.std()) > 0 for s in cache.layers if not isinstance(s, KVCache))
        assert bench.model.step(bench.ids(1, 1), cache).isfinite().all()


def test_the_peer_shares_the_experts_and_computes_the_same():
    """In fp32, to rounding; a weight that is changed in one is changed in the other."""
    config = q.presets.tiny(mtp_num_hidden_layers=0, tie_word_embeddings=False, initializer_range=0.06)
    model = build(config, CPU, 0, torch.float32)
    peer, ids = peer_of(model), torch.arange(80)[None]
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, model(ids).logits, rtol=0, atol=2e-4)
        experts = model.blocks[0].mlp.experts.down_proj
        assert peer.model.layers[0].mlp.experts.down_proj.data_ptr() == experts.data_ptr()
    assert "attention: sdpa" in what_runs(peer)
    assert "not found" not in what_runs(peer)


def test_the_name_of_what_runs_behind_a_wrapper():
    def chosen():
        pass

    def outer(implementation):
        def wrapped():
            return implementation()

        return wrapped

    assert name_of(outer(chosen)).endswith("<locals>.chosen")
    assert name_of(None) == "not found"


def test_nominal_rates_name_the_part():
    assert nominal_by_name("NVIDIA H200").flops == 989e12
    assert nominal_by_name("NVIDIA A100-SXM4-80GB").flops == 312e12
    assert nominal_by_name("NVIDIA H100 PCIe") is None
    assert nominal_by_name("NVIDIA L4") is None


def test_the_run_leaves_the_gpu_to_its_sections():
    """Its own process makes no CUDA context, which would take memory from them: nothing in it asks torch for one."""
    files = ("gpu_check.py", "gpu/parent.py", "gpu/report.py")
    text = "".join((ROOT / "recipes" / name).read_text() for name in files)
    assert "torch.cuda." in text
    assert text.count("torch.cuda.") == text.count("torch.cuda.is_available()")
    assert gpu_check.gpu_name() == ("no GPU" if not torch.cuda.is_available() else gpu_check.gpu_name())


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the check")
def test_make_uses_a_python_that_has_everything():
    """And does not call pip, which has no network on a GPU machine."""
    run = subprocess.run(
        ["make", "gpu-check", f"PYTHON={sys.executable}", "VENV=/nonexistent"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode
    assert "needs an NVIDIA GPU" in run.stderr
    assert "pip" not in run.stdout
