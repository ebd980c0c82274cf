"""The study end to end on tiny models: equal initial weights, kills, budgets, divergence, the report."""

import io
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import qwen3next as q
import recipes.study.run as study_run
from qwen3next.study import LINEAR_ROWS, ROWS, count
from recipes.gated_attention import main
from recipes.pretrain import Run
from recipes.study.arms import arm_config, arms_of, build
from recipes.study.checkpoint import arm_of, names_of, paper_figure
from recipes.study.claims import CLAIMS, ladder_runs, verdicts
from recipes.study.maps import draw_depths
from recipes.study.progress import StudyLive, last_step
from recipes.study.queue import Failed, parse_budget, run_all, with_steps
from recipes.study.run import run
from recipes.study.sizes import PRESETS, Preset, Size, softmax_model
from recipes.study.tasks import Which, refuse_what_does_not_fit, tasks_of
from recipes.training.report import read_metrics

CLOCK = {"elapsed", "seconds_per_step", "tokens_per_second", "flops_per_second"}


def nano(vocabulary):
    return softmax_model(2, 16, 2, 1, 24, vocab_size=vocabulary, head_dim=16)


def hybrid(vocabulary):
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    return nano(vocabulary).replace(
        model_type="qwen3_next",
        full_attention_interval=2,
        attention_gate="elementwise",
        linear_value_head_dim=8,
        **linear,
    )


TOY = Size(
    lambda _: softmax_model(1, 16, 2, 1, 24, vocab_size=65, head_dim=16),
    ("baseline", "g1_elementwise"),
    steps=6,
    batch_size=4,
    window=16,
    lr=3e-3,
    warmup=2,
    equal=False,
)
LM = Size(nano, ("baseline", "g1_elementwise"), 6, 4, 16, 3e-3, 1, tokens="bytes", looks=4)
TINY = Preset(
    toy=TOY,
    lm={"dense": LM, "hybrid": replace(LM, baseline=hybrid, arms=("gdn", "deltanet"))},
    ladder=replace(LM, rates=(1.0, 8.0), precisions=("fp32", "bf16")),
    extension={"longer": 2, "share": 0.5, "theta": 100.0, "yarn": 2},
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "cpu", TINY)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for i in range(40):
        (folder / f"{i}.py").write_text("".join(f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(9)))
    return str(folder)


def quiet() -> Console:
    return Console(file=io.StringIO())


def toy_tasks(out, arms=("baseline",), seeds=(0,), size=TOY):
    which = Which("cpu", "toy", arms, seeds, (), (), out, "cpu", None, None)
    return tasks_of(which, size, vocabulary=0)


def train(task):
    with StudyLive(quiet()) as live:
        return run(task, live=live, console=quiet())


def losses(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(folder)]


# ---- arms


@pytest.mark.parametrize("baseline, names", [(nano(50), ROWS), (hybrid(50), LINEAR_ROWS)], ids=["softmax", "hybrid"])
def test_what_arms_share_begins_bit_equal(baseline, names):
    """Parameters of the same name and shape are equal in all arms; other seeds differ."""
    assert arms_of(baseline) == [name for name in names if name != "more_experts"]
    first = dict(build(baseline, seed=1).named_parameters())
    for name in arms_of(baseline):
        model = build(arm_config(name, baseline, equal=False), seed=1)
        mine = dict(model.named_parameters())
        shared = [n for n in mine if n in first and mine[n].shape == first[n].shape]
        assert len(shared) > len(first) * 0.7
        for n in shared:
            assert torch.equal(mine[n], first[n]), (name, n)
        drawn = [n for n in mine if mine[n].ndim > 1 and n != "lm_head.weight" and "gate_constant" not in n]
        for n in drawn:
            expected = 0.02 if "conv" not in n else 1 / 48**0.5 * 2  # U(-1/2, 1/2) has 0.29
            assert mine[n].detach().std().item() == pytest.approx(expected, rel=0.5), n
    other = dict(build(baseline, seed=2).named_parameters())
    assert not torch.equal(other["embed_tokens.weight"], first["embed_tokens.weight"])
    assert not torch.equal(other["blocks.1.self_attn.q_proj.weight"], first["blocks.1.self_attn.q_proj.weight"])


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build(nano(50), seed=1)
    after = torch.get_rng_state()
    q.Qwen3Next(nano(50))  # uses random numbers, like any model
    assert not torch.equal(torch.get_rng_state(), before)
    assert after.shape == before.shape


def test_arms_of_text_have_equal_parameters():
    baseline = nano(300)
    for name in ("g1_elementwise", "g1_headwise", "more_query_heads", "output_norm"):
        config = arm_config(name, baseline, equal=True)
        assert abs(count(config) - count(baseline)) <= 0.5 * 2 * 3 * 16  # half a hidden unit in two layers
    with pytest.raises(ValueError, match="no arm 'gdn' here"):
        arm_config("gdn", baseline, equal=True)


def test_tasks_go_seed_by_seed_and_all_leaves_out_what_does_not_fit(tmp_path):
    tasks = toy_tasks(tmp_path, ("baseline", "g1_headwise"), (3, 1))
    assert [t.settings.out.name for t in tasks] == ["baseline-3", "g1_headwise-3", "baseline-1", "g1_headwise-1"]
    every = toy_tasks(tmp_path, ("all",), size=replace(LM, baseline=lambda _: nano(65)))
    arms = [t.arm for t in every]
    assert "g1_elementwise" in arms
    assert "switch_kv_8_top8" not in arms  # its projections alone are more than the feed-forwards
    with pytest.raises(ValueError, match=r"switch_kv_8_top8: .* would have to be .* to match the parameters"):
        toy_tasks(tmp_path, ("switch_kv_8_top8",), size=replace(LM, baseline=lambda _: nano(65)))
    with pytest.raises(ValueError, match="GiB for weights"):
        refuse_what_does_not_fit(tasks, 10**9, "cpu")
    refuse_what_does_not_fit(tasks, 2, "cpu")


def test_arms_see_the_same_data_in_the_same_order(tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    real = Run.step

    def step(self):
        batch = self.windows.batch(self.state.samples, 4)
        seen.setdefault(self.settings.out.name, []).append(batch.input_ids)
        return real(self)

    monkeypatch.setattr(Run, "step", step)
    for task in toy_tasks(tmp_path, ("baseline", "g1_elementwise"), (0, 1)):
        train(task)
    assert all(torch.equal(a, b) for a, b in zip(seen["baseline-0"], seen["g1_elementwise-0"], strict=True))
    assert not torch.equal(seen["baseline-0"][0], seen["baseline-1"][0])
    assert len(seen["baseline-0"]) == 6


# ---- running


def test_a_run_that_was_cut_off_goes_on_exactly(tmp_path, monkeypatch):
    (whole,) = with_steps(toy_tasks(tmp_path / "whole"), plan=tmp_path / "p", budget=None, jobs=1, console=quiet())
    result = train(whole)
    cut = replace(whole, settings=replace(whole.settings, out=tmp_path / "cut"))
    real = Run.step

    def step(self):
        if self.state.step == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.setattr(Run, "step", real)
    assert last_step(tmp_path / "cut") == 4
    again = train(cut)
    assert losses(tmp_path / "cut") == losses(whole.settings.out)
    assert again["final"] == result["final"]
    assert again["curve"]["first_token_attention"] == result["curve"]["first_token_attention"]
    assert not (tmp_path / "cut" / "checkpoints").exists()
    assert q.load(tmp_path / "cut" / "model").config.num_hidden_layers == 1


def test_a_finished_run_is_not_repeated_and_another_is_refused(tmp_path, monkeypatch):
    (task,) = toy_tasks(tmp_path)
    result = train(task)
    monkeypatch.setattr(study_run, "parts_of", lambda _: pytest.fail("trained again"))
    assert train(task) == result
    (tmp_path / "toy" / "baseline-0" / "result.json").unlink()
    with pytest.raises(ValueError, match="started with the setting lr"):
        train(replace(task, settings=replace(task.settings, lr=1.0)))


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    (task,) = toy_tasks(tmp_path)
    task.settings.out.mkdir(parents=True)
    with study_run.alone_in(task.settings.out), pytest.raises(ValueError, match="Another process uses"):
        train(task)


def test_divergence_is_a_result(tmp_path):
    (task,) = toy_tasks(tmp_path)
    result = train(replace(task, settings=replace(task.settings, lr=1e39, warmup=0)))
    assert result["diverged"] is not None
    assert result["final"] == {}
    assert result["steps"] < 6
    assert not (task.settings.out / "model").exists()
    json.dumps(result, allow_nan=False)


def test_results_name_what_they_are_of(tmp_path):
    (task,) = toy_tasks(tmp_path, ("g1_headwise",), (5,))
    result = train(task)
    assert (result["arm"], result["row"], result["seed"], result["kind"]) == ("g1_headwise", 10, 5, "toy")
    assert q.ModelConfig.from_dict(result["config"]).attention_gate == "headwise"
    assert result["settings"]["lr"] == 3e-3
    assert "commit" in result["machine"]
    assert "torch" in result["machine"]
    assert result["parameters"] == count(q.ModelConfig.from_dict(result["config"]))
    assert result["curve"]["step"][-1] == result["steps"] == 6
    assert {"gate_mean", "sink_rate", "copy_nats", "layers"} <= result["final"].keys()


# ---- budgets and processes


def test_budgets_are_read():
    assert [parse_budget(x) for x in ("90s", "20m", "1.5h", " 2 m ")] == [90, 1200, 5400, 120]
    for wrong in ("20", "m", "-5m", "0s", "1d", ""):
        with pytest.raises(ValueError, match="give seconds, minutes or hours"):
            parse_budget(wrong)


def test_a_budget_gives_every_run_as_many_steps(tmp_path, monkeypatch):
    """A step of the second arm takes twice as long; together the arms use the budget, and the plan is kept."""
    times = {"baseline": (0.01, 0.1), "g1_elementwise": (0.02, 0.1)}
    monkeypatch.setattr("recipes.study.queue.seconds_per_step", lambda task: times[task.arm])
    tasks = toy_tasks(tmp_path, ("baseline", "g1_elementwise"), (0, 1), replace(TOY, steps=10_000))
    planned = with_steps(tasks, plan=tmp_path / "plan.json", budget="100s", jobs=1, console=quiet())
    steps = {task.settings.steps for task in planned}
    expected = int((0.92 * 100 - 4 * 0.1 * 22) / 0.06)
    assert steps == {expected}
    assert planned[0].settings.eval_every == expected // 20
    more = with_steps(tasks[:1], plan=tmp_path / "plan.json", budget="1h", jobs=1, console=quiet())
    assert more[0].settings.steps == expected
    plenty = with_steps(tasks, plan=tmp_path / "other.json", budget="10h", jobs=1, console=quiet())
    assert plenty[0].settings.steps == 10_000
    with pytest.raises(ValueError, match=r"give \d+ minutes or more"):
        with_steps(tasks, plan=tmp_path / "third.json", budget="10s", jobs=1, console=quiet())
    assert not (tmp_path / "third.json").exists()


@pytest.mark.slow
def test_several_processes_and_a_kill(tmp_path):
    """Two at a time; the parent is killed, the workers stop, and the same call ends with the same losses."""
    size = replace(TOY, steps=400)
    tasks = toy_tasks(tmp_path / "killed", ("baseline", "g1_elementwise"), (0,), size)
    tasks = with_steps(tasks, plan=tmp_path / "plan.json", budget=None, jobs=2, console=quiet())
    child = multiprocessing.get_context("spawn").Process(target=_run_all, args=(tasks,))
    child.start()
    deadline = time.monotonic() + 120
    while min(last_step(task.settings.out) for task in tasks) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    while time.monotonic() < deadline:  # until the workers have stopped
        try:
            for task in tasks:
                with study_run.alone_in(task.settings.out):
                    pass
            break
        except ValueError:
            time.sleep(0.05)
    assert not any((task.settings.out / "result.json").is_file() for task in tasks)
    run_all(tasks, jobs=2, console=quiet())
    for task in tasks:
        other = replace(task, settings=replace(task.settings, out=tmp_path / "whole" / task.arm))
        train(other)
        assert losses(task.settings.out) == losses(other.settings.out)


def _run_all(tasks):
    run_all(tasks, jobs=2, console=quiet())


@pytest.mark.slow
def test_a_process_that_fails_is_told(tmp_path):
    tasks = toy_tasks(tmp_path, ("baseline", "g1_elementwise"))
    broken = replace(tasks[1], text=tmp_path / "nowhere")
    with pytest.raises(Failed, match=r"g1_elementwise, seed 0 failed: ValueError: No tokenizer"):
        run_all([tasks[0], broken], jobs=2, console=quiet())


# ---- claims


def result_of(kind, arm, seed, **final):
    training = {"spikes": 0, "outliers": 0, "loss": final.pop("loss", 1.0)}
    more = {"rate": final.pop("rate", 1.0), "precision": "fp32", "diverged": final.pop("diverged", None)}
    return {"kind": kind, "arm": arm, "seed": seed, "final": final, "training": training, **more}


def test_signs_are_counted_by_seed():
    runs = [result_of("toy", "baseline", s, first_token_attention=x) for s, x in enumerate((0.5, 0.4, 0.3))]
    runs += [result_of("toy", "g1_elementwise", s, first_token_attention=x) for s, x in enumerate((0.1, 0.6, 0.3, 0.2))]
    (verdict,) = (v for v in verdicts(runs) if v.claim.metric == "first_token_attention")
    assert (verdict.claim.arm, verdict.claim.against) == ("g1_elementwise", "baseline")
    assert verdict.claim.paper == (0.048, 0.467)
    assert verdict.seeds == (0, 1, 2)  # the fourth seed has no baseline
    assert verdict.arm == (0.1, 0.6, 0.3)
    assert verdict.agree == 1  # equal is not smaller


def test_claims_are_of_arms_that_exist_and_said_as_the_paper_prints_them():
    for claim in CLAIMS:
        assert {claim.arm, claim.against} <= ROWS.keys() | LINEAR_ROWS.keys()
        if isinstance(claim.paper, tuple) and claim.metric != "val_nats":
            assert claim.paper[0] < claim.paper[1], claim
    assert {c.arm for c in CLAIMS if c.metric == "val_nats"} >= {n for n, r in ROWS.items() if r.number > 1}


def test_the_ladder_is_joined_over_its_rates():
    runs = [result_of("ladder", "baseline", 0, rate=r, loss=x) for r, x in ((1.0, 2.0), (2.0, 1.5), (8.0, 4.0))]
    runs += [result_of("ladder", "g1_elementwise", 0, rate=r, loss=x) for r, x in ((1.0, 2.0), (8.0, 2.25))]
    runs += [result_of("ladder", "sandwich_norm", 0, rate=r, loss=2.0, diverged=d) for r, d in ((1.0, None), (8.0, 3))]
    joined = {run["arm"]: run["final"]["rate_penalty"] for run in ladder_runs(runs)}
    assert joined == {"baseline": 2.5, "g1_elementwise": 0.25, "sandwich_norm": float("inf")}
    found = {v.claim.arm: v.agree for v in verdicts(ladder_runs(runs)) if v.claim.metric == "rate_penalty"}
    assert found == {"g1_elementwise": 1, "sandwich_norm": 0}


def test_a_checkpoint_is_known_by_its_gate():
    base = nano(50)
    assert arm_of(base) == "baseline"
    assert arm_of(ROWS["g1_headwise"].of(base)) == "g1_headwise"
    assert arm_of(ROWS["g1_head_shared"].of(base)) == "g1_head_shared"
    assert arm_of(ROWS["g2_headwise"].of(base)) == "another"
    assert paper_figure("first_token_attention", "baseline") == 0.467
    assert paper_figure("gate_mean", "g1_headwise") == 0.172
    assert paper_figure("value_norm_ratio", "baseline") is None


# ---- the command line


def study(*words):
    return main([str(word) for word in words])


@pytest.mark.slow
def test_the_whole_study(tmp_path, source, capsys):
    """Every command writes its files, with the results of the runs."""
    out = ("--out", tmp_path, "--jobs", 1)
    assert study("toy", "--seeds", 0, 1, *out) == 0
    assert study("lm", "--data", source, *out) == 0
    assert study("lm", "--data", source, "--model", "hybrid", *out) == 0
    assert study("ladder", "--data", source, *out) == 0
    assert study("extrapolate", "--data", source, *out) == 0
    assert study("report", "--out", tmp_path) == 0
    report = tmp_path / "report"
    pictures = {path.name for path in report.glob("*.png")}
    assert pictures == {
        *(f"{what}-{kind}.png" for what in ("curves", "bars", "maps") for kind in ("toy", "lm-dense")),
        "curves-lm-hybrid.png",
        "bars-lm-hybrid.png",
        "ladder.png",
        "extension.png",
    }
    assert all((report / name).stat().st_size > 8000 for name in pictures)
    runs = json.loads((report / "results.json").read_bytes())["runs"]
    assert len(runs) == 4 + 2 + 2 + 8 + 2
    for written in runs:
        kept = json.loads((tmp_path / written["folder"] / "result.json").read_bytes())
        assert written["curve"] == kept["curve"]
    table = (report / "table.md").read_text()
    found = [line for line in table.splitlines() if line.startswith("| attention on the first token")]
    (row,) = (line for line in found if "| toy |" in line)
    assert "| g1_elementwise | baseline | 0.048, 0.467 | toy |" in row
    assert row.endswith(" of 2 |")
    assert "| held-out loss (nats per token) | gdn | deltanet | 27.35, 30.87 (perplexity) | lm-hybrid |" in table
    maps = json.loads((report / "maps-toy.json").read_bytes())
    assert maps["maps"].keys() == {"baseline", "g1_elementwise"}
    lengths = json.loads((tmp_path / "extension" / "baseline-0" / "lengths.json").read_bytes())
    assert lengths["edges"] == [1, 8, 16, 32, 64]  # windows of 16, twice as long, and with YaRN twice as long again
    assert lengths["plain"][:3] != lengths["yarn"][:3]
    (extended,) = (run["final"] for run in runs if run["folder"] == "extension/baseline-0")
    assert extended["yarn_cost"] == pytest.approx(lengths["yarn"][2] - lengths["plain"][2], abs=1e-6)
    assert extended["rise"] == pytest.approx(lengths["yarn"][3] - lengths["plain"][2], abs=1e-6)
    capsys.readouterr()

    models = [tmp_path / "lm-dense" / f"{arm}-0" / "model" for arm in ("baseline", "g1_elementwise")]
    measured = ("--data", source, "--window", 16, "--sequences", 5)
    assert study("report", "--checkpoint", *models, "--out", tmp_path, *measured) == 0
    printed = capsys.readouterr().out
    assert "g1_elementwise-0: 5 windows of 16 tokens; as the study's g1_elementwise" in printed
    assert "paper 0.048" in printed
    found = json.loads((report / "g1_elementwise-0.json").read_bytes())
    assert found["arm"] == "g1_elementwise"
    assert found["windows"] == 5
    shares = json.loads((report / "g1_elementwise-0-maps.json").read_bytes())
    assert shares["first_token"].keys() == {"0", "1"}
    side_by_side = json.loads((report / "checkpoints-maps.json").read_bytes())
    layer = str(side_by_side["layer"])
    assert side_by_side["first_token"]["g1_elementwise-0"] == shares["first_token"][layer]
    table = (report / "checkpoints.md").read_text().splitlines()
    assert table[0] == "| figure | baseline-0 | g1_elementwise-0 |"
    value = f"{found['first_token_attention']:.4g} (paper 0.048)"
    assert next(line for line in table if line.startswith("| first token")).endswith(f" | {value} |")
    pictures = ("baseline-0-maps", "g1_elementwise-0-maps", "checkpoints-maps")
    assert all((report / f"{name}.png").stat().st_size > 8000 for name in pictures)


def test_seeds_of_another_machine_are_told_with_those_here(tmp_path, capsys):
    """Only its results.json is needed; a run in both places counts once, with the folder's result."""
    there, here = tmp_path / "there", tmp_path / "here"
    for out, seeds in ((there, (0, 1)), (here, (1, 2))):
        assert study("toy", "--seeds", *seeds, "--out", out, "--jobs", 1) == 0
        assert study("report", "--out", out) == 0
    other = there / "report" / "results.json"
    changed = json.loads(other.read_bytes())
    for run_there in changed["runs"]:
        run_there["finished"] = "there"
    other.write_text(json.dumps(changed))
    assert study("report", "--out", here, "--also", other) == 0
    joined = json.loads((here / "report" / "results.json").read_bytes())["runs"]
    assert [r["folder"] for r in joined] == [
        f"toy/{arm}-{s}" for arm in ("baseline", "g1_elementwise") for s in (0, 1, 2)
    ]
    assert [r["finished"] == "there" for r in joined] == [True, False, False] * 2
    (row,) = (
        line
        for line in (here / "report" / "table.md").read_text().splitlines()
        if line.startswith("| attention on the first token")
    )
    assert row.endswith(" of 3 |")
    assert study("report", "--out", tmp_path / "nothing_ran_here", "--also", here / "report" / "results.json") == 0
    capsys.readouterr()

    changed["runs"][0]["settings"]["steps"] = 7
    other.write_text(json.dumps(changed))
    assert study("report", "--out", here, "--also", other) == 1
    assert "toy/baseline-0 and toy/baseline-1 differ in steps (7 and 6)" in capsys.readouterr().err
    del changed["runs"][0]["curve"]
    for content in (json.dumps(changed), "[]", "{"):
        other.write_text(content)
        assert study("report", "--out", here, "--also", other) == 1
        assert "is not the results.json of a report" in capsys.readouterr().err


@pytest.mark.parametrize("layers, shown", [(28, (0, 6, 20, 27)), (4, (0, 2, 3)), (1, (0,))])
def test_attention_is_drawn_in_the_layers_that_the_study_shows(tmp_path, layers, shown):
    averages = {i: torch.full((4, 4), 1 / (i + 1)).tril() for i in range(layers)}
    draw_depths("1B", averages, list("abcd"), tmp_path / "maps.png")
    written = json.loads((tmp_path / "maps.json").read_bytes())
    assert written["maps"].keys() == {str(i) for i in shown}
    assert written["first_token"] == pytest.approx({str(i): 1 / (i + 1) for i in range(layers)}, abs=1e-6)


def test_checkpoints_are_named_as_shortly_as_tells_them_apart(tmp_path):
    a, b = tmp_path / "one" / "base-0" / "model", tmp_path / "two" / "base-0" / "model"
    for folder in (a, b):
        folder.mkdir(parents=True)
    hub = Path("owner/name/1B_baseline")
    assert names_of([a, hub]) == ["base-0", "1B_baseline"]
    assert names_of([a, b]) == ["one-base-0", "two-base-0"]
    with pytest.raises(ValueError, match="named twice"):
        names_of([a, a])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("toy", "--arms", "g9"), "There is no arm 'g9' here: choose baseline, "),
        (("toy", "--budget", "5"), "budget is '5'"),
        (("toy", "--budget", "1s", "--jobs", "1"), "too few for a result"),
        (("toy", "--jobs", "0"), "jobs is 0: give 1 or more."),
        (("lm", "--data", "/nowhere"), "There is nothing at /nowhere"),
        (("lm", "--model", "moe"), "has no moe model: choose dense, hybrid."),
        (("ladder", "--precisions", "fp8", "--dry-run"), "'fp8' is not a precision"),
        (("ladder", "--rates", "-1", "--dry-run"), "-1 is not a precision or rate"),
        (("report",), "There are no finished runs"),
        (("report", "--checkpoint", "{out}"), "No tokenizer at"),
    ],
)
def test_what_cannot_run_is_said_in_a_sentence(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.study.queue.seconds_per_step", lambda task: (1.0, 1.0))
    words = [word.format(out=tmp_path) for word in words]
    assert study(*words, "--out", tmp_path / "out") == 1
    assert sentence in capsys.readouterr().err


def test_a_dry_run_makes_nothing(tmp_path, capsys):
    assert study("lm", "--dry-run", "--out", tmp_path / "out") == 0
    assert "lm-dense: 2 runs (baseline, g1_elementwise)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_extending_what_is_not_there(tmp_path, source, capsys):
    assert study("extrapolate", "--data", source, "--out", tmp_path) == 1
    assert "is not finished, so there is nothing to extend" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tmp_path):
    """Equal to fp32 rounding, because kernels are fused. In a separate process, without conftest.py's checks."""
    (task,) = toy_tasks(tmp_path / "plain")
    compiled = replace(task, compiled=True, settings=replace(task.settings, out=tmp_path / "compiled"))
    child = multiprocessing.get_context("spawn").Process(target=_train_all, args=([task, compiled],))
    child.start()
    child.join()
    assert child.exitcode == 0
    for a, b in zip(losses(task.settings.out), losses(tmp_path / "compiled"), strict=True):
        assert a["lm"] == pytest.approx(b["lm"], rel=1e-5)


def _train_all(tasks):
    for task in tasks:
        train(task)


def test_presets_name_arms_that_their_models_have():
    for preset in ("gpu", "paper"):
        for size in (PRESETS[preset].toy, *PRESETS[preset].lm.values(), PRESETS[preset].ladder):
            baseline = size.baseline(1000)
            for arm in size.arms:
                arm_config(arm, baseline, equal=size.equal, multiple_of=size.multiple_of)
