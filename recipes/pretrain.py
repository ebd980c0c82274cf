"""Train a model from scratch in one process, on the CPU or one GPU.

    python -m recipes.pretrain --preset tiny --minutes 10 --out runs/first
    python -m recipes.pretrain --out runs/first --resume

Reads text, trains a tokenizer on the training documents, trains the model, measures bits per byte on held-out
documents, and writes a model folder in the released layout, OUT/model. A run that is killed at any time resumes with
exactly the losses of an uninterrupted run.
"""

import json
import math
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

import qwen3next as q
from recipes.training.checkpoints import TrainingState, load_state, newest, read_state, save_state
from recipes.training.evaluation import HeldOut, check_needles, compared, held_out_of, look, write_samples
from recipes.training.flops import peak_flops, training_flops
from recipes.training.optimizers import WeightAverage, gradient_norms, optimizers
from recipes.training.pace import Pace
from recipes.training.presets import PRESETS, defaults
from recipes.training.report import Live, Metrics, Row, clock, compressed, draw_loss, read_metrics
from recipes.training.settings import (
    MEASURED_STEPS,
    Prepared,
    Settings,
    comparable,
    fim_marks,
    model_changes,
    model_config,
    pick_device,
    pick_precision,
    prepare_data,
    read_baselines,
    recorded,
    refuse_changes,
)
from recipes.training.skips import Skips
from recipes.training.sources import FillInTheMiddle, Windows, training_windows
from recipes.training.steps import accumulate_gradients, learning_rate
from recipes.training.tokenizer import save_tokenizer, write_atomically

LOOK = 16_384  # held-out tokens of a validation during training


@dataclass(frozen=True)
class Result:
    """The measurements of a finished run; also OUT/result.json.

    Attributes:
        bits_per_byte, gzip, xz: bits per byte on all held-out documents.
        sources: bits per byte of each source, if there are several.
        ema_bits_per_byte: of the averaged weights, if the run keeps them.
        documents: name, UTF-8 bytes and the three measures of each held-out document.
        max_load: largest load of an expert in any layer at the last step, as a multiple of the even share.
        seconds: time of training, including validation during training.
        peak_memory: peak resident memory of this process, in bytes.
    """

    bits_per_byte: float
    gzip: float
    xz: float
    documents: list[dict[str, Any]]
    parameters: int
    steps: int
    tokens: int
    tokens_per_second: float
    max_load: float
    seconds: float
    peak_memory: int
    precision: str
    sources: dict[str, float]
    ema_bits_per_byte: float | None = None


class Stopped(Exception):
    """The run was stopped by the signal `signal` and has saved its state."""

    def __init__(self, signum: int, sentence: str) -> None:
        super().__init__(sentence)
        self.signal = signum


def train(settings: Settings, *, console: Console | None = None) -> Result:
    """Run or resume training to the end; all output goes to `settings.out`.

    Raises: ValueError for invalid settings or data; FloatingPointError if training diverged; OSError for a full disk;
        Stopped after SIGINT or SIGTERM, with the state saved.
    """
    console = Console() if console is None else console
    out = settings.out
    if settings.resume:
        refuse_changes("setting", comparable(recorded(out)), comparable(settings))
    elif (out / "settings.json").exists():
        raise ValueError(f"{out} already holds a run: add --resume to continue it, or choose another --out.")
    device = pick_device(settings.device)
    precision, why = pick_precision(settings.precision, device)
    data = prepare_data(settings)
    windows = windows_of(settings, data)
    held_out = held_out_of(data, window=settings.window, batch_size=settings.batch_size * 2)  # no gradients in memory
    check_needles(held_out, settings.needles)
    torch.manual_seed(settings.seed)
    model = new_model(settings, data).to(device)
    model.recompute(*settings.recompute)
    taught, average, state = start_or_resume(settings, model, data.fingerprint)
    parameters, documents = sum(p.numel() for p in model.parameters()), sum(m.documents["val"] for m in data.metas)
    console.print(
        f"{settings.init or settings.preset}: {parameters / 1e6:.2f}M parameters on {device}, {precision} ({why}). "
        f"{data.tokens('train'):,} tokens to train on, {documents} documents held out. "
        f"{f'Resuming after step {state.step}' if state.step else 'Starting'} in {out}.",
        highlight=False,
        soft_wrap=True,
    )
    metrics = Metrics(out, step=state.step, tensorboard=settings.tensorboard, console=console, tracker=settings.tracker)
    part, depths = held_out.part(LOOK), settings.mtp_depths
    looking = partial(look, part=part, precision=precision, mtp_depths=depths, needles=settings.needles)
    try:
        with Live(console) as live:
            more = len(held_out) / len(part)
            run = Run(settings, state, model, taught, windows, looking, precision, metrics, live, more, average)
            run.to_the_end()
    finally:
        metrics.close()
    return finish(settings, model, average, data, held_out, precision, console)


def windows_of(settings: Settings, data: Prepared) -> Windows:
    """The training windows of a run: one source or several by weight, cut or packed, with fill-in-the-middle or not."""
    weights, eos = [source.weight for source in data.sources], data.metas[0].eos_id
    packing, window, seed = settings.packing, settings.window, settings.seed
    windows = training_windows(data.folders, weights, packing=packing, window=window, seed=seed)
    if settings.fim:
        windows = FillInTheMiddle(windows, settings.fim, marks=fim_marks(data.tokenizer), eos=eos, seed=seed)
    return windows


def new_model(settings: Settings, data: Prepared) -> q.Qwen3Next:
    """Random weights in the preset's shape, or the weights of `settings.init`. Raises: as `loaded`."""
    if not settings.init:
        return q.Qwen3Next(model_config(settings, data.tokenizer))
    model = loaded(settings.init, settings.model)
    if data.tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(f"The text has more kinds of tokens than {settings.init}: use the model's own tokenizer.")
    return model


def loaded(folder: str, changes: tuple[str, ...]) -> q.Qwen3Next:
    """The model in a folder in fp32, norms and decays too, with changes of its configuration.

    Raises: ValueError where a change would need other weights.
    """
    model = q.load(folder, dtype="float32", device="cpu").float()
    if not changes:
        return model
    changed = q.Qwen3Next(model.config.replace(**model_changes(changes)))  # modules read their sizes when they are made
    try:
        changed.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(f"--model changes sizes of {folder}: change only what needs no other weights.") from error
    changed.layout, changed.origin = model.layout, model.origin
    return changed


def start_or_resume(
    settings: Settings, model: q.Qwen3Next, fingerprint: str
) -> tuple[list[Optimizer], WeightAverage | None, TrainingState]:
    """Optimizers, average and state of a run; with `settings.resume`, loads the last saved ones, also into `model`.

    Args:
        fingerprint: fingerprint of the data.
    Writes settings.json, with every setting as it was resolved.
    Raises: ValueError if the saved run had other settings, another model or other data.
    """
    taught = optimizers(model, settings)
    average = WeightAverage(model, settings.ema) if settings.ema else None
    state = TrainingState(
        settings=json.loads(json.dumps(comparable(settings))),
        model=json.loads(json.dumps(model.config.to_dict())),
        fingerprint=fingerprint,
        threads=torch.get_num_threads(),
        total=settings.steps,
    )
    path = newest(settings.out / "checkpoints") if settings.resume else None
    if path is not None:
        before = read_state(path)
        refuse_changes("setting", before.settings, state.settings)
        refuse_changes("model", before.model, state.model)
        refuse_changes("data", {"fingerprint": before.fingerprint}, {"fingerprint": state.fingerprint})
        torch.set_num_threads(before.threads)  # the number of threads determines the order of sums
        state = load_state(path, model, taught, average.tensors if average else None)
    values = asdict(settings) | {"out": str(settings.out)}
    write_atomically(settings.out / "settings.json", (json.dumps(values, indent=2) + "\n").encode())
    write_atomically(settings.out / "model.json", (json.dumps(model.config.to_dict(), indent=2) + "\n").encode())
    return taught, average, state


@dataclass
class Run:
    """The training loop and its objects, from the start or a resume to the end or a stop.

    Attributes:
        look: returns the validation measure; called during training.
        looks_after: cost of the measurement after the last step, in validations; it counts towards `minutes`.
    """

    settings: Settings
    state: TrainingState
    model: q.Qwen3Next
    optimizers: list[Optimizer]
    windows: Windows
    look: Callable[[q.Qwen3Next], Row]
    precision: str
    metrics: Metrics
    live: Live
    looks_after: float = 0.0
    average: WeightAverage | None = None

    def __post_init__(self) -> None:
        self.skips = Skips(self.settings.skip_spikes, self.state.recent)

    def to_the_end(self) -> None:
        """Train up to step `state.total` and save states; raises as `train` does."""
        state, settings = self.state, self.settings
        begun, before = time.perf_counter(), state.elapsed
        durations: list[float] = []
        pace = Pace(settings, before, self.looks_after) if settings.minutes else None
        with stop_on_signal() as asked:
            while state.total is None or state.step < state.total:
                row, seconds = self._timed(self.step)
                durations.append(seconds)
                first = state.total is None and (len(durations) >= MEASURED_STEPS or bool(asked))
                looking = 0.0
                if first or state.step % settings.eval_every == 0 or state.step == state.total:
                    seen, looking = self._timed(lambda: self.look(self.model))
                    row |= seen
                state.elapsed = before + time.perf_counter() - begun
                planned = state.total
                if pace is not None and state.step != state.total:
                    pace.steps.append(seconds)
                    if not pace.looks and not looking:  # after resuming: the time of a validation is not saved
                        looking = self._timed(lambda: self.look(self.model))[1] if state.total else 0.0
                    if looking:
                        pace.looked(looking)
                    if first:
                        state.total = pace.first(state.step, state.elapsed)
                    elif state.total is not None:
                        state.total = pace.again(state.step, state.total, state.elapsed)
                replanned = state.total != planned  # save before the first step of the new plan
                recent = durations[-20:]
                row["seconds_per_step"] = sum(recent) / len(recent)
                row |= self._speed(row.pop("step_tokens") / row["seconds_per_step"])
                row["elapsed"] = state.elapsed
                self.metrics.add(row)
                self.live.show(row, state.total)
                if replanned or asked or state.step % settings.save_every == 0 or state.step == state.total:
                    saving = self._timed(self._save)[1]
                    if pace is not None:
                        pace.saving = saving
                if asked:
                    name = signal.Signals(asked[0]).name
                    sentence = f"{name}: saved after step {state.step}. Go on with: {command(settings.out)}"
                    raise Stopped(asked[0], sentence)

    def _speed(self, tokens_per_second: float) -> Row:
        """Tokens and counted operations a second; the share of the peak, and memory, on a device that is known."""
        row: Row = {"tokens_per_second": tokens_per_second}
        if self.model is None:
            return row
        flops = tokens_per_second * training_flops(self.model.config, self.settings.window)
        row["flops_per_second"], device = flops, self.model.embed_tokens.weight.device
        if peak := peak_flops(device):
            row["mfu"] = flops / peak
        if device.type == "cuda":
            row["memory"] = torch.cuda.max_memory_allocated(device)
        return row

    @staticmethod
    def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        return work(), time.perf_counter() - started

    def _save(self) -> None:
        self.metrics.sync()
        average = self.average.tensors if self.average else None
        save_state(self.settings.out / "checkpoints", self.state, self.model, self.optimizers, average)

    def step(self) -> Row:
        """Do one optimizer step and return its metrics."""
        state, settings = self.state, self.settings
        lr = learning_rate(state.step, state.total, settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        size = settings.batch_size
        micro = [self.windows.batch(state.samples + i * size, size) for i in range(settings.accumulate)]
        self.model.train()
        row: Row = {"step": state.step + 1, "lr": lr}
        row |= accumulate_gradients(
            self.model, micro, precision=self.precision, balance=settings.balance, mtp_depths=settings.mtp_depths
        )
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(self._diverged(f"the loss is {row['loss']}"))
        by_kind = gradient_norms(self.model)
        row |= {f"gradient_norm/{kind}": x for kind, x in by_kind.items() if math.isfinite(x)}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip).item()
        row["gradient_norm"] = norm if math.isfinite(norm) else None  # JSON cannot represent infinity
        try:
            why = self.skips.why(row["step"], loss=row["loss"], norm=norm, targets=row["targets"])
        except FloatingPointError as error:
            raise FloatingPointError(self._diverged(str(error))) from None
        row["skipped"] = bool(why)
        if why:
            self.live.say(why)
        else:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update(self.model, row["step"])
        row["step_tokens"] = sum(batch.input_ids.numel() for batch in micro)
        state.step += 1
        state.samples += size * settings.accumulate
        state.tokens += row["step_tokens"]
        row["tokens"] = state.tokens
        return row

    def _diverged(self, what: str) -> str:
        last = newest(self.settings.out / "checkpoints")
        kept = f"The last good state is kept: {last}." if last else "No state was saved before."
        return (
            f"Step {self.state.step + 1}: {what}, so training stopped. {kept} "
            "Try a lower --lr, a longer --warmup or --precision fp32 in a new --out."
        )


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that collects SIGINT or SIGTERM, so that the current step can end; a second signal interrupts at once."""
    asked: list[int] = []

    def ask(signum: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(
    settings: Settings,
    model: q.Qwen3Next,
    average: WeightAverage | None,
    data: Prepared,
    held_out: HeldOut,
    precision: str,
    console: Console,
) -> Result:
    """Measure all held-out documents; write OUT/model (and model-ema), result.json, loss.png and samples.md."""
    out = settings.out
    model.save_pretrained(out / "model")
    save_tokenizer(data.tokenizer, out / "model")
    console.print("Measuring on all held-out documents ...")
    nats = held_out.nats(model, precision=precision)
    measured, of_average = compared(held_out, nats, out), None
    if settings.samples:
        write_samples(model.eval(), data.tokenizer, held_out, out / "samples.md", count=settings.samples)
    if average is not None:
        average.exchange(model)
        model.save_pretrained(out / "model-ema")
        save_tokenizer(data.tokenizer, out / "model-ema")
        of_average = held_out.bits_per_byte(held_out.nats(model, precision=precision))[""]
        average.exchange(model)
    rows = read_metrics(out)
    last = rows[-1]
    result = Result(
        **measured,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=last["step"],
        tokens=last["tokens"],
        tokens_per_second=last["tokens"] / last["elapsed"],
        max_load=last["max_load"],
        seconds=last["elapsed"],
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        precision=precision,
        ema_bits_per_byte=of_average,
    )
    write_atomically(out / "result.json", (json.dumps(asdict(result), indent=1) + "\n").encode())
    measures = f"{result.bits_per_byte:.3f} bits per byte (gzip -9 {result.gzip:.3f}, xz -9 {result.xz:.3f})"
    try:
        title = f"{settings.preset}, {result.parameters / 1e6:.1f}M parameters, {result.tokens:,} tokens"
        baselines = read_baselines(out)
        part = compressed([baselines[i] for i in held_out.part(LOOK).numbers()])
        title = f"{title}: {measures} on all held-out text"
        draw_loss(rows, out / "loss.png", gzip=part[0], xz=part[1], title=title)
    except ImportError as error:
        console.print(str(error))
    console.print(
        f"{measures} on held-out text after {result.steps} steps, {result.tokens:,} tokens, {clock(result.seconds)}. "
        f"The model is in {out / 'model'}.",
        highlight=False,
        soft_wrap=True,
    )
    return result


def command(out: Path) -> str:
    """The command line that resumes a run."""
    return f"python -m recipes.pretrain --resume --out {shlex.quote(str(out))}"


def exit_status(program: Callable[[], object]) -> int:
    """Call `run`; errors that a user can cause are printed to stderr in one sentence. Returns the exit status."""
    try:
        program()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("Interrupted; the state saved last is complete.", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        given, prog = sys.argv[1:] if args is None else args, "python -m recipes.pretrain"
        settings = tyro.cli(Settings, args=args, prog=prog)
        minutes = any(word.split("=")[0] == "--minutes" for word in given)
        # Parse again, with the saved settings or the preset's as defaults.
        base = recorded(settings.out) if settings.resume else defaults(settings.preset, minutes=minutes)
        settings = tyro.cli(Settings, args=args, prog=prog, default=base)
        if settings.preset in PRESETS and not settings.resume:
            print(f"{settings.preset}: {PRESETS[settings.preset].cost}, as the preset is; --minutes plans for a time.")
        train(settings)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
