"""Small experiments about the architecture and its training, each with several seeds; a page with tables and pictures.

    python -m recipes.evidence --out runs/evidence
    python -m recipes.evidence --out runs/evidence --only recall --recall-steps 2000

Experiments: "sizes" trains three sizes on one text, held-out loss against counted operations; "mixers" compares the
hybrid with attention alone and Gated DeltaNet alone, at equal parameters and tokens; "share" measures held-out loss on
text, and "recall" recall of key-value pairs, against the share of softmax layers; "optimizers" compares AdamW with
Muon; "balance" the balance loss of micro-batches with that of the whole batch. Every run is a folder of its own.
Equal arms of several experiments share a run. A killed call goes on where it was, and the page is written anew after
each run.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from qwen3next.inspect import count_parameters
from recipes.data import Options as DataOptions
from recipes.data import prepare
from recipes.demo import machine
from recipes.pretrain import Run, exit_status, start_or_resume, train
from recipes.training.data import Batch
from recipes.training.documents import digest
from recipes.training.flops import training_flops
from recipes.training.optimizers import optimizers as optimizers_of
from recipes.training.pairs import KINDS, Pairs, recalled
from recipes.training.report import Live, Metrics, Row, read_metrics
from recipes.training.settings import Settings, comparable
from recipes.training.steps import accumulate_gradients
from recipes.training.tokenizer import write_atomically

LINEAR, FULL = "linear_attention", "full_attention"
# 0.37M parameters: four layers of width 64.
SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@dataclass(frozen=True)
class Options:
    """Run small experiments with several seeds.

    Attributes:
        out: folder of all runs, of evidence.md, evidence.json and the pictures.
        only: experiments to run: sizes, mixers, share, recall, optimizers, balance; none given means all.
        seeds: seeds of each arm.
        steps: steps of a run on text.
        recall_steps: steps of a run of `recall`.
        data: text of the experiments on text.
    """

    out: Path = Path("runs/evidence")
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    recall_steps: int = 500
    data: str = "stdlib"

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(EXPERIMENTS)):
            raise ValueError(f"There is no experiment {unknown[0]!r}: choose {', '.join(EXPERIMENTS)}.")
        if min(self.steps, self.recall_steps) < 1 or not self.seeds:
            raise ValueError("steps and recall_steps must be 1 or more, and at least one seed must be given.")


@dataclass(frozen=True)
class Arm:
    """One side of an experiment.

    Attributes:
        config: changes of `SIZE`.
        settings: changes of the run's settings, `TEXT` or `PAIRS`.
        slow: start from decays as slow as those of flash-linear-attention, see `slow_decays`.
    """

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    slow: bool = True


# 200 steps are 204,800 bytes.
TEXT: dict[str, Any] = {"preset": "tiny", "batch_size": 4, "window": 256, "lr": 4e-3, "needles": (64, 256)}
PAIRS: dict[str, Any] = {"preset": "tiny", "tokenizer": "none", "data": ("pairs",), "batch_size": 16, "window": 64}
PAIRS |= {"lr": 4e-3, "optimizer": "muon"}
LARGER: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
LARGER |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
LARGER |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SMALLER: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALLER |= {"linear_num_key_heads": 1, "linear_num_value_heads": 1}
SMALLER |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def sizes() -> list[Arm]:
    """Width, heads and experts' width doubled twice; the same text, steps and learning rate."""
    kinds = {"width 32": SMALLER, "width 64": {}, "width 128": LARGER}
    return [Arm(name, changes, {}) for name, changes in kinds.items()]


def mixers() -> list[Arm]:
    """Equal parameters: the experts' width makes up for the mixers' sizes."""
    of = {arm.name: arm for arm in share()}
    kinds = {"hybrid 3:1": "1 of 4", "attention": "4 of 4", "Gated DeltaNet": "0 of 4"}
    return [replace(of[softmax], name=name) for name, softmax in kinds.items()]


def share() -> list[Arm]:
    """Softmax layers at the end, none to all of four, trained on text; equal parameters by the experts' width."""
    target, arms = _size({"layer_types": _layers(1)}), []
    for softmax in (0, 1, 2, 4):
        arms.append(Arm(f"{softmax} of 4", _matched({"layer_types": _layers(softmax)}, target), {}))
    return arms


def recall() -> list[Arm]:
    """Softmax layers at the end, none to all of four; dense feed-forwards, equal parameters, 8 pairs to remember."""
    small: dict[str, Any] = {
        "num_experts": 0,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "mtp_num_hidden_layers": 0,
    }
    small |= {"vocab_size": 2 * KINDS + 1, "eos_token_id": 0, "partial_rotary_factor": 1.0}
    target, arms = _size({"layer_types": _layers(1), "intermediate_size": 128, **small}), []
    for softmax in (0, 1, 2, 4):
        changes = {"layer_types": _layers(softmax), **small}
        arms.append(Arm(f"{softmax} of 4", _matched(changes, target), {}))
    return [*arms, *(replace(arm, name=f"{arm.name}, fast decays", slow=False) for arm in arms[:2])]


def optimizers() -> list[Arm]:
    """Each at two rates."""
    rates = 4e-3, 8e-3
    return [Arm(f"{o}, lr {lr:g}", {}, {"optimizer": o, "lr": lr}) for o in ("adamw", "muon") for lr in rates]


def balance() -> list[Arm]:
    """Steps of four micro-batches of one window each."""
    how = {"batch_size": 1, "accumulate": 4}
    kinds = {"over the micro-batch": "micro", "over the batch": "batch"}
    return [Arm(name, {}, {"balance": kind, **how}) for name, kind in kinds.items()]


EXPERIMENTS: dict[str, Callable[[], list[Arm]]] = {
    "sizes": sizes,
    "mixers": mixers,
    "share": share,
    "recall": recall,
    "optimizers": optimizers,
    "balance": balance,
}


def _layers(softmax: int) -> list[str]:
    return [LINEAR] * (4 - softmax) + [FULL] * softmax


def _size(changes: dict[str, Any]) -> int:
    counted = count_parameters(q.presets.tiny(**(SIZE | changes)))
    return counted.main + counted.mtp


def _matched(changes: dict[str, Any], target: int) -> dict[str, Any]:
    """The changes with the feed-forward's or experts' width that comes nearest to so many parameters."""
    field = "intermediate_size" if changes.get("num_experts") == 0 else "moe_intermediate_size"
    sizes = {width: _size(changes | {field: width}) for width in (16, 17)}
    width = 16 + round((target - sizes[16]) / (sizes[17] - sizes[16]))  # the number is linear in the width
    return changes | {field: max(width, 1)}


def run(options: Options, *, console: Console | None = None) -> dict[str, Any]:
    """Run what is missing, and write the page after each run; returns the contents of evidence.json.

    Raises: as `recipes.pretrain.train`.
    """
    console = Console() if console is None else console
    made: dict[str, dict[str, dict[str, Row]]] = {}
    chosen = options.only or tuple(EXPERIMENTS)
    todo = [(e, arm, seed) for seed in options.seeds for e in chosen for arm in EXPERIMENTS[e]()]
    if set(chosen) - {"recall"}:  # few held-out bytes, because every run measures all of them
        how = DataOptions(options.data, options.out / "text", "bytes", workers=1, validation_share=0.005)
        prepare(how, console=Console(quiet=True))
    for number, (experiment, arm, seed) in enumerate(todo, start=1):
        settings = settings_of(options, experiment, arm, seed)
        path = settings.out / "evidence.json"
        if not path.is_file():
            console.print(f"{number}/{len(todo)}: {experiment}, {arm.name}, seed {seed}", highlight=False)
            with _cpu_time(settings.out / "cpu_seconds") as so_far:
                row = (_recall_run if experiment == "recall" else _text_run)(settings, arm)
            write_atomically(path, json.dumps(row | {"cpu_seconds": so_far[0]}).encode())
        row = json.loads(path.read_bytes()) | {"run": settings.out.name}
        made.setdefault(experiment, {}).setdefault(arm.name, {})[str(seed)] = row
        found = _written(options, made, {})
    on_text = {experiment: EXPERIMENTS[experiment]() for experiment in made if experiment != "recall"}
    found = _written(options, made, speeds(options, on_text))
    draw(made, options.out)
    console.print(f"The page is {options.out / 'evidence.md'}.", highlight=False)
    return found


def _written(options: Options, made: dict[str, Any], speed: dict[str, Any]) -> dict[str, Any]:
    """Write evidence.json and evidence.md; the contents of the former."""
    found = {"options": asdict(options) | {"out": str(options.out)}, "machine": machine(), "results": made}
    found["speed"] = speed
    write_atomically(options.out / "evidence.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(options.out / "evidence.md", page(found).encode())
    return found


@contextmanager
def _cpu_time(path: Path) -> Iterator[list[float]]:
    """CPU seconds of this process within the block, added to those in a file; all of them at the end.

    A call that SIGKILL ends adds nothing.
    """
    before, begun, found = float(path.read_text()) if path.is_file() else 0.0, time.process_time(), [0.0]
    try:
        yield found
    finally:
        found[0] = before + time.process_time() - begun
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, str(found[0]).encode())


def settings_of(options: Options, experiment: str, arm: Arm, seed: int) -> Settings:
    """The settings of a run, whose folder is named by a digest of all that it depends on."""
    on_pairs = experiment == "recall"
    steps = options.recall_steps if on_pairs else options.steps
    how = PAIRS if on_pairs else TEXT | {"data": (str(options.out / "text"),)}
    how = how | {"steps": steps, "warmup": max(steps // 10, 1), "seed": seed} | arm.settings
    settings = Settings(**how, tensorboard=False, precision="fp32")
    config = q.presets.tiny(**(SIZE | arm.config)).to_dict()
    told = json.dumps([config, comparable(settings) | {"data": options.data}, arm.slow], sort_keys=True)
    folder = options.out / "runs" / f"{'pairs' if on_pairs else 'text'}-{digest(told)[:8]}-{seed}"
    resume = (folder / "settings.json").is_file()
    every: dict[str, Any] = {"eval_every": max(steps // 5, 1), "save_every": max(steps // 2, 1)}
    return replace(settings, out=folder, resume=resume, **every)


def new_model(arm: Arm, seed: int) -> q.Qwen3Next:
    """Random weights of an arm."""
    torch.manual_seed(seed)
    model = q.Qwen3Next(q.presets.tiny(**(SIZE | arm.config)))
    if arm.slow:
        slow_decays(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def slow_decays(model: q.Qwen3Next, generator: torch.Generator) -> None:
    """Set dt_bias of all Gated DeltaNet layers so that softplus(dt_bias) is log-uniform from 0.001 to 0.1.

    The model's own start is that of transformers: dt_bias = 1, so that a head keeps a share of e^(-1.3 A) of its state
    a token, with A uniform from 0 to 16: half of the heads forget nearly all within one token.
    Source: flash-linear-attention, fla/layers/gated_deltanet.py, where A is drawn alike.
    """
    for layer in model.modules():
        if isinstance(layer, GatedDeltaNet):
            dt = 1e-3 * torch.exp(torch.rand(layer.dt_bias.shape, generator=generator) * math.log(100))
            layer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def _text_run(settings: Settings, arm: Arm) -> Row:
    """Train on bytes of text; held-out bits per byte, needle recall and counted operations."""
    folder = settings.out
    start = folder / "start"
    if not (start / "config.json").is_file():
        new_model(arm, settings.seed).save_pretrained(start)
    result = train(replace(settings, init=str(start)), console=Console(quiet=True))
    rows = read_metrics(folder)
    flops = training_flops(q.load(start).config, settings.window)  # a token
    measured = ("needle/64", "needle/256", "load_entropy", "max_load", "mtp_accuracy/1")
    return {
        "bits_per_byte": result.bits_per_byte,
        "parameters": result.parameters,
        "training_teraflop": flops * result.tokens / 1e12,
        "curve": [[flops * row["tokens"], row["val_bits_per_byte"]] for row in rows if "val_bits_per_byte" in row],
    } | {key: rows[-1][key] for key in measured if key in rows[-1]}


def speeds(options: Options, arms: dict[str, list[Arm]], *, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Tokens of a training step over the CPU time of the fastest of `rounds` steps, by experiment and arm.

    CPU time, the fastest step, and a step of each arm in turn, because other work on the machine slows all of them.
    Experts have a width that the fast kernels take, see `_timed`. Tokens are random. What was measured is kept in
    speed.json.
    """
    path, places = options.out / "speed.json", {}
    known: dict[str, float] = json.loads(path.read_bytes()) if path.is_file() else {}
    steps: dict[str, tuple[int, Callable[[], None]]] = {}
    for experiment, of in arms.items():
        for arm in map(_timed, of):
            settings = settings_of(options, experiment, arm, 0)
            places[experiment, arm.name] = name = settings.out.name
            if name not in known and name not in steps:
                steps[name] = settings.accumulate * settings.batch_size * settings.window, _step(settings, arm)
    fastest = dict.fromkeys(steps, math.inf)
    for _ in range(rounds):
        for name, (_, step) in steps.items():
            begun = time.process_time()
            step()
            fastest[name] = min(fastest[name], time.process_time() - begun)
    known |= {name: tokens / fastest[name] for name, (tokens, _) in steps.items()}
    write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())
    return {e: {arm.name: known[places[e, arm.name]] for arm in of} for e, of in arms.items()}


def _timed(arm: Arm) -> Arm:
    """The arm with the experts' width at a multiple of 16.

    Widths that make parameters equal may be odd. On a GPU those run in slower kernels: that says nothing of the mixers.
    """
    width = arm.config.get("moe_intermediate_size")
    return arm if width is None else replace(arm, config=arm.config | {"moe_intermediate_size": round(width / 16) * 16})


def _step(settings: Settings, arm: Arm) -> Callable[[], None]:
    """A training step of an arm on random tokens."""
    model = new_model(arm, 0)
    ids = torch.randint(0, 256, (settings.accumulate, settings.batch_size, settings.window))
    micro = [Batch(part, torch.zeros_like(part)) for part in ids]
    taught = optimizers_of(model, settings)

    def step() -> None:
        for optimizer in taught:
            optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(model, micro, precision=settings.precision, balance=settings.balance)
        for optimizer in taught:
            optimizer.step()

    return step


def _recall_run(settings: Settings, arm: Arm) -> Row:
    """Train on pairs, by the loop of `recipes.pretrain`."""
    folder = settings.out
    windows, model = Pairs(settings.window, settings.seed), new_model(arm, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    taught, average, state = start_or_resume(settings, model, digest(f"pairs {settings.window}"))
    console = Console(quiet=True)
    metrics = Metrics(folder, step=state.step, tensorboard=False, console=console)
    try:
        with Live(console) as live:
            look = lambda model: recalled(model, windows)  # noqa: E731
            Run(settings, state, model, taught, windows, look, "fp32", metrics, live, 1.0, average).to_the_end()
    finally:
        metrics.close()
    rows = read_metrics(folder)
    curve = [[row["step"], row["recall"]] for row in rows if "recall" in row]
    return {
        "recall": curve[-1][1],
        "loss": statistics.fmean(row["lm"] for row in rows[-20:]),
        "curve": curve,
        "parameters": _size(arm.config),
    }


SHOWN = {"bits_per_byte": 3, "recall": 3, "loss": 3, "needle/64": 2, "needle/256": 2, "mtp_accuracy/1": 3}
SHOWN |= {"load_entropy": 3, "max_load": 2, "training_teraflop": 2, "parameters": 0}


def page(found: dict[str, Any]) -> str:
    """The tables: mean over seeds, and the smallest and largest value."""
    options, lines = found["options"], ["# Evidence", ""]
    spent: dict[str, float] = {}  # by run: experiments share some
    for experiment, arms in found["results"].items():
        keys = [key for key in SHOWN if any(key in row for seeds in arms.values() for row in seeds.values())]
        lines += [f"## {experiment}", "", EXPERIMENTS[experiment].__doc__ or "", ""]
        speed = found["speed"].get(experiment, {})
        heads = ["seeds", *keys, *(["tokens a CPU second"] if speed else [])]
        lines += [f"| arm | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
        for arm, seeds in arms.items():
            cells = [_cell([row[key] for row in seeds.values() if key in row], SHOWN[key]) for key in keys]
            cells += [f"{speed[arm]:,.0f}"] if speed else []
            lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
            spent |= {row["run"]: row["cpu_seconds"] for row in seeds.values()}
        lines.append("")
    lines.append(
        f"{options['steps']} steps a run on text, {options['recall_steps']} on pairs; {len(spent)} runs, "
        f"{sum(spent.values()) / 60:.0f} CPU minutes in all; {found['machine']}. A cell is the mean over seeds, with "
        "the smallest and the largest value in brackets."
    )
    return "\n".join(lines) + "\n"


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def draw(results: dict[str, Any], out: Path) -> None:
    """A picture an experiment: bars of the means with a dot a seed; curves over counted operations for `sizes`.

    The picture of `share` has the recall of `recall` beside it, where both were run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    for experiment, arms in results.items():
        beside = ["recall"] if experiment == "share" and "recall" in results else []
        panels = [experiment, *beside]
        widths = [5.2 if name == "sizes" else 1.6 + 1.25 * len(results[name]) for name in panels]
        figure = Figure(figsize=(sum(widths), 3.4), dpi=120, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
        for axis, name in zip(axes, panels, strict=True):
            _curves(axis, arms) if name == "sizes" else _bars(axis, results[name])
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(out / f"{experiment}.png")


def _curves(axis: Any, arms: dict[str, Any]) -> None:
    """Held-out loss against the operations spent so far; a line a seed."""
    for (name, seeds), colour in zip(arms.items(), ("#7aa6d9", "#1f4e9c", "#b5502b"), strict=False):
        for number, row in enumerate(seeds.values()):
            label = f"{name}, {row['parameters'] / 1e6:.2f}M" if not number else None
            axis.plot(*zip(*row["curve"], strict=True), "o-", color=colour, markersize=3, linewidth=1, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("training operations so far, FLOP", fontsize=9)
    axis.set_title("held-out bits per byte", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _bars(axis: Any, arms: dict[str, Any]) -> None:
    key = "recall" if all("recall" in row for seeds in arms.values() for row in seeds.values()) else "bits_per_byte"
    for place, seeds in enumerate(arms.values()):
        values = [row[key] for row in seeds.values()]
        axis.bar(place, statistics.fmean(values), color="#b9cbe4", width=0.6)
        axis.plot([place] * len(values), values, "o", color="#1f4e9c", markersize=4)
    every = [row[key] for seeds in arms.values() for row in seeds.values()]
    if key == "bits_per_byte":
        room = max(max(every) - min(every), 0.05)
        axis.set_ylim(min(every) - room, max(every) + 0.3 * room)
    else:
        axis.set_ylim(0, 1.03)
    axis.set_xticks(range(len(arms)), [name.replace(", ", "\n") for name in arms], fontsize=8)
    axis.set_title("share of values recalled" if key == "recall" else "held-out bits per byte", fontsize=10)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(tyro.cli(Options, args=args, prog="python -m recipes.evidence")))


if __name__ == "__main__":
    sys.exit(main())
