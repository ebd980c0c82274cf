"""Run one task of the study: train or resume one arm with one seed, and write its result as JSON.

`recipes.pretrain.Run` does the training, so states, resuming, signals and losses are those of pretraining.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import qwen3next as q
from recipes.demo import machine
from recipes.pretrain import Run, start_or_resume
from recipes.study.arms import ARMS, build
from recipes.study.metrics import measure, training_statistics
from recipes.study.text import BosWindows, HeldOut, bos_id
from recipes.study.toy import BigramBackcopy, ToyLook
from recipes.training.report import Live, Metrics, Row, read_metrics
from recipes.training.settings import Settings, comparable, pick_device, recorded, refuse_changes
from recipes.training.sources import Windows
from recipes.training.steps import accumulate_gradients, parameter_groups
from recipes.training.tokenizer import load_tokenizer, save_tokenizer, write_atomically

RESULT = "result.json"
MEASURED_AT_THE_END = 100  # sequences, as in arXiv:2410.10781
CALIBRATION_STEPS, CALIBRATION_SECONDS = 8, 2.0
KEPT_OUT_OF_CURVES = {"layers", "seconds_per_step", "tokens_per_second"}


@dataclass(frozen=True)
class Task:
    """The definition of one run.

    Attributes:
        kind: "toy", "lm-dense", "lm-moe", "lm-hybrid", "ladder" or "extension".
        config: model configuration, as in config.json.
        settings: training settings; `out` is the run's folder.
        text: folder with tokenizer and shards; None for the toy.
        rate: multiple of the base learning rate.
        looks: windows measured during training.
        begin: folder of the initial model; None initialises one from the seed.
        compiled: compute the training loss with torch.compile; measurements are not compiled.
    """

    kind: str
    arm: str
    seed: int
    config: dict[str, Any]
    settings: Settings
    text: Path | None = None
    rate: float = 1.0
    looks: int = 64
    begin: Path | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """The display name."""
        rate = f", rate x{self.rate:g}, {self.settings.precision}" if self.kind == "ladder" else ""
        return f"{self.kind}: {self.arm}, seed {self.seed}{rate}"


@dataclass(frozen=True)
class Parts:
    """A task's training data, its measure during training, and the fingerprint of the data."""

    windows: Windows
    look: Callable[[q.Qwen3Next], Row]
    fingerprint: str


def parts_of(task: Task) -> Parts:
    """The data of a task. Raises: ValueError for missing or damaged text."""
    s = task.settings
    if task.text is None:
        toy = BigramBackcopy(s.window, s.seed)
        return Parts(toy, ToyLook(toy), toy.fingerprint)
    bos = bos_id(load_tokenizer(task.text / "tokenizer"))
    data = task.text / "data"
    windows = BosWindows(data, "train", window=s.window, seed=s.seed, bos=bos)
    look = HeldOut(data, s.window, bos, looks=task.looks, rows=max(s.batch_size // 2, 1))
    return Parts(windows, look, json.loads((data / "meta.json").read_bytes())["fingerprint"])


def model_of(task: Task) -> q.Qwen3Next:
    """The initial model."""
    config = q.ModelConfig.from_dict(task.config)
    device = pick_device(task.settings.device)
    if task.begin is None:
        model = build(config, task.seed).to(device)
    else:
        model = q.load(task.begin, device=device)
        model.config = config  # the same sizes; other positions
    if task.compiled:
        model.loss = torch.compile(model.loss)  # type: ignore[method-assign]
    return model


def run(task: Task, *, live: Live, console: Console) -> dict[str, Any]:
    """Train or resume, then measure; for a finished run only return its result.

    Divergence is a valid result. Raises: ValueError if the folder holds another run or another process uses it; Stopped
    after a signal, with the state saved.
    """
    task.settings.out.mkdir(parents=True, exist_ok=True)
    with alone_in(task.settings.out):
        return _run(task, live, console)


def _run(task: Task, live: Live, console: Console) -> dict[str, Any]:
    out = task.settings.out
    if (out / RESULT).is_file():
        return json.loads((out / RESULT).read_bytes())
    resume = (out / "settings.json").is_file()
    settings = replace(task.settings, resume=resume)
    if resume:
        refuse_changes("setting", comparable(recorded(out)), comparable(settings))
    parts, model = parts_of(task), model_of(task)
    optimizers, average, state = start_or_resume(settings, model, parts.fingerprint)
    metrics = Metrics(out, step=state.step, tensorboard=False, console=console)
    diverged = None
    try:
        how = settings.precision, metrics, live
        training = Run(settings, state, model, optimizers, parts.windows, parts.look, *how, average=average)
        training.to_the_end()
    except FloatingPointError:
        diverged = state.step + 1
    finally:
        metrics.close()
    return finish(task, model, parts, diverged)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder against a second training process. The system releases the lock when the process ends."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process uses {folder}: wait until it ends, or stop it.") from None
        yield


def finish(task: Task, model: q.Qwen3Next, parts: Parts, diverged: int | None) -> dict[str, Any]:
    """Measure on more text than during training; write the model and result.json, and delete the training states."""
    s, out = task.settings, task.settings.out
    rows = read_metrics(out)
    last = rows[-1] if rows else {"step": 0, "tokens": 0, "elapsed": 0.0}
    final: dict[str, Any] = {}
    if diverged is None:
        final = last_look(model, parts.look)
        model.save_pretrained(out / "model")
        if task.text is not None:
            save_tokenizer(load_tokenizer(task.text / "tokenizer"), out / "model")
    result = {
        "kind": task.kind,
        "arm": task.arm,
        "row": ARMS[task.arm].number,
        "seed": task.seed,
        "rate": task.rate,
        "precision": s.precision,
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["elapsed"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "diverged": diverged,
        "final": final,
        "training": training_statistics(rows, warmup=s.warmup),
        "curve": curve(rows),
        "config": task.config,
        "settings": {**comparable(s), "device": s.device},
        "data": parts.fingerprint,
        "begun_from": None if task.begin is None else task.begin.parent.name,
        "machine": machine(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(out / RESULT, result)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return json.loads((out / RESULT).read_bytes())


def last_look(model: q.Qwen3Next, look: Callable[[q.Qwen3Next], Row]) -> dict[str, Any]:
    """The measures of `look`, on all held-out text, or on 100 sequences of the toy."""
    if isinstance(look, ToyLook):
        return replace(look, sequences=MEASURED_AT_THE_END)(model)
    assert isinstance(look, HeldOut)
    model.eval()
    nats = look.nats(model, look.windows)
    more = replace(look, looks=MEASURED_AT_THE_END)
    values = {"val_nats": nats, "val_bits_per_byte": look.bits_per_byte(nats)}
    return values | measure(model, more.some.split(look.rows))


def curve(rows: list[Row]) -> dict[str, list[Any]]:
    """The measured steps, and a list of values for each metric, without the values by layer."""
    looked = [row for row in rows if "first_token_attention" in row]
    names = [name for name in (looked[0] if looked else {}) if name not in KEPT_OUT_OF_CURVES]
    return {name: [row[name] for row in looked] for name in names}


def seconds_per_step(task: Task) -> tuple[float, float]:
    """Seconds of a step and of a validation of a task here: the median of a few, on a temporary model."""
    parts, model = parts_of(task), model_of(task)
    s = task.settings
    optimizer = torch.optim.AdamW(parameter_groups(model, s.weight_decay), lr=s.lr, fused=True)
    durations: list[float] = []
    while len(durations) < CALIBRATION_STEPS or sum(durations) < CALIBRATION_SECONDS:
        i = len(durations)
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        micro = [parts.windows.batch((i * s.accumulate + j) * s.batch_size, s.batch_size) for j in range(s.accumulate)]
        accumulate_gradients(model, micro, precision=s.precision, balance=s.balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip).item()
        optimizer.step()
        durations.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    parts.look(model)
    return sorted(durations[2:])[len(durations[2:]) // 2], time.perf_counter() - begun


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically, with six digits for floats and without infinities and NaN."""
    write_atomically(path, (json.dumps(short(values)) + "\n").encode())


def short(x: Any) -> Any:
    """Values that JSON can represent."""
    if isinstance(x, dict):
        return {str(key): short(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [short(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if x == x and abs(x) != float("inf") else None
    return str(x) if isinstance(x, Path) else x
