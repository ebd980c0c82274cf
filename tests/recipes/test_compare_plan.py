"""Runs beside each other, and plans for many GPUs against public anchors."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

import qwen3next as q
from recipes import compare, plan
from recipes.plan import RATES, Layout, estimate, estimates, layouts, memory_by_part
from recipes.training.flops import training_flops

BIG = q.presets.qwen3_next_80b_a3b()


def written(folder, losses, **settings):
    folder.mkdir(parents=True)
    rows = [
        {"step": i, "tokens": 100 * i, "lm": x, "gradient_norm": None if i == 2 else 1.0, "tokens_per_second": 50.0}
        for i, x in enumerate(losses, start=1)
    ]
    rows[-1]["val_bits_per_byte"] = losses[-1] / 2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.json").write_text(json.dumps({"seed": 0, "out": str(folder)} | settings))
    return folder


# ---- compare


def test_runs_beside_each_other(tmp_path, monkeypatch):
    """Names that tell them apart, only the settings that differ, and a picture with a curve for each run."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    runs = written(tmp_path / "a" / "run", [3.0, 2.0], lr=1), written(tmp_path / "b" / "run", [3.0, 1.0, 1.0], lr=2)
    drawn, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure) or real(figure, path))
    console = Console(file=io.StringIO(), width=200)
    compare.compare(compare.Options(runs, tmp_path / "x.png"), console=console)
    text = console.file.getvalue()
    assert {"a/run", "b/run", "lr", "0.500"} <= set(text.replace("┃", " ").replace("│", " ").split())
    assert "seed" not in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    axes = [axis for axis in drawn[0].axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes][:2] == ["training loss (next token)", "held-out text"]
    assert [line.get_label() for line in axes[0].lines] == ["a/run", "b/run"]
    assert list(axes[0].lines[1].get_xdata()) == pytest.approx([1e-4, 2e-4, 3e-4])
    assert len(axes[2].lines[0].get_xdata()) == 1  # a step without a gradient norm leaves its point out


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    run = written(tmp_path / "a", [1.0])
    assert compare.main([str(run), "--metrics", "nothing", "--out", str(tmp_path / "x.png")]) == 1
    assert "No run has the metric 'nothing': choose of gradient_norm, lm" in capsys.readouterr().err
    assert compare.main([str(tmp_path)]) == 1
    assert "holds no metrics.jsonl" in capsys.readouterr().err


# ---- plan


def test_public_anchors():
    """80B on 128 H100 without recomputation, and on 64 B300; no layout above the best public rate."""
    for gpus, gpu in ((128, "h100"), (64, "b300")):
        found = estimates(BIG, plan.Options(gpus=gpus, gpu=gpu))
        assert any(not one.layout.recompute and one.layout.expert == gpus for one in found)
        for one in found:
            assert one.tokens_per_gpu * training_flops(BIG, 4096) <= RATES[gpu].reached
            assert one.total <= RATES[gpu].memory
        speeds = [one.tokens_per_gpu for one in found]
        assert speeds == sorted(speeds, reverse=True)
    with pytest.raises(ValueError, match=r"Nothing fits on 8 h100 \(the least needs \d+ GB a GPU of 80\)"):
        estimates(BIG, plan.Options(gpus=8))


def test_memory_of_weights_is_counted():
    """Parameters of the model, the MTP layer's too: 16 bytes each over all GPUs, whatever the layout."""
    config, options = q.presets.tiny(), plan.Options(gpus=4, batch=8)
    parameters = sum(p.numel() for p in q.Qwen3Next(config).parameters())
    for layout in layouts(config, options):
        parts = memory_by_part(config, layout, options)
        assert (parts["weights and moments"] + parts["gradients"]) * 4 == pytest.approx(16 * parameters)


def test_activations_against_what_a_step_keeps():
    """Tensors that autograd saves in a small hybrid, outside of weights: the estimate is within a factor of 1.6.

    The estimate is for fused kernels in bf16; here chunks of the delta rule and fp32 are kept.
    """
    config = q.presets.tiny(num_hidden_layers=8, mtp_num_hidden_layers=0)
    model = q.Qwen3Next(config)
    model.set_backend("delta_rule", "chunked_recompute")
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(0, 256, (1, 512))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(ids)
    expected = plan.activation_bytes(config, Layout(1, 1, "")) * 512 * 2  # fp32
    assert expected / 1.6 < sum(kept.values()) < expected * 1.6


def test_recomputation_costs_time_and_saves_memory():
    options = plan.Options(gpus=128)
    one, mlp, everything = (estimate(BIG, Layout(128, 1, part), options) for part in ("", "mlp", "all"))
    assert one.total > mlp.total > everything.total
    assert one.tokens_per_gpu > mlp.tokens_per_gpu > everything.tokens_per_gpu
    assert math.isclose(one.days, 1e12 / (one.tokens_per_gpu * 128) / 86_400)


def test_what_a_plan_refuses(capsys):
    assert plan.main(["--preset", "nothing"]) == 1
    assert "There is no preset" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no rates for 'tpu'"):
        plan.Options(gpu="tpu")
    assert plan.main(["--preset", "tiny", "--gpus", "3", "--batch", "2"]) == 1
    assert "no layout divides this batch" in capsys.readouterr().err
