"""The evidence recipe: its task, its arms, its axes, and calls that are killed, each on a few steps."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from recipes import evidence
from recipes.training.documents import digest, share_of
from recipes.training.evaluation import gates
from recipes.training.flops import training_flops
from recipes.training.report import read_metrics

QUIET = Console(file=io.StringIO())


@pytest.fixture
def text(tmp_path):
    """A folder with four documents of random letters, one of which is held out."""
    folder, side = tmp_path / "texts", {True: 0, False: 0}
    folder.mkdir()
    for number in range(3000):
        letters = np.random.default_rng(number).integers(97, 123, 3000).astype(np.uint8).tobytes()
        held_out = share_of(digest(letters.decode()), 0) < 0.005
        if side[held_out] < (1 if held_out else 3):
            (folder / f"{number}.txt").write_bytes(letters)
            side[held_out] += 1
    assert side == {True: 1, False: 3}
    return str(folder)


def run_one(options, experiment, name, monkeypatch):
    """Run one arm of one experiment; its row."""
    arms = [arm for arm in evidence.EXPERIMENTS[experiment]() if arm.name == name]
    monkeypatch.setitem(evidence.EXPERIMENTS, experiment, lambda: arms)
    found = evidence.run(replace(options, only=(experiment,)), console=QUIET)
    return found["results"][experiment][name][str(options.seeds[0])]


# ---- the task


def test_pairs():
    """Every key comes four times, always with one value; only the values of the later three are predicted."""
    batch = evidence.Pairs(64, 5).batch(7, 3)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        value = dict(zip(ids[:16:2], ids[1:16:2], strict=True))
        assert len(value) == 8
        assert max(value) <= evidence.KINDS < min(value.values())
        for again in range(16, 64, 16):
            assert set(ids[again : again + 16 : 2]) == set(value)
        assert ids[17::2] == [value[key] for key in ids[16::2]] == labels[17::2]
        assert set(labels[:16] + labels[16::2]) == {-100}
    assert torch.equal(evidence.Pairs(64, 5).batch(8, 1).input_ids, batch.input_ids[1:2])


# ---- arms


@pytest.mark.parametrize("experiment", ["mixers", "share", "recall", "optimizers", "balance"])
def test_arms_have_equal_parameters(experiment):
    """Within 1.2 %, as the page says, for experts have whole widths; counted in the model itself."""
    sizes = [
        sum(p.numel() for p in evidence.new_model(arm, 0).parameters()) for arm in evidence.EXPERIMENTS[experiment]()
    ]
    assert max(sizes) - min(sizes) < 0.012 * max(sizes)


def test_sizes_grow():
    small, middle, large = [evidence._size(arm.config) for arm in evidence.sizes()]
    assert 3 * small < middle < large / 3
    assert large <= 3e6


def test_share_of_softmax_layers():
    """As many softmax layers as the name says, in the model itself."""
    for experiment in (evidence.share, evidence.recall):
        for arm in experiment():
            kinds = evidence.new_model(arm, 0).config.layer_types
            assert kinds.count("full_attention") == int(arm.name[0])


def test_slow_decays():
    """From zero input a head keeps exp(-A dt) with dt from 0.001 to 0.1; the library's own start forgets faster."""
    slow, fast = (evidence.new_model(arm, 3) for arm in (a for a in evidence.recall() if a.name.startswith("0 of 4")))
    for name, p in slow.named_parameters():  # only the decays differ
        assert torch.equal(p, fast.get_parameter(name)) != name.endswith("dt_bias")
    kept = []
    for model in (slow, fast):
        layers = [layer for layer in model.modules() if isinstance(layer, GatedDeltaNet)]
        kept.append(torch.cat([torch.nn.functional.softplus(layer.dt_bias) for layer in layers]))
    assert kept[0].min() > 0.99e-3
    assert kept[0].max() < 0.101
    assert kept[1].min() > 1
    again = evidence.new_model(evidence.recall()[0], 3)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in slow.named_parameters())


def test_equal_arms_share_a_run(tmp_path):
    """Same model, settings and seed: one folder. Any difference: another."""
    options = evidence.Options(tmp_path)
    arms = {(e, arm.name): arm for e, of in evidence.EXPERIMENTS.items() for arm in of()}

    def folder(experiment, name, options=options, seed=0):
        return evidence.settings_of(options, experiment, arms[experiment, name], seed).out.name

    same = [("sizes", "width 64"), ("mixers", "hybrid 3:1"), ("share", "1 of 4"), ("optimizers", "adamw, lr 0.004")]
    assert len({folder(*one) for one in same}) == 1
    assert folder("mixers", "attention") == folder("share", "4 of 4")
    assert len({folder(*one) for one in arms}) == len(arms) - 5
    base = folder(*same[0])
    changed = folder(*same[0], replace(options, steps=7)), folder(*same[0], replace(options, data="x"))
    assert len({base, *changed, folder(*same[0], seed=1)}) == 4


# ---- runs


def test_the_axis_is_the_counted_formula(tmp_path, text, monkeypatch):
    """Operations of a token by recipes/training/flops.py, times the tokens so far, beside the loss measured there."""
    options = evidence.Options(tmp_path / "out", seeds=(3,), steps=5, data=text)
    row = run_one(options, "sizes", "width 32", monkeypatch)
    folder = tmp_path / "out" / "runs" / row["run"]
    model = q.load(folder / "model")
    assert row["parameters"] == sum(p.numel() for p in model.parameters()) == evidence._size(evidence.SMALLER)
    a_token = training_flops(model.config, 256)
    steps = [one for one in read_metrics(folder) if "val_bits_per_byte" in one]
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5]
    assert row["curve"] == [[a_token * 1024 * one["step"], one["val_bits_per_byte"]] for one in steps]
    assert row["training_teraflop"] == pytest.approx(a_token * 5 * 1024 / 1e12)
    (speed,) = json.loads((tmp_path / "out" / "speed.json").read_bytes()).values()
    assert f"{speed:,.0f} |" in (tmp_path / "out" / "evidence.md").read_text()


@pytest.mark.parametrize(("experiment", "name"), [("balance", "over the batch"), ("recall", "1 of 4")])
def test_a_killed_run_goes_on(experiment, name, tmp_path, text, monkeypatch):
    """Killed between two saved states: the losses and measures are those of a run that was not killed."""
    of, real, steps = evidence.EXPERIMENTS[experiment], evidence.Run.step, []

    def killed(self):
        if self.state.step == 3:
            raise KeyboardInterrupt
        steps.append(self.state.step)
        return real(self)

    rows, losses = [], []
    for folder in ("killed", "whole"):
        options = evidence.Options(tmp_path / folder, seeds=(1,), steps=4, recall_steps=4, data=text)
        monkeypatch.setitem(evidence.EXPERIMENTS, experiment, of)
        if folder == "killed":
            monkeypatch.setattr(evidence.Run, "step", killed)
            with pytest.raises(KeyboardInterrupt):
                run_one(options, experiment, name, monkeypatch)
            monkeypatch.setattr(evidence.Run, "step", real)
            monkeypatch.setitem(evidence.EXPERIMENTS, experiment, of)
            assert steps == [0, 1, 2]
        rows.append(run_one(options, experiment, name, monkeypatch))
        losses.append([one["lm"] for one in read_metrics(tmp_path / folder / "runs" / rows[-1]["run"])])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    for key in rows[0].keys() - {"cpu_seconds"}:
        assert rows[0][key] == rows[1][key], key


@pytest.mark.slow
def test_evidence_goes_on_and_shows_the_spread(tmp_path, monkeypatch):
    """A call that was killed between runs makes only the others; the page has every arm with its seeds."""
    options = evidence.Options(tmp_path, only=("recall",), seeds=(0, 1), recall_steps=2)
    real, made = evidence._recall_run, []

    def counted(settings, arm):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(settings.out)
        return real(settings, arm)

    monkeypatch.setattr(evidence, "_recall_run", counted)
    with pytest.raises(KeyboardInterrupt):
        evidence.run(options, console=QUIET)
    assert (tmp_path / "evidence.md").read_text().count("\n| ") == 4  # the head and three arms
    first = [(folder / "evidence.json").stat().st_mtime_ns for folder in made]
    monkeypatch.setattr(evidence, "_recall_run", real)
    found = evidence.run(options, console=QUIET)
    assert [(folder / "evidence.json").stat().st_mtime_ns for folder in made] == first
    assert {arm: list(seeds) for arm, seeds in found["results"]["recall"].items()} == {
        arm.name: ["0", "1"] for arm in evidence.recall()
    }
    assert " to " in (tmp_path / "evidence.md").read_text()
    assert (tmp_path / "recall.png").is_file()


def test_what_options_refuse():
    with pytest.raises(ValueError, match="no experiment 'x'"):
        evidence.Options(only=("x",))
    with pytest.raises(ValueError, match="steps and recall_steps must be 1 or more"):
        evidence.Options(recall_steps=0)


def test_speeds(tmp_path, monkeypatch):
    """The tokens of a step over the least time of the rounds; measured once, for arms that are equal too."""
    options, clock, calls = evidence.Options(tmp_path), [0.0], []
    times = iter([5.0, 2.0, 3.0])

    def step(settings, arm):
        calls.append(arm.name)
        return lambda: clock.__setitem__(0, clock[0] + next(times))

    monkeypatch.setattr(evidence, "_step", step)
    monkeypatch.setattr(evidence.time, "process_time", lambda: clock[0])
    arms = {"sizes": evidence.sizes()[1:2], "share": evidence.share()[1:2]}
    found = evidence.speeds(options, arms, rounds=3)
    assert found == {"sizes": {"width 64": 512.0}, "share": {"1 of 4": 512.0}}
    assert evidence.speeds(options, arms) == found
    assert len(calls) == 1


# ---- the page


def made_up():
    """Results of two experiments that share a run, with two seeds."""

    def row(run, bits, **more):
        curve = [[1e9, 2 * bits], [2e9, bits]]
        return {"bits_per_byte": bits, "parameters": 5, "cpu_seconds": 60.0, "run": run, "curve": curve} | more

    text = {"a": {"0": row("t-0", 3.0), "1": row("t-1", 4.0)}}
    pairs = {"a": {"0": {"recall": 0.25, "parameters": 5, "cpu_seconds": 60.0, "run": "p-0"}}}
    return {"sizes": text, "share": text, "recall": pairs}


def test_page_counts_a_shared_run_once():
    speed = {"sizes": {"a": 1234.0}}
    found = {"options": {"steps": 1, "recall_steps": 2}, "machine": "here", "results": made_up(), "speed": speed}
    page = evidence.page(found)
    assert "3 runs, 3 CPU minutes" in page
    assert "3.500 (3.000 to 4.000)" in page
    assert page.count("1,234") == 1
    assert json.dumps(found)  # evidence.json can be written


def test_pictures(tmp_path, monkeypatch):
    """Loss over operations on a logarithmic axis with a line a seed; the share's loss with recall beside it."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, real = {}, Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.update({path.stem: figure}) or real(figure, path))
    evidence.draw(made_up(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sizes.png", "share.png", "recall.png"}
    (axis,) = drawn["sizes"].axes
    assert axis.get_xscale() == "log"
    assert [list(line.get_ydata()) for line in axis.lines] == [[6.0, 3.0], [8.0, 4.0]]
    assert [list(line.get_xdata()) for line in axis.lines] == [[1e9, 2e9]] * 2
    titles = [one.get_title() for one in drawn["share"].axes]
    assert titles == ["held-out bits per byte", "share of values recalled"]
    assert [list(line.get_ydata()) for line in drawn["share"].axes[0].lines] == [[3.0, 4.0]]


# ---- looking at gates


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_gates_of_a_model_with_one_kind_of_layer(kind):
    """The MTP layer's gate counts for nothing: it does not run when text is scored."""
    model = q.Qwen3Next(q.presets.tiny(layer_types=[kind] * 4))
    assert model.mtp is not None
    ids = torch.zeros(2, 8, dtype=torch.long)

    class One:
        def __iter__(self):
            return iter([evidence.Batch(ids, torch.zeros_like(ids))])

    expected = {"attention_gate"} if kind == "full_attention" else {"decay", "write_strength"}
    assert set(gates(model, One(), precision="fp32")) == expected
