"""Models of one size against context: counts are checked. Times are not asserted, because they are noisy."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import qwen3next as q
from qwen3next.inspect import count_parameters
from recipes import growth
from recipes.growth import Options, configs, main, worker
from recipes.measure.measuring import in_own_process
from recipes.measure.work import bytes_by_operation, flops_by_operation, forward_flops

TINY = {"preset": "tiny", "lengths": ("70", "140", "280"), "decode": 2, "rounds": 2, "once_from": "280"}


def here(_module, job, _most_seconds):
    """Run the job in this process, because a new one would import torch each time."""
    return json.loads(json.dumps(worker(json.loads(json.dumps(job)))))


@pytest.mark.parametrize("preset", ["tiny", "small", "medium", "large", "qwen3_5_27b"])
def test_models_are_of_one_size(preset):
    """Total and active parameters are equal to 1 %, limited by the 16-column steps of the feed-forwards."""
    found = configs(preset, 4096)
    kinds = {name: set(config.layer_types) for name, config in found.items()}
    assert kinds["attention"] == {"full_attention"}
    assert kinds["Gated DeltaNet"] == {"linear_attention"}
    assert found["hybrid"] == q.presets.ALL[preset](mtp_num_hidden_layers=0, max_position_embeddings=4096)
    sizes = [count_parameters(config) for config in found.values()]
    for size in sizes:
        assert size.main == pytest.approx(sizes[0].main, rel=0.01)
        assert size.active == pytest.approx(sizes[0].active, rel=0.01)


@pytest.mark.slow
def test_memory_grows_as_counted(tmp_path, monkeypatch):
    """`tiny` has softmax attention in one layer of four: a quarter of the attention-only model's bytes per token."""
    monkeypatch.setattr(growth, "in_own_process", here)
    monkeypatch.setattr(growth, "random_bytes", lambda: torch.rand(1000))  # small, to be fast
    out = tmp_path / "new" / "growth"
    found = main(Options(**TINY, out=out))
    held = {(row["tokens"], row["model"]): row["held"] for row in found["rows"]}
    assert held[70, "Gated DeltaNet"] == held[140, "Gated DeltaNet"] == held[280, "Gated DeltaNet"] > 0
    for a, b in ((70, 140), (140, 280)):
        assert 4 * (held[b, "hybrid"] - held[a, "hybrid"]) == held[b, "attention"] - held[a, "attention"] > 0
    assert held[280, "attention"] == 4 * held[70, "attention"]
    for row in found["rows"]:
        assert row["held"] == row["formula"] <= row["reserved"]
        assert row["prefill"] > 0 < row["decode"]
        assert row["theory"]["prefill"] > 0 < row["limit"]["decode"]
        assert len(row["each"]) == (1 if row["tokens"] == 280 else 2)
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["rows"] == json.loads(json.dumps(found["rows"]))
    assert written["commit"]
    assert out.with_suffix(".md").read_text().count("\n| 140 |") == 4
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert len(list(out.parent.iterdir())) == 3  # no temporary files are left


def test_theory_grows_as_counted():
    """After n tokens attention has n + 1 keys; the work of delta rule, projections and experts is constant."""
    config, long = q.presets.small(mtp_num_hidden_layers=0), 100_000
    near, far = (flops_by_operation(config, 1, past=n) for n in (0, long))
    assert far["attention"] == (long + 1) * near["attention"] == (long + 1) * 4 * 2 * 6 * 64
    assert {k: v for k, v in far.items() if k != "attention"} == {k: v for k, v in near.items() if k != "attention"}
    assert forward_flops(config, 300) == sum(flops_by_operation(config, 300).values())
    read = bytes_by_operation(config, long, 2)
    assert read["attention"] + read["delta rule"] == q.HybridCache.estimate(config, long)


@pytest.mark.slow
def test_a_model_that_takes_too_long_is_left_out_from_there_on(monkeypatch):
    def stopped(module, job, most_seconds):
        slow = (job["model"], job["tokens"]) == ("attention", 140)
        return {"failed": "took longer than 1 s"} if slow else here(module, job, most_seconds)

    monkeypatch.setattr(growth, "in_own_process", stopped)
    monkeypatch.setattr(growth, "random_bytes", lambda: torch.rand(1000))
    rows = main(Options(**TINY | {"rounds": 1}))["rows"]
    failed = {(row["tokens"], row["model"]): row["failed"] for row in rows if "failed" in row}
    assert failed == dict.fromkeys([(140, "attention"), (280, "attention")], "took longer than 1 s")


def test_a_process_of_its_own():
    job = {"preset": "tiny", "model": "hybrid", "tokens": 70, "dtype": "float32", "decode": 1, "chunk_size": 64}
    found = in_own_process("recipes.growth", job | {"seed": 0}, 300)
    assert found["held"] == q.HybridCache.estimate(configs("tiny", 71)["hybrid"], 70, kv_bytes=4, conv_bytes=4)
    assert in_own_process("recipes.growth", job | {"seed": 0, "dtype": "float7"}, 300)["failed"].startswith("Attribute")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"preset": "giant"}, "no preset 'giant': choose tiny"),
        ({"lengths": ("4x",)}, "'4x' is not a number of tokens: write it as"),
        ({"lengths": ("0",)}, "'0' is not a number of tokens"),
        ({"lengths": ()}, "at least one length"),
        ({"dtype": "float16"}, "'float16' cannot be measured"),
        ({"decode": 0}, "must be at least 1"),
        ({"once_from": "soon"}, "'soon' is not a number of tokens"),
    ],
)
def test_bad_options_get_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(Options(**changes))
