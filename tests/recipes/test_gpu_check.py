"""The GPU check, run on a CPU with tiny sizes: all sections, and no lost rows if one fails."""

import json
import time

import pytest
import torch

pytest.importorskip("transformers")

from recipes import gpu_check
from recipes.gpu_check import Options, main
from recipes.measure.gpu_parity import parity

TINY = {"device": "cpu", "preset": "tiny", "quick": True}


def test_all_sections_run_and_are_written(tmp_path):
    rows = main(Options(**TINY, out=tmp_path / "new"))
    assert [row for row in rows if "failed" in row] == []
    assert {row["section"] for row in rows} == gpu_check.SECTIONS.keys()
    (written,) = tmp_path.glob("new/*-cpu.json")
    assert json.loads(written.read_text())["rows"] == json.loads(json.dumps(rows))
    text = written.with_suffix(".md").read_text()
    assert all(f"## {name}" in text for name in gpu_check.SECTIONS)
    assert any(row["what"].startswith("delta_rule: fla") and "not run" in row for row in rows)
    assert all(row["within"] for row in rows if "within" in row)
    assert sum("within" in row for row in rows) > 20


def test_what_was_measured_outlives_a_section_that_fails(tmp_path, monkeypatch):
    def breaks(_bench):
        yield {"what": "first"}
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    def hangs(_bench):
        yield {"what": "begun"}
        time.sleep(60)

    def fine(_bench):
        yield {"what": "last"}

    sections = {"breaks": (breaks, 0.5), "hangs": (hangs, 0.02), "fine": (fine, 0.5)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    began = time.perf_counter()
    rows = main(Options(**TINY, out=tmp_path, seconds=20))
    assert time.perf_counter() - began < 10
    assert [(row["section"], row["what"]) for row in rows] == [
        ("breaks", "first"), ("breaks", "stopped"), ("hangs", "begun"), ("hangs", "stopped"), ("fine", "last"),
    ]  # fmt: skip
    assert rows[1]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "OutOfTime" in rows[3]["failed"]
    (written,) = tmp_path.glob("*.json")
    assert len(json.loads(written.read_text())["rows"]) == 5


def test_without_a_gpu_it_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and a torch built for CUDA"):
        main(Options(out=tmp_path))
    with pytest.raises(ValueError, match="no preset 'giant'"):
        main(Options(out=tmp_path, device="cpu", preset="giant"))
    assert not list(tmp_path.iterdir())


def test_parity_notices_a_wrong_kernel(monkeypatch):
    import recipes.measure.gpu_parity as gpu_parity

    real = gpu_parity.causal_conv

    def wrong(*args, backend, **options):
        y, state = real(*args, backend=backend, **options)
        return (y if backend == "torch" else 1.5 * y), state

    monkeypatch.setattr(gpu_parity, "causal_conv", wrong)
    monkeypatch.setattr(gpu_parity, "DEFINITIONS", {"causal_conv": "torch"})
    rows = [row for row in parity(torch.device("cpu"), (65,)) if "within" in row]
    assert rows
    assert not any(row["within"] for row in rows)
