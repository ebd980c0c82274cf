"""Pretraining: equal losses after any kill, gradient accumulation, clear errors when a run cannot continue."""

import errno
import io
import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import layers.recompute
import qwen3next as q
import recipes.pretrain as pretrain
import recipes.training.checkpoints as checkpoints
from layers.cpp import cpu
from layers.segments import Segments
from recipes.training.checkpoints import newest, read_state
from recipes.training.data import Batch, PackedWindows, ValidationBatches
from recipes.training.report import Live, read_metrics, smoothed
from recipes.training.settings import Settings, pick_precision, recorded
from recipes.training.steps import accumulate_gradients, held_out_nats, learning_rate, parameter_groups
from recipes.training.tokenizer import load_tokenizer

NANO = q.presets.tiny(
    num_hidden_layers=2,
    full_attention_interval=2,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
# A new process with torch already imported, forked within milliseconds from a server without threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recipes.pretrain", "torch._dynamo", "matplotlib.figure"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A model of 30 thousand parameters on a corpus of a few kilobytes; the test sets `out`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i in range(12):
        lines = (f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(5 + 3 * i))
        (folder / "text" / f"{i}.py").write_text("".join(lines))
    (folder / "nano.json").write_text(json.dumps(NANO.to_dict()))
    return Settings(
        data=str(folder / "text"),
        tokenizer="bytes",
        preset=str(folder / "nano.json"),
        steps=8,
        batch_size=2,
        window=32,
        warmup=2,
        save_every=3,
        eval_every=4,
        tensorboard=False,
        precision="fp32",  # "auto" depends on the processor
        out=folder / "unused",
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


def losses(out: Path) -> list[dict]:
    """The metrics that must not depend on interruptions: all except times."""
    clock = {"elapsed", "seconds_per_step", "tokens_per_second", "flops_per_second"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in q.load(out / "model").named_parameters()}


def process(settings: Settings, fault: tuple[str, int] | None = None) -> PROCESSES.Process:
    return PROCESSES.Process(target=run_with_fault, args=(settings, fault))


def finish(child: PROCESSES.Process) -> int | None:
    child.start()
    child.join(120)
    return child.exitcode


def run_with_fault(settings: Settings, fault: tuple[str, int] | None) -> None:
    """Train in a separate process that kills itself when it reaches a place for the n-th time."""
    torch.set_num_threads(1)
    if fault is not None:
        _plant(*fault)
    pretrain.train(settings, console=quiet())


def _plant(place: str, times: int) -> None:
    left = [times]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name, *, before=None, after=None):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if before and due():
                before(*args)
            result = real(*args, **kwargs)
            if after and due():
                after(*args)
            return result

        setattr(owner, name, wrapped)

    def half_a_file(tensors, path, *_):
        Path(path).write_bytes(b"\x10\x00\x00")
        die()

    def half_a_line(metrics, row):
        metrics.file.write(json.dumps(row)[:20])
        metrics.file.flush()
        die()

    plants = {
        "step": lambda: wrap(pretrain.Run, "step", after=lambda *_: die()),
        "line": lambda: wrap(pretrain.Metrics, "add", before=half_a_line),
        "file": lambda: wrap(checkpoints, "save_file", before=half_a_file),
        "synced": lambda: wrap(checkpoints, "_sync", after=lambda *_: die()),  # sync of the file, then of its folder
        "forget": lambda: wrap(checkpoints, "_forget", before=lambda *_: die()),
        "model": lambda: wrap(q.Qwen3Next, "save_pretrained", before=lambda *_: die()),
        "result": lambda: wrap(pretrain, "draw_loss", before=lambda *_: die()),
    }
    plants[place]()


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(process(replace(settings, out=out))) == 0
    return out


# ---- killed and resumed


@pytest.mark.parametrize(
    "place, times",
    [
        ("step", 4),
        ("line", 5),
        ("file", 2),
        ("synced", 3),
        ("model", 1),
        *(
            pytest.param(*fault, marks=pytest.mark.slow)
            for fault in (
                ("step", 1),
                ("file", 1),
                ("synced", 1),
                ("synced", 2),
                ("synced", 4),
                ("forget", 1),
                ("result", 1),
            )
        ),
    ],
)
def test_killed_and_resumed_equals_never_killed(settings, whole, tmp_path, place, times):
    """SIGKILL at a chosen place, then one resume: losses, gradient norms and weights are bit-equal."""
    run = replace(settings, out=tmp_path / "run")
    assert finish(process(run, (place, times))) == -signal.SIGKILL
    for path in (run.out / "checkpoints").glob("step-*"):
        read_state(path)
    assert finish(process(replace(run, resume=True))) == 0
    assert losses(run.out) == losses(whole)
    after = weights(run.out)
    assert all(torch.equal(after[name], p) for name, p in weights(whole).items())
    names = sorted(path.name for path in (run.out / "checkpoints").iterdir())
    # A run killed before it deletes old states keeps one more state if it saves no other one.
    assert names[-2:] == ["step-00000006.safetensors", "step-00000008.safetensors"]
    assert len(names) == (3 if place == "forget" else 2)


def test_killed_and_resumed_in_bf16(settings, tmp_path):
    """The same with products in bf16, on any processor."""
    found = []
    for name, fault in (("whole", None), ("killed", ("step", 4))):
        run = replace(settings, out=tmp_path / name, precision="bf16", steps=5)
        assert finish(process(run, fault)) == (-signal.SIGKILL if fault else 0)
        if fault:
            assert finish(process(replace(run, resume=True))) == 0
        found.append(losses(run.out))
    assert found[0] == found[1]


@pytest.fixture
def one_thread():
    """As `whole` was trained: the number of threads decides the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_loss(settings, whole, tmp_path, precision, monkeypatch):
    """Losses, gradient norms and weights of a run that keeps everything, to the last bit."""
    made, real = [], layers.recompute.checkpoint
    monkeypatch.setattr(
        layers.recompute, "checkpoint", lambda run, *args, **options: made.append(run) or real(run, *args, **options)
    )
    kept = whole
    if precision == "bf16":
        kept = tmp_path / "kept"
        pretrain.train(replace(settings, out=kept, precision=precision), console=quiet())
    assert not made
    run = replace(settings, out=tmp_path / "run", precision=precision)
    run = replace(run, recompute=("linear_attention", "full_attention", "mlp"))
    pretrain.train(run, console=quiet())
    assert made
    assert recorded(run.out) == replace(run, resume=True)
    assert losses(run.out) == losses(kept)
    after = weights(run.out)
    assert all(torch.equal(after[name], p) for name, p in weights(kept).items())


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_recomputes_what_it_did_or_what_is_given(settings, whole, tmp_path, monkeypatch):
    run, chosen = replace(settings, out=tmp_path / "run", recompute=("mlp",)), []
    assert finish(process(run, ("step", 4))) == -signal.SIGKILL
    path, real = newest(run.out / "checkpoints"), q.Qwen3Next.recompute
    state = path.read_bytes()
    monkeypatch.setattr(q.Qwen3Next, "recompute", lambda model, *parts: chosen.append(parts) or real(model, *parts))
    for given, expected in (
        ([], ("mlp",)),
        (["--recompute", "linear_attention", "full_attention"], ("linear_attention", "full_attention")),
        (["--recompute"], ()),
    ):
        for later in (run.out / "checkpoints").glob("step-*"):
            later.unlink()
        path.write_bytes(state)
        assert pretrain.main(["--resume", "--out", str(run.out), *given]) == 0
        assert chosen.pop() == recorded(run.out).recompute == expected
        assert losses(run.out) == losses(whole)


class Timed(pretrain.Run):
    """A run whose clock advances only in steps, validations and saves; `slowness` is the seconds of a step."""

    def __init__(self, settings, slowness, monkeypatch, *, state=None, look=10, save=0.5):
        self.now, self.rates, self.totals, self.saved, self.slowness = 0.0, [], [], [], slowness
        self.settings, self.steps_of_a_look, self.save_takes, self.looks_after = settings, look, save, 3.0
        self.state = checkpoints.TrainingState({}, {}, "", 1) if state is None else state
        self.metrics = self.live = SimpleNamespace(add=self.note, show=lambda *_: None)
        self.model = None
        monkeypatch.setattr(pretrain.time, "perf_counter", lambda: self.now)

    def note(self, row):
        pass

    __repr__ = object.__repr__

    def step(self):
        self.rates.append(learning_rate(self.state.step, self.state.total, self.settings))
        self.totals.append(self.state.total)
        self.now += self.slowness(self.state.step)
        self.state.step += 1
        return {"step_tokens": 1}

    def look(self, _model):
        """Slowed down like steps."""
        self.now += self.steps_of_a_look * self.slowness(self.state.step)
        return {}

    def _save(self):
        self.now += self.save_takes
        self.saved.append(replace(self.state))

    def whole(self):
        """Seconds until the final measurement has ended."""
        self.to_the_end()
        return self.now + self.looks_after * self.steps_of_a_look * self.slowness(self.state.step)


def slow_from(begin, factor):
    return lambda step: factor if step >= begin else 0.1


SLOWNESS = {
    "steady": slow_from(0, 0.1),
    "slower from the middle": slow_from(1000, 0.4),
    "much slower from the middle": slow_from(1000, 2.0),
    "slower near the end": slow_from(1700, 0.5),
    "slow at first, then free": lambda step: 0.5 if step < 60 else 0.1,
    "slower and slower": lambda step: 0.1 + step / 5000,
    "in bursts": lambda step: 0.3 if step // 15 % 2 else 0.1,
}


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("slowness", SLOWNESS.values(), ids=SLOWNESS)
def test_minutes_are_kept(settings, monkeypatch, slowness, schedule):
    """With changing other work, validations, saves and the final measurement, a run ends within 3% of its minutes."""
    timed = replace(settings, steps=None, minutes=4.0, save_every=100, eval_every=100, schedule=schedule)
    run = Timed(timed, slowness, monkeypatch)
    assert run.whole() == pytest.approx(240, rel=0.03)
    steps = run.state.step
    assert run.totals[-1] == steps
    floor = {"wsd": 5 / steps, "cosine": 0.1 + 1e-3}[schedule]
    assert 0 < run.rates[-1] <= settings.lr * floor * 1.001
    assert len(run.saved) <= 50 + steps // 100
    if schedule == "wsd":
        falling = [rate for rate in run.rates[50:] if rate < settings.lr]
        assert falling == sorted(falling, reverse=True)
        assert len(falling) < 0.35 * steps


def test_a_run_that_is_faster_at_the_end_keeps_its_falling_learning_rate(settings, monkeypatch):
    timed = replace(settings, steps=None, minutes=4.0, save_every=100, eval_every=100)
    run = Timed(timed, lambda step: 0.1 if step < 1600 else 0.02, monkeypatch)
    assert 190 < run.whole() < 240
    assert run.rates[50:] == sorted(run.rates[50:], reverse=True)


def test_a_run_that_becomes_much_slower_at_the_end_stops_soon(settings, monkeypatch):
    """The last validation and the final measurement take longer than the remaining time: only a few steps follow."""
    timed = replace(settings, steps=None, minutes=4.0, save_every=100, eval_every=100)
    run = Timed(timed, slow_from(1800, 2.0), monkeypatch)
    run.whole()
    assert 1800 < run.state.step <= 1810
    assert run.rates[-1] <= settings.lr * 5 / run.state.step * 1.001


@pytest.mark.parametrize("minutes", [1e-3, 0.2])
def test_too_few_minutes_are_a_few_steps(settings, monkeypatch, minutes):
    """The first plan is made after twenty steps."""
    timed = replace(settings, steps=None, minutes=minutes, save_every=100, eval_every=100, warmup=50)
    for schedule in ("wsd", "cosine"):
        run = Timed(replace(timed, schedule=schedule), SLOWNESS["steady"], monkeypatch)
        run.whole()
        assert run.state.step < 100
        assert run.rates[-1] < 0.5 * settings.lr


def test_a_new_plan_is_saved_before_its_first_step(settings, monkeypatch):
    """Every step follows the last saved plan, so it has the same learning rate after a resume."""
    timed = replace(settings, steps=None, minutes=4.0, save_every=10**6, eval_every=100)
    run = Timed(timed, SLOWNESS["slower from the middle"], monkeypatch)
    run.whole()
    assert len(run.saved) > 3
    for i, total in enumerate(run.totals):
        before = [state for state in run.saved if state.step <= i]
        assert total == (before[-1].total if before else None)
    for state in run.saved[1:-1]:
        resumed = Timed(timed, SLOWNESS["slower from the middle"], monkeypatch, state=replace(state))
        resumed.now = state.elapsed
        resumed.to_the_end()
        same = next(i for i, total in enumerate([*resumed.totals, None]) if total != state.total)
        assert same >= 1
        assert resumed.rates[:same] == run.rates[state.step : state.step + same]


def test_killed_after_a_new_plan(settings, tmp_path, monkeypatch):
    """With the files of a run whose steps become slow, a resumed run repeats the same steps bit by bit."""
    timed = replace(settings, out=tmp_path / "run", steps=None, minutes=4.0, save_every=1000, eval_every=1000)
    clock, totals, real, kill = SimpleNamespace(now=0.0), [], pretrain.Run.step, [True]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: clock.now)

    def look(*_args, **_options):
        """Costs hardly any time of this clock; one that costs none counts as not measured and is repeated."""
        clock.now += 1e-6
        return {"val_bits_per_byte": 1.0}

    def step(run):
        if run.state.step == 45 and kill.pop():
            raise KeyboardInterrupt  # nothing is saved
        totals.append(run.state.total)
        clock.now += 1.0 if run.state.step < 30 else 8.0
        return real(run)

    monkeypatch.setattr(pretrain, "look", look)
    monkeypatch.setattr(pretrain.Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(timed, console=quiet())
    before, state, planned = losses(timed.out), read_state(newest(timed.out / "checkpoints")), totals[:]
    assert len(before) == 45
    assert 30 < state.step < 45
    assert state.total == planned[-1] < planned[30]
    totals.clear()
    kill.append(False)
    result = pretrain.train(replace(timed, resume=True), console=quiet())
    assert totals[: 45 - state.step] == planned[state.step :]
    assert losses(timed.out)[:45] == before
    assert result.seconds == pytest.approx(240, rel=0.04)  # a step is 3%


def test_minutes_give_a_number_of_steps(settings, tmp_path):
    """Until the plan changes, killed or not, losses equal those of a run with the planned number of steps."""
    timed = replace(settings, out=tmp_path / "timed", steps=None, minutes=1.0, save_every=1000)
    child = process(timed)
    child.start()
    states = timed.out / "checkpoints"
    deadline = time.monotonic() + 60
    while newest(states) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.join()
    state = read_state(newest(states))
    assert state.step == 20
    assert state.total is not None
    assert state.total > 20
    # A run with minutes would be slow; the schedule is the same function of the number of steps.
    for step in (0, 10, 19, 20, state.total - 1):
        known = learning_rate(step, state.total, replace(settings, steps=state.total, warmup=20))
        assert learning_rate(step, state.total, timed) == known
    assert all(learning_rate(s, None, timed) == learning_rate(s, state.total, timed) for s in range(20))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(settings, whole, tmp_path, capsys, monkeypatch, signum):
    """The current step ends, the state is saved, and the printed command completes the run with equal losses."""
    out = tmp_path / "a run"
    run = replace(settings, out=out)
    real = pretrain.Run.step

    def step(self):
        if self.state.step == 4:
            os.kill(os.getpid(), signum)
        return real(self)

    monkeypatch.setattr(pretrain.Run, "step", step)
    monkeypatch.setattr(pretrain.tyro, "cli", lambda *args, **options: run)
    assert pretrain.main([]) == 128 + signum
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)
    name = signal.Signals(signum).name
    command = f"python -m recipes.pretrain --resume --out '{out}'"
    assert f"{name}: saved after step 5. Go on with: {command}" in capsys.readouterr().err
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert pretrain.main(["--resume", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    assert [row["step"] for row in losses(out)] == [row["step"] for row in losses(whole)]


def test_a_second_signal_interrupts_at_once():
    with pretrain.stop_on_signal() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---- refusals


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"lr": 1.0}, r"started with the setting lr = 0\.004, now it is 1\.0: resume with the old value"),
        ({"window": 16}, "setting window = 32, now it is 16"),
        ({"data": "stdlib"}, "setting data"),
        ({"resume": False}, "already holds a run: add --resume to continue it, or choose another --out"),
        ({"out": Path("nowhere")}, "There is no run to resume in nowhere: leave --resume out"),
    ],
)
def test_a_run_that_cannot_be_resumed_so(settings, whole, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain.train(replace(settings, **({"out": whole, "resume": True} | changes)), console=quiet())


def test_another_model_or_other_data_is_refused(settings, tmp_path):
    run = replace(settings, out=tmp_path / "run", steps=1)
    pretrain.train(run, console=quiet())
    again = replace(run, resume=True)
    preset = Path(run.preset)
    before = preset.read_text()
    try:
        preset.write_text(json.dumps(json.loads(before) | {"hidden_size": 32}))
        with pytest.raises(ValueError, match="the model hidden_size = 16, now it is 32"):
            pretrain.train(again, console=quiet())
    finally:
        preset.write_text(before)
    meta = run.out / "data" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"fingerprint": "other"}))
    with pytest.raises(ValueError, match=r"the data fingerprint = .*, now it is 'other'"):
        pretrain.train(again, console=quiet())


def test_a_damaged_state_is_named(settings, tmp_path):
    run = replace(settings, out=tmp_path / "run", steps=2, save_every=1)
    pretrain.train(run, console=quiet())
    path = newest(run.out / "checkpoints")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"step-00000002\.safetensors is damaged .* resume from the state before it"):
        pretrain.train(replace(run, resume=True), console=quiet())
    path.unlink()
    pretrain.train(replace(run, resume=True), console=quiet())
    assert [row["step"] for row in losses(run.out)] == [1, 2]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": 3, "minutes": 1.0}, "choose one of the two"),
        ({"steps": 0}, "steps is 0: choose a number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"window": 1}, "choose 2 tokens or more"),
        ({"warmup": -1}, "must not be negative"),
        ({"preset": "huge"}, "There is no preset 'huge': choose tiny, "),
        ({"tokenizer": "bpe:many"}, "tokenizer is 'bpe:many'"),
        ({"tokenizer": "nowhere"}, "No tokenizer at nowhere"),
        ({"data": "nowhere"}, "There is nothing at nowhere"),
        ({"window": 10**6}, "choose a window between 1 and that, or give more text"),
        ({"device": "cuda:99"}, "CUDA"),
        ({"recompute": ("attention",)}, "This model has no 'attention' to compute again: choose of linear_attention, "),
    ],
)
def test_settings_that_do_not_serve(settings, tmp_path, changes, sentence):
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=sentence):
        pretrain.train(replace(settings, **({"out": tmp_path / "run"} | changes)), console=quiet())
    assert not (tmp_path / "run" / "settings.json").exists()  # so that --out can be reused


def test_the_command_line_says_a_sentence(tmp_path, capsys):
    assert pretrain.main(["--resume", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"There is no run to resume in {tmp_path}: leave --resume out to start one.\n"


# ---- what goes wrong on the way


def test_a_loss_that_is_not_finite_stops(settings, tmp_path, monkeypatch):
    real, run = pretrain.accumulate_gradients, replace(settings, out=tmp_path / "run")
    calls = []

    def poisoned(model, micro, **options):
        calls.append(1)
        return real(model, micro, **options) | ({"loss": math.nan} if len(calls) == 5 else {})

    monkeypatch.setattr(pretrain, "accumulate_gradients", poisoned)
    with pytest.raises(FloatingPointError, match=r"Step 5: the loss is nan, .* kept: .*step-00000003.*lower --lr"):
        pretrain.train(run, console=quiet())
    assert newest(run.out / "checkpoints").name == "step-00000003.safetensors"


def test_gradients_that_are_not_finite_are_skipped_then_stop(settings, tmp_path, monkeypatch):
    run = replace(settings, out=tmp_path / "run", steps=30, save_every=1)
    seen = []

    def poisoned(model, micro, **options):
        seen.append(model.norm.weight.detach().clone())
        row = accumulate_gradients(model, micro, **options)
        if len(seen) == 3 or len(seen) > 5:
            model.norm.weight.grad[0] = math.inf
        return row

    monkeypatch.setattr(pretrain, "accumulate_gradients", poisoned)
    console = quiet()
    with pytest.raises(FloatingPointError, match="Step 15: 10 consecutive gradients were not finite"):
        pretrain.train(run, console=console)
    assert "Step 3: the gradient is not finite; the step is skipped." in console.file.getvalue()
    assert torch.equal(seen[3], seen[2])
    assert not torch.equal(seen[4], seen[3])
    rows = losses(run.out)
    assert [row["step"] for row in rows if row["skipped"]] == [3, *range(6, 15)]
    assert rows[2]["gradient_norm"] is None


@pytest.mark.parametrize("fails", ["sync", "write"])
def test_a_full_disk(settings, tmp_path, monkeypatch, fails):
    """A clear error, the last state is kept, no partial files; with free space the run continues."""
    run = replace(settings, out=tmp_path / "run")
    calls, owner, name = [], checkpoints, {"sync": "_sync", "write": "save_file"}[fails]
    real = getattr(owner, name)

    def full(*args, **options):
        calls.append(1)
        if len(calls) > (2 if fails == "sync" else 1):
            if fails == "sync":
                raise OSError(errno.ENOSPC, "No space left on device")
            Path(args[1]).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return real(*args, **options)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match=r"The disk that holds .*checkpoints is full: .* free some space"):
        pretrain.train(run, console=quiet())
    assert [p.name for p in (run.out / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    monkeypatch.undo()
    pretrain.train(replace(run, resume=True), console=quiet())
    assert len(losses(run.out)) == 8


# ---- the mathematics of a step


def uneven_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows with 1 to 31 targets, one of them padded."""
    ids, documents = torch.randint(0, 257, (4, 32)), torch.zeros(4, 32, dtype=torch.long)
    documents[0] = torch.arange(32)
    documents[0, 1] = 0  # one target in this row
    documents[1] = torch.arange(32) // 3
    documents[2, 20:] = -1
    return ids, documents


ALL_LOSSES = {
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "logit_z_loss_coef": 0.01,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("parts, depths", [(1, 1), (2, 1), (4, 1), (4, 3)])
def test_parts_add_up_to_one_big_batch(parts, depths, dtype, tolerance):
    """All losses and all gradients, the balance loss of the whole batch among them.

    In fp32 a gradient is a sum in another order, through nine layers of rounding: ten times the losses' tolerance.
    """
    torch.manual_seed(0)
    model = q.Qwen3Next(NANO.replace(**ALL_LOSSES)).to(dtype)
    ids, documents = uneven_batch()
    big = model.loss(ids, segments=Segments.from_document_ids(documents), mtp_depths=depths)
    big.total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    micro = [Batch(*x) for x in zip(ids.chunk(parts), documents.chunk(parts), strict=True)]
    row = accumulate_gradients(model, micro, precision="fp32", mtp_depths=depths)
    assert row["loss"] == pytest.approx(big.total.item(), rel=tolerance)
    for name in ("lm", "mtp", "balance", "z", "logit_z"):
        assert row[name] == pytest.approx(getattr(big, name).item(), rel=tolerance)
        assert row[name] > 0
    assert row["max_load"] == pytest.approx(4 * big.load.max().item())
    assert row["targets"] == big.targets
    for name, grad in expected.items():
        error = dict(model.named_parameters())[name].grad - grad
        assert error.norm() <= 10 * tolerance * grad.norm().clamp(min=1e-3), name


def test_each_part_balanced_by_itself():
    """With balance="micro": the mean over parts by tokens; all else is the whole batch's."""
    torch.manual_seed(0)
    model = q.Qwen3Next(NANO.replace(**ALL_LOSSES)).double()
    ids, documents = uneven_batch()
    micro = [Batch(*x) for x in zip(ids.chunk(4), documents.chunk(4), strict=True)]
    row = accumulate_gradients(model, micro, precision="fp32", balance="micro")
    batch = accumulate_gradients(model, micro, precision="fp32")
    sums = [model.loss_sums(b.input_ids, segments=Segments.from_document_ids(b.document_ids)) for b in micro]
    tokens = torch.stack([s.router.tokens for s in sums])
    balance = torch.stack([s.router.balance for s in sums])
    expected = (balance * tokens / tokens.sum(0)).sum(0).mean()
    assert row["balance"] == pytest.approx(expected.item(), rel=1e-7)  # counts of a call are fp32
    assert row["balance"] > batch["balance"] + 1e-3  # parts differ more than the whole
    assert {k: row[k] for k in ("lm", "mtp", "z")} == pytest.approx(
        {k: batch[k] for k in ("lm", "mtp", "z")}, rel=1e-12
    )


def test_a_part_without_targets():
    """Its tokens are routed like the others'; if no part has targets, losses are zero."""
    torch.manual_seed(0)
    model = q.Qwen3Next(NANO.replace(**ALL_LOSSES)).double()
    ids = torch.randint(0, 257, (3, 8))
    documents = torch.tensor([[0] * 8, [0] * 4 + [-1] * 4, [*range(8)]])
    big = model.loss(ids, segments=Segments.from_document_ids(documents))
    micro = [Batch(*x) for x in zip(ids.split(1), documents.split(1), strict=True)]
    row = accumulate_gradients(model, micro, precision="fp32")
    assert row["loss"] == pytest.approx(big.total.item(), rel=1e-12)
    assert row["targets"] == 7 + 3
    model.zero_grad()
    row = accumulate_gradients(model, [micro[2]] * 2, precision="fp32")
    assert (row["targets"], row["loss"]) == (0, 0.0)
    assert all(p.grad is None for p in model.parameters())


def test_router_losses_count_by_the_tokens():
    """The z loss is a mean over tokens, so it is the same for unequal parts."""
    torch.manual_seed(0)
    config = NANO.replace(router_aux_loss_coef=0.0, router_z_loss_coef=1.0, mtp_num_hidden_layers=0)
    model, ids = q.Qwen3Next(config).double(), torch.randint(0, 257, (2, 8))
    documents = torch.tensor([[0] * 8, [0] * 3 + [-1] * 5])
    whole = model.loss(ids, segments=Segments.from_document_ids(documents))
    parts = [Batch(*x) for x in zip(ids.split(1), documents.split(1), strict=True)]
    row = accumulate_gradients(model, parts, precision="fp32")
    assert row["loss"] == pytest.approx(whole.total.item(), rel=1e-12)


def test_a_run_goes_on_where_a_step_has_nothing_to_predict(settings, tmp_path):
    """Documents of one token and a window of two: every second window has two documents."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "long.txt").write_text("a" * 60)
    for i in range(200):
        (tmp_path / "text" / f"{i}.txt").write_text(chr(0x4E00 + i))
    run = replace(
        settings, data=str(tmp_path / "text"), tokenizer=str(characters(tmp_path)), window=2, batch_size=1, steps=24
    )
    run, console = replace(run, out=tmp_path / "run"), quiet()
    pretrain.train(run, console=console)
    rows = read_metrics(run.out)
    empty = [row["step"] for row in rows if not row["targets"]]
    assert 0 < len(empty) < 24
    assert [row["step"] for row in rows if row["skipped"]] == empty
    assert f"Step {empty[0]} is skipped, because no token has a next token" in console.file.getvalue()


def characters(folder):
    """One token per character of the test's texts."""
    alphabet = ["<|endoftext|>", "a", *(chr(0x4E00 + i) for i in range(200))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_what_decays():
    model = q.Qwen3Next(NANO.replace(tie_word_embeddings=True))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decaying, spared = ({name_of[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.1))
    assert decaying | spared == set(name_of.values())
    assert not decaying & spared
    linear = [f"blocks.{i}.linear_attn.{n}" for i in range(1) for n in ("A_log", "dt_bias", "norm.weight")]
    assert spared == {"embed_tokens.weight", *linear}
    assert {"norm.weight", "blocks.1.self_attn.q_norm.weight", "blocks.0.mlp.router.weight"} <= decaying


def test_norms_that_start_at_one_and_parts_that_are_not_there():
    changes = {"zero_centred_norms": False, "linear_decay": False, "attention_gate_input": "constant"}
    model = q.Qwen3Next(NANO.replace(**changes))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decaying, spared = ({name_of[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.1))
    assert decaying | spared == set(name_of.values())
    assert {name for name in spared if "norm" not in name} == {"embed_tokens.weight"}
    assert not [name for name in decaying if "norm" in name]
    assert "blocks.1.self_attn.gate_constant" in decaying  # it starts at zero


@pytest.mark.parametrize("kind, last", [("wsd", 1 / 20), ("cosine", 0.1)])
def test_learning_rate(settings, kind, last):
    run = replace(settings, schedule=kind, warmup=10, lr=1.0)
    rates = [learning_rate(step, 100, run) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(last, abs=2e-3)
    if kind == "wsd":
        assert rates[79] == rates[80] == 1.0
        assert rates[90] == pytest.approx(0.5)


def test_held_out_bits_against_plain_counting(whole):
    """Every document separately in fp64, by windows that share one token."""
    model = q.load(whole / "model").double()
    batches = ValidationBatches(whole / "data", window=32, batch_size=3)
    nats = held_out_nats(model, batches, precision="fp32")
    tokens, ends = batches.tokens.astype("int64"), batches.starts.tolist()
    for document in batches.documents:
        ids = torch.tensor(tokens[ends[document] : ends[document + 1]])
        expected = 0.0
        for begin in range(0, len(ids) - 1, 31):
            window = ids[None, begin : begin + 32]
            logits = model(window).logits[0, :-1]
            expected += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        assert nats[document] == pytest.approx(expected, rel=1e-6)  # sums are fp32
    total = batches.bits_per_byte(sum(nats.values()))
    assert json.loads((whole / "result.json").read_text())["bits_per_byte"] == pytest.approx(total, rel=1e-5)
    part = batches.part(300)
    assert 0 < len(part.documents) <= len(batches.documents)
    measured = held_out_nats(model, part, precision="fp32")
    assert measured == pytest.approx({d: nats[d] for d in part.documents}, rel=1e-9)
    assert len(list(part)) == len(part)


# ---- what is left behind


def test_what_a_run_leaves(settings, whole):
    model, tokenizer = q.load(whole / "model"), load_tokenizer(whole / "model")
    ids = torch.tensor([tokenizer.encode("def f1").ids])
    assert tokenizer.decode(q.generate(model, ids, max_new_tokens=5)[0].tolist()).startswith("def f1")
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((whole / "result.json").read_text())
    size = sum(d["utf8_bytes"] for d in result["documents"])
    summed = sum(d["model"] * d["utf8_bytes"] for d in result["documents"])
    assert result["bits_per_byte"] == pytest.approx(summed / size)
    assert result["tokens"] == 8 * 2 * 32
    assert result["peak_memory"] > 10**8
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if "val_bits_per_byte" in row] == [4, 8]
    assert recorded(whole) == replace(settings, out=whole, resume=True)


def test_samples_go_on_where_they_stopped(whole):
    state = read_state(newest(whole / "checkpoints"))
    assert (state.step, state.samples, state.tokens) == (8, 16, 512)
    assert len(PackedWindows(whole / "data", "train", window=32)) > 0


def test_tensorboard_writes_each_step_once(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = replace(settings, out=tmp_path / "run", steps=3, tensorboard=True)
    pretrain.train(run, console=quiet())
    events = EventAccumulator(str(run.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("lm")] == [1, 2, 3]


def test_without_tensorboard_it_says_so(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    console = quiet()
    pretrain.train(replace(settings, out=tmp_path / "run", steps=1, tensorboard=True), console=console)
    assert "TensorBoard is not installed" in console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal):
    """A progress bar on a terminal; elsewhere plain lines, one every ten seconds and one per validation."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    figures = {"lm": 5.0, "tokens_per_second": 1000.0, "max_load": 1.5, "seconds_per_step": 0.5}
    with Live(console) as live:
        for step in range(1, 41):
            seen = {"val_bits_per_byte": 2.5} if step == 20 else {}
            live.show({"step": step, **figures, **seen}, None if step < 20 else 40)
    text = console.file.getvalue()
    assert ("\x1b[" in text) == terminal
    assert "step 40/40  loss 5.000  val 2.500 bits/byte  1,000 tok/s  load 1.5x  0:00 left" in text
    if not terminal:
        assert [line.split()[1] for line in text.splitlines()] == ["1/?", "20/40", "40/40"]


def test_smoothed_is_a_running_mean():
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]


def test_precision_is_taken_where_it_pays(monkeypatch):
    here = torch.device("cpu")
    assert pick_precision("bf16", here) == ("bf16", "as asked")
    monkeypatch.delenv("QWEN3NEXT_PRECISION", raising=False)
    for able, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(cpu, "can", lambda level, able=able: able)
        assert pick_precision("auto", here)[0] == expected


def test_bf16_trains_and_measures(settings, tmp_path):
    """Validation in bf16 equals validation in fp64 of the same weights, up to the rounding of bf16.

    Logits of a few units, and the layers below them, have relative rounding errors of up to 2⁻⁸; the mean of such
    errors over thousands of tokens is smaller than a single one.
    """
    out = tmp_path / "run"
    result = pretrain.train(replace(settings, out=out, steps=2, precision="bf16"), console=quiet())
    assert result.precision == "bf16"
    batches = ValidationBatches(out / "data", window=32, batch_size=3)
    nats = held_out_nats(q.load(out / "model").double(), batches, precision="fp32")
    exact = batches.bits_per_byte(sum(nats.values()))
    assert result.bits_per_byte == pytest.approx(exact, rel=2**-8)


# ---- all parts of a run together


@pytest.fixture(scope="module")
def everything(settings, tmp_path_factory):
    """Muon, the average of weights, spikes, two sources, best-fit packing, marks and several MTP depths."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "prose.jsonl").write_text(
        "".join(json.dumps({"text": f"Sentence {i} of {i * i}. " * (1 + i % 7)}) + "\n" for i in range(40))
    )
    return replace(
        settings,
        data=(f"code={settings.data[0]}@0.7", f"prose={folder / 'prose.jsonl'}@0.3"),
        optimizer="muon",
        ema=0.9,
        skip_spikes=6.0,
        packing="best_fit",
        fim=0.5,
        mtp_depths=2,
        accumulate=2,
        needles=(24,),
        samples=1,
        model=("router_z_loss_coef=0.001", "logit_z_loss_coef=0.0001"),
    )


@pytest.mark.parametrize("place, times", [("step", 5), pytest.param("file", 2, marks=pytest.mark.slow)])
def test_killed_with_everything_on(everything, tmp_path, monkeypatch, place, times):
    """The same seed gives the same run, killed or not: losses, measures, weights and their average, to the bit."""
    outs = [tmp_path / name for name in ("whole", "killed")]
    for out, fault in zip(outs, (None, (place, times)), strict=True):
        run = replace(everything, out=out)
        assert finish(process(run, fault)) == (-signal.SIGKILL if fault else 0)
        if fault:
            assert finish(process(replace(run, resume=True))) == 0
    assert losses(outs[0]) == losses(outs[1])
    for name in ("model", "model-ema"):
        a, b = (dict(q.load(out / name).named_parameters()) for out in outs)
        assert all(torch.equal(a[key], b[key]) for key in a)
    last = read_metrics(outs[0])[-1]
    assert {"val_bits_per_byte/code", "val_bits_per_byte/prose", "mtp_accuracy/2", "needle/24", "decay"} <= last.keys()
    assert {"gradient_norm/experts", "load_entropy", "flops_per_second", "logit_z", "z"} <= last.keys()
    result = json.loads((outs[0] / "result.json").read_text())
    assert set(result["sources"]) == {"code", "prose"}
    assert result["ema_bits_per_byte"] != result["bits_per_byte"]
    sizes = {"code": 0, "prose": 0}
    for document in result["documents"]:
        sizes[document["name"].split(":")[0]] += document["utf8_bytes"]
    mean = sum(result["sources"][name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert result["bits_per_byte"] == pytest.approx(mean)
    assert (outs[0] / "samples.md").read_text().startswith("# Samples")
    assert json.loads((outs[0] / "model.json").read_text())["logit_z_loss_coef"] == 0.0001


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["settings", "everything"])
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again_at_any_time(request, tmp_path, seed, kind):
    """Kills after random times: while reading text, in a step, while saving, at the end."""
    reference = replace(request.getfixturevalue(kind), out=tmp_path / "whole", steps=40)
    assert finish(process(reference)) == 0
    run = replace(reference, out=tmp_path / "run")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        resume = (run.out / "settings.json").exists()
        child = process(replace(run, resume=resume))
        child.start()
        child.join(float(torch.rand((), generator=generator)) * 4)
        child.kill()
        child.join()
    assert finish(process(replace(run, resume=(run.out / "settings.json").exists()))) == 0
    assert losses(run.out) == losses(reference.out)


def test_spikes_are_skipped_and_remembered(settings, tmp_path, monkeypatch):
    """Weights stay as they were; a resumed run compares with the same steps.

    1000 deviations: the small model's own gradients reach 10 on some processors, the planted one 100,000.
    """
    run, calls = replace(settings, out=tmp_path / "run", steps=80, skip_spikes=1000.0, save_every=79, eval_every=80), []

    def spiky(model, micro, **options):
        row = accumulate_gradients(model, micro, **options)
        calls.append(row["loss"])
        if len(calls) == 70:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= 1e4
        return row

    monkeypatch.setattr(pretrain, "accumulate_gradients", spiky)
    console = quiet()
    pretrain.train(run, console=console)
    rows = losses(run.out)
    assert [row["step"] for row in rows if row["skipped"]] == [70]
    assert "Step 70: loss" in console.file.getvalue()
    state = read_state(newest(run.out / "checkpoints"))
    assert state.recent == [[row["loss"], row["gradient_norm"]] for row in rows]


def test_presets_and_fields_on_the_command_line(tmp_path, monkeypatch, capsys):
    """A preset sets what was not given; what was given wins; minutes replace its steps."""
    seen = []
    monkeypatch.setattr(pretrain, "train", seen.append)
    for preset, found in pretrain.PRESETS.items():
        assert pretrain.main(["--preset", preset, "--out", str(tmp_path / "a")]) == 0
        assert {key: getattr(seen[-1], key) for key in found.settings} == found.settings
        assert found.cost in capsys.readouterr().out
        pretrain.model_config(seen[-1], load_tokenizer_of_bytes())
    assert pretrain.main(["--preset", "nano-60m", "--lr", "0.5", "--minutes", "3", "--data", "a", "b=c@2"]) == 0
    assert (seen[-1].lr, seen[-1].minutes, seen[-1].steps) == (0.5, 3.0, None)
    assert (seen[-1].optimizer, seen[-1].data) == ("muon", ("a", "b=c@2"))
    assert pretrain.main(["--preset", "medium"]) == 0
    assert seen[-1] == Settings(preset="medium")


def load_tokenizer_of_bytes() -> Tokenizer:
    from recipes.training.tokenizer import byte_tokenizer

    return byte_tokenizer()


@pytest.mark.parametrize("given, sentence", [("hidden=3", "no field"), ("hidden_size", "no field")])
def test_fields_of_the_model_that_are_not_there(settings, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain.model_config(replace(settings, model=(given,)), load_tokenizer_of_bytes())


def test_what_is_refused_before_a_run_begins(settings, tmp_path):
    """Nothing of a run is left, so the same folder serves when the setting is corrected."""
    run = replace(settings, out=tmp_path / "run", needles=(24, 10**6))
    with pytest.raises(ValueError, match="choose --needles from 16 to"):
        pretrain.train(run, console=quiet())
    assert not (run.out / "settings.json").exists()
    with pytest.raises(ValueError, match="trackio is not installed: pip install trackio"):
        replace(settings, tracker="trackio")


def test_going_on_from_a_folder(settings, whole, tmp_path):
    """Longer windows and another rope base, from a trained model; sizes cannot change."""
    out = tmp_path / "longer"
    longer = replace(settings, init=str(whole / "model"), window=64, steps=2, out=out, model=("rope_theta=50000",))
    pretrain.train(longer, console=quiet())
    after = q.load(out / "model")
    assert after.config.rope_theta == 50000
    assert losses(out)[0]["lm"] < losses(whole)[0]["lm"]
    with pytest.raises(ValueError, match="needs no other weights"):
        pretrain.train(replace(longer, out=tmp_path / "x", model=("num_experts=8",)), console=quiet())
