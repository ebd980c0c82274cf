"""Train a model from scratch in one process, on the CPU or one GPU.

    python -m recipes.pretrain --minutes 10 --out runs/first
    python -m recipes.pretrain --out runs/first --resume

Reads text, learns a tokenizer from the part that is trained on, trains, measures bits per byte on held-out documents,
and leaves a model folder in the released layout, OUT/model. Killed at any instant, a run resumes with exactly the losses
it would have had.
"""

import json
import math
import resource
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn
from torch.optim import AdamW, Optimizer

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from layers.norm import GatedRMSNorm
from layers.segments import Segments
from recipes.checkpoints import TrainingState, load_state, newest, read_state, save_state
from recipes.data import (
    Batch,
    Meta,
    PackedWindows,
    ValidationBatches,
    build_shards,
    compression_baselines,
    read_meta,
)
from recipes.documents import plan_split, split_documents
from recipes.report import Live, Metrics, Row, clock, compressed, draw_loss, read_metrics
from recipes.tokenizer import (
    byte_tokenizer,
    eos_id,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    write_atomically,
)

MEASURED_STEPS = 20  # that tell how many fit into --minutes
SKIPS_IN_A_ROW = 10  # steps with a non-finite gradient before a run gives up
# What a resumed run may change: nothing here changes the losses.
FREE = {"out", "resume", "eval_every", "save_every", "device", "tensorboard"}


@dataclass(frozen=True)
class Settings:
    """Train a Qwen3-Next model from scratch.

    Attributes:
        data: "stdlib" (this Python's standard library), a folder, a glob or a file.
        tokenizer: "bytes", "bpe:N" (learnt from the training documents) or a tokenizer.json.
        preset: a name out of qwen3next.presets, or a config.json; the vocabulary's size is the tokenizer's.
        steps: how long to train, in optimizer steps.
        minutes: how long to train, in minutes: the first steps tell how many fit.
        batch_size: windows in a micro-batch.
        window: tokens in a window.
        accumulate: micro-batches in a step.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: "wsd" holds the peak and falls to zero over the last fifth, "cosine" falls all the way to a tenth.
        weight_decay: of matrices and zero-centred norms.
        clip: largest norm of the gradient.
        seed: of weights and order.
        out: the run's folder.
        resume: go on with the run in `out`; settings that are not given are the run's own.
        eval_every: steps between looks at held-out text.
        save_every: steps between saved states.
        device: "auto", "cpu" or "cuda".
        precision: "auto" takes bf16 where the hardware multiplies in it, else fp32.
        tensorboard: write TensorBoard's event files too.
    """

    data: str = "stdlib"
    tokenizer: str = "bpe:4096"
    preset: str = "tiny"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 4
    window: int = 256
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 50
    schedule: Literal["wsd", "cosine"] = "wsd"
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    out: Path = Path("runs/pretrain")
    resume: bool = False
    eval_every: int = 100
    save_every: int = 100
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("Both steps and minutes are given: choose one of the two.")
        for name in (
            "batch_size",
            "accumulate",
            "steps",
            "eval_every",
            "save_every",
            "minutes",
            "lr",
            "clip",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: choose a number above 0.")
        if self.window < 2:
            raise ValueError(f"window is {self.window}: choose 2 tokens or more.")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative.")


@dataclass(frozen=True)
class Result:
    """What a finished run measured; also OUT/result.json.

    Attributes:
        bits_per_byte, gzip, xz: on all held-out documents.
        documents: for each held-out document its name, UTF-8 bytes and the three measures.
        max_load: largest share of a layer's expert at the last step, by the even share.
        seconds: of training, validation during training included.
        peak_memory: largest resident size of this process, in bytes.
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


class Stopped(Exception):
    """The run was asked to stop and has saved its state; `signal` is who asked."""

    def __init__(self, signum: int, sentence: str) -> None:
        super().__init__(sentence)
        self.signal = signum


# ---- the parts of a step -------------------------------------------------------------------------


def learning_rate(step: int, total: int | None, settings: Settings) -> float:
    """Of step 0, 1, …; `total` is None as long as the number of steps is not known, which warm-up outlasts."""
    warmup = max(settings.warmup, MEASURED_STEPS) if settings.minutes else settings.warmup
    if step < warmup or total is None:
        return settings.lr * min(1.0, (step + 1) / max(warmup, 1))
    if settings.schedule == "wsd":
        return settings.lr * min(1.0, (total - step) / (0.2 * total))
    done = (step - warmup) / max(total - warmup, 1)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: what decays and what does not.

    Decay pulls towards zero, so it serves where zero is neutral: for matrices, and for zero-centred norm weights, whose
    scale is 1 + weight (the released models' training decayed them). Zero is not neutral for A_log and dt_bias (a memory
    of one particular length) nor for the gated norm's weight (starts at 1: its heads would fade); and a rare token's
    embedding would shrink in all the steps that do not see it.
    """
    spared: set[int] = set()
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            spared |= {id(module.A_log), id(module.dt_bias)}
        elif isinstance(module, (GatedRMSNorm, nn.Embedding)):
            spared.add(id(module.weight))
    decaying = [p for p in model.parameters() if id(p) not in spared]
    others = [p for p in model.parameters() if id(p) in spared]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def accumulate_gradients(model: q.Qwen3Next, micro: list[Batch], *, precision: str) -> Row:
    """Add the gradients of one big batch, computed in parts; return its losses.

    A part's mean counts by its share of the predicted tokens, those of MTP by theirs, so that the next-token and MTP
    losses and their gradients are those of one big batch. The balance loss is a product of means, so it is the mean of
    the parts' own: each part is balanced by itself.
    """
    device, config = model.embed_tokens.weight.device, model.config
    segments = [Segments.from_document_ids(batch.document_ids.to(device)) for batch in micro]
    shares = [_shares([int(s.next_is_same(ahead).sum()) for s in segments]) for ahead in (1, 2)]
    row: Row = dict.fromkeys(("loss", "lm", "mtp", "balance", "z", "max_load"), 0.0)
    for batch, own, first, second in zip(micro, segments, *shares, strict=True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            losses = model.loss(batch.input_ids.to(device), segments=own)
        router = config.router_aux_loss_coef * losses.balance + config.router_z_loss_coef * losses.z
        loss = first * losses.lm + second * config.mtp_loss_coef * losses.mtp + router / len(micro)
        loss.backward()
        parts = (
            loss,
            first * losses.lm,
            second * losses.mtp,
            losses.balance / len(micro),
            losses.z / len(micro),
        )
        for name, part in zip(("loss", "lm", "mtp", "balance", "z"), parts, strict=True):
            row[name] += part.item()
        if losses.load is not None:
            row["max_load"] += losses.load.max().item() * config.num_experts / len(micro)
    return row


def _shares(counts: list[int]) -> list[float]:
    return [count / max(sum(counts), 1) for count in counts]


@torch.no_grad()
def held_out_nats(model: q.Qwen3Next, batches: ValidationBatches, *, precision: str) -> dict[int, float]:
    """Summed cross-entropy in nats of every document of `batches`, by its number."""
    nats = dict.fromkeys(batches.documents, 0.0)
    device = model.embed_tokens.weight.device
    for batch in batches:
        ids, segments = batch.input_ids.to(device), Segments.from_document_ids(batch.document_ids.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            hidden = model(ids, segments=segments, logits_to_keep=1).hidden
            for row, document in enumerate(batch.documents.tolist()):  # a row at a time: logits are large
                end = int(segments.end[row])
                logits = model.lm_head(hidden[row, : end - 1]).float()
                nats[document] += F.cross_entropy(logits, ids[row, 1:end], reduction="sum").item()
    return nats


# ---- what a run needs before its first step -------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """Raises: ValueError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: choose cpu or auto.")
    return torch.device(name)


def pick_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """("fp32" or "bf16", why). On a CPU that cannot multiply in bf16, torch imitates it, slower than fp32."""
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU multiplies in it") if able else ("fp32", "this GPU has no bf16")
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "cpu" and (can.get("amx_bf16") or can.get("avx512_bf16")):
        return "bf16", "this CPU multiplies in it"
    return "fp32", "this device has no bf16 multiplication"


def prepare_data(settings: Settings) -> tuple[Tokenizer, Meta]:
    """Tokenizer and shards in the run's folder; what is there already is used."""
    folder, kind = settings.out / "tokenizer", settings.tokenizer
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    elif kind == "bytes":
        tokenizer = byte_tokenizer()
    elif kind.startswith("bpe:"):
        if not kind[4:].isdecimal():
            raise ValueError(f'tokenizer is {kind!r}: give "bytes", "bpe:4096" or a tokenizer.json.')
        documents = split_documents(settings.data, plan_split(settings.data))
        # From the training documents alone: held-out text must not shape the tokens it is measured in.
        tokenizer = train_bpe((t for split, _, t in documents if split == "train"), vocab_size=int(kind[4:]))
    else:
        tokenizer = load_tokenizer(kind)
    save_tokenizer(tokenizer, folder)
    if settings.resume and (settings.out / "data" / "meta.json").is_file():
        return tokenizer, read_meta(
            settings.out / "data"
        )  # the run's own text, whatever became of the source
    return tokenizer, build_shards(settings.data, tokenizer, settings.out / "data")


def model_config(preset: str, tokenizer: Tokenizer) -> q.ModelConfig:
    """A preset or a config.json, with the tokenizer's vocabulary.

    Raises: ValueError for a preset that does not exist.
    """
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos_id(tokenizer)}
    if preset in q.presets.ALL:
        return q.presets.ALL[preset](**sizes)
    if Path(preset).exists():
        return q.ModelConfig.load(preset).replace(**sizes)
    raise ValueError(
        f"There is no preset {preset!r}: choose {', '.join(q.presets.ALL)}, or give a config.json."
    )


def recorded(out: Path) -> Settings:
    """The settings of the run in a folder. Raises: ValueError where there is none."""
    try:
        values = json.loads((out / "settings.json").read_bytes())
        return Settings(**(values | {"out": out, "resume": True}))
    except FileNotFoundError:
        raise ValueError(f"There is no run to resume in {out}: leave --resume out to start one.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / 'settings.json'} is not a run's settings ({error}).") from error


def _refuse_changes(kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"This run was started with {kind} {name} = {before.get(name)} and now has {now.get(name)}: "
                "resume with what it had, or start a new run in another --out."
            )


def _comparable(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in FREE}


# ---- the run -------------------------------------------------------------------------------------


def train(settings: Settings, *, console: Console | None = None) -> Result:
    """Run, or resume, to the end; everything is written to `settings.out`.

    Raises: ValueError for settings or data that do not serve; FloatingPointError where training diverged; OSError, in a
        sentence, for a full disk; Stopped after SIGINT or SIGTERM, with the state saved.
    """
    console = Console() if console is None else console
    out, states = settings.out, settings.out / "checkpoints"
    if settings.resume:
        _refuse_changes("setting", _comparable(recorded(out)), _comparable(settings))
    elif (out / "settings.json").exists():
        raise ValueError(
            f"{out} already holds a run: add --resume to go on with it, or choose another --out."
        )
    device = pick_device(settings.device)
    precision, why = pick_precision(settings.precision, device)
    tokenizer, meta = prepare_data(settings)
    windows = PackedWindows(out / "data", "train", window=settings.window, seed=settings.seed)
    rows_at_once = settings.batch_size * 2  # without gradients there is room
    held_out = ValidationBatches(out / "data", window=settings.window, batch_size=rows_at_once)

    torch.manual_seed(settings.seed)
    model = q.Qwen3Next(model_config(settings.preset, tokenizer)).to(device)
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    state = TrainingState(
        settings=json.loads(json.dumps(_comparable(settings))),
        model=json.loads(json.dumps(model.config.to_dict())),
        fingerprint=meta.fingerprint,
        threads=torch.get_num_threads(),
        total=settings.steps,
    )
    path = newest(states) if settings.resume else None
    if path is not None:
        before = read_state(path)
        _refuse_changes("setting", before.settings, state.settings)
        _refuse_changes("model", before.model, state.model)
        _refuse_changes("data", {"fingerprint": before.fingerprint}, {"fingerprint": state.fingerprint})
        if before.threads != state.threads:
            console.print(
                f"{before.threads} CPU threads before, {state.threads} now: last digits may differ."
            )
        state = load_state(path, model, optimizer)
    values = asdict(settings) | {"out": str(out)}
    write_atomically(out / "settings.json", (json.dumps(values, indent=2) + "\n").encode())

    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{settings.preset}: {parameters / 1e6:.2f}M parameters on {device}, {precision} ({why}). "
        f"{meta.tokens['train']:,} tokens to train on, {meta.documents['val']} documents held out. "
        f"{'Starting' if path is None else f'Resuming after step {state.step}'} in {out}.",
        highlight=False,
        soft_wrap=True,
    )
    metrics = Metrics(out, step=state.step, tensorboard=settings.tensorboard, console=console)
    try:
        with Live(console) as live:
            run = Run(settings, state, model, optimizer, windows, held_out, precision, metrics, live)
            run.to_the_end()
    finally:
        metrics.close()
    return finish(settings, model, tokenizer, held_out, precision, console)


@dataclass
class Run:
    """Training between two sittings: the loop and what it works on."""

    settings: Settings
    state: TrainingState
    model: q.Qwen3Next
    optimizer: Optimizer
    windows: PackedWindows
    held_out: ValidationBatches
    precision: str
    metrics: Metrics
    live: Live

    def to_the_end(self) -> None:
        """Step until `state.total`, saving on the way; see `train` for what it raises."""
        state, settings = self.state, self.settings
        part = self.held_out.part(16_384)
        begun, before = time.perf_counter(), state.elapsed
        durations: list[float] = []
        skipped = 0
        with stop_on_signal() as asked:
            while state.total is None or state.step < state.total:
                started = time.perf_counter()
                row = self.step()
                durations.append(time.perf_counter() - started)
                skipped = skipped + 1 if row["skipped"] else 0
                if skipped == SKIPS_IN_A_ROW:
                    raise FloatingPointError(self._diverged(f"{skipped} gradients in a row were not finite"))
                measured = state.total is None and (len(durations) >= MEASURED_STEPS or bool(asked))
                if measured or state.step % settings.eval_every == 0 or state.step == state.total:
                    started = time.perf_counter()
                    nats = held_out_nats(self.model, part, precision=self.precision)
                    row["val_bits_per_byte"] = part.bits_per_byte(sum(nats.values()))
                    looking = time.perf_counter() - started
                state.elapsed = before + time.perf_counter() - begun
                if measured:
                    assert settings.minutes is not None
                    # The first steps are slower: kernels are chosen and memory is fetched.
                    usual = sorted(durations)[len(durations) // 2] + looking / settings.eval_every
                    state.total = state.step + max(1, int((60 * settings.minutes - state.elapsed) / usual))
                recent = durations[-20:]
                row["seconds_per_step"] = sum(recent) / len(recent)
                row["tokens_per_second"] = row.pop("step_tokens") / row["seconds_per_step"]
                row["elapsed"] = state.elapsed
                self.metrics.add(row)
                self.live.show(row, state.total)
                if measured or asked or state.step % settings.save_every == 0 or state.step == state.total:
                    self.metrics.sync()
                    save_state(settings.out / "checkpoints", state, self.model, self.optimizer)
                if asked:
                    name = signal.Signals(asked[0]).name
                    sentence = f"{name}: saved after step {state.step}. Go on with: {command(settings.out)}"
                    raise Stopped(asked[0], sentence)

    def step(self) -> Row:
        """One optimizer step; returns its figures."""
        state, settings = self.state, self.settings
        lr = learning_rate(state.step, state.total, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        size = settings.batch_size
        micro = [self.windows.batch(state.samples + i * size, size) for i in range(settings.accumulate)]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        row: Row = {"step": state.step + 1, "lr": lr}
        row |= accumulate_gradients(self.model, micro, precision=self.precision)
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(self._diverged(f"the loss is {row['loss']}"))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip).item()
        row["skipped"] = not math.isfinite(norm)
        row["gradient_norm"] = None if row["skipped"] else norm  # JSON has no infinity
        if row["skipped"]:
            self.live.say(f"Step {row['step']}: the gradient is not finite; the step is skipped.")
        else:
            self.optimizer.step()
        row["step_tokens"] = sum(batch.input_ids.numel() for batch in micro)
        state.step += 1
        state.samples += size * settings.accumulate
        state.tokens += row["step_tokens"]
        row["tokens"] = state.tokens
        return row

    def _diverged(self, what: str) -> str:
        last = newest(self.settings.out / "checkpoints")
        kept = f"The last good state is kept: {last}." if last else "No state had been saved yet."
        return (
            f"Step {self.state.step + 1}: {what}, so training stopped. {kept} "
            "Try a lower --lr, a longer --warmup or --precision fp32 in a new --out."
        )


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM, so that the step under way can end; a second one interrupts at once."""
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
    tokenizer: Tokenizer,
    held_out: ValidationBatches,
    precision: str,
    console: Console,
) -> Result:
    """Measure on all held-out documents; write OUT/model, result.json and loss.png."""
    out = settings.out
    model.save_pretrained(out / "model")
    save_tokenizer(tokenizer, out / "model")
    console.print("Measuring on all held-out documents ...")
    nats = held_out_nats(model, held_out, precision=precision)
    baselines = compression_baselines(held_out_texts(settings.data))
    gzip, xz = compressed(baselines)
    documents = [
        {**b._asdict(), "model": held_out.bits_per_byte(nats[i], document=i)} for i, b in enumerate(baselines)
    ]
    rows = read_metrics(out)
    last = rows[-1]
    result = Result(
        bits_per_byte=held_out.bits_per_byte(sum(nats.values())),
        gzip=gzip,
        xz=xz,
        documents=documents,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=last["step"],
        tokens=last["tokens"],
        tokens_per_second=last["tokens"] / last["elapsed"],
        max_load=last["max_load"],
        seconds=last["elapsed"],
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        precision=precision,
    )
    write_atomically(out / "result.json", (json.dumps(asdict(result), indent=1) + "\n").encode())
    try:
        title = f"{settings.preset}, {result.parameters / 1e6:.1f}M parameters, {result.tokens:,} tokens"
        draw_loss(rows, out / "loss.png", final=result.bits_per_byte, gzip=gzip, xz=xz, title=title)
    except ImportError as error:
        console.print(str(error))
    console.print(
        f"{result.bits_per_byte:.3f} bits per byte on held-out text (gzip -9 {gzip:.3f}, xz -9 {xz:.3f}) after "
        f"{result.steps} steps, {result.tokens:,} tokens, {clock(result.seconds)}. The model is in {out / 'model'}.",
        highlight=False,
        soft_wrap=True,
    )
    return result


def held_out_texts(source: str) -> list[tuple[str, str]]:
    """(name, text) of the held-out documents, in shard order."""
    return [
        (name, text) for split, name, text in split_documents(source, plan_split(source)) if split == "val"
    ]


def command(out: Path) -> str:
    """What to type to go on with a run."""
    return f"python -m recipes.pretrain --resume --out {shlex.quote(str(out))}"


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        settings = tyro.cli(Settings, args=args, prog="python -m recipes.pretrain")
        if settings.resume:  # once more, over what the run was started with
            settings = tyro.cli(
                Settings, args=args, prog="python -m recipes.pretrain", default=recorded(settings.out)
            )
        train(settings)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("Interrupted; what was saved before is whole.", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
