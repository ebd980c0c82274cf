"""Small experiments about the architecture and its training, each with several seeds; a page with tables and pictures.

    python -m recipes.evidence --out runs/evidence
    python -m recipes.evidence --out runs/evidence --only recall --steps 2000

Experiments: "mixers" compares the hybrid with attention alone and Gated DeltaNet alone, at equal parameters and tokens;
"recall" measures recall of key-value pairs against the share of softmax layers; "optimizers" AdamW with Muon; "balance"
the balance loss of micro-batches with that of the whole batch. Every run is a folder of its own. A killed call goes on
where it was, and the page is written anew after each run.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

import qwen3next as q
from qwen3next.inspect import count_parameters
from recipes.data import Options as DataOptions
from recipes.data import prepare
from recipes.demo import machine
from recipes.pretrain import Run, exit_status, start_or_resume, train
from recipes.training.data import LabelledBatch
from recipes.training.documents import digest
from recipes.training.report import Live, Metrics, Row, read_metrics
from recipes.training.settings import Settings
from recipes.training.steps import Part
from recipes.training.tokenizer import write_atomically

LINEAR, FULL = "linear_attention", "full_attention"
# 0.3M parameters: four layers of width 64.
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
HELD_OUT = 10**9  # samples of the recall task from this number on are never trained on


@dataclass(frozen=True)
class Options:
    """Run small experiments with several seeds.

    Attributes:
        out: folder of all runs, of evidence.md, evidence.json and the pictures.
        only: experiments to run: mixers, recall, optimizers, balance; none given means all.
        seeds: seeds of each arm.
        steps: steps of a run of the text experiments; recall takes as many.
        data: text of the experiments on text.
    """

    out: Path = Path("runs/evidence")
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    data: str = "stdlib"

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(EXPERIMENTS)):
            raise ValueError(f"There is no experiment {unknown[0]!r}: choose {', '.join(EXPERIMENTS)}.")
        if self.steps < 1 or not self.seeds:
            raise ValueError("steps must be 1 or more, and at least one seed must be given.")


@dataclass(frozen=True)
class Arm:
    """One side of an experiment.

    Attributes:
        config: changes of `SIZE`.
        settings: changes of the run's settings.
    """

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]


def mixers() -> list[Arm]:
    """Equal parameters: the experts' width makes up for the mixers' sizes."""
    kinds = {"hybrid 3:1": [LINEAR] * 3 + [FULL], "attention": [FULL] * 4, "Gated DeltaNet": [LINEAR] * 4}
    target = _size({"layer_types": kinds["hybrid 3:1"]})
    return [Arm(name, _matched({"layer_types": types}, target), {}) for name, types in kinds.items()]


def recall() -> list[Arm]:
    """Softmax layers at the end, none to all of four; dense feed-forwards, equal parameters, 8 pairs to remember."""
    small = {"num_experts": 0, "linear_key_head_dim": 8, "linear_value_head_dim": 16, "mtp_num_hidden_layers": 0}
    target = _size({"layer_types": [LINEAR] * 3 + [FULL], "intermediate_size": 128, **small})
    how, arms = {"batch_size": 32, "window": 32, "lr": 4e-3}, []
    for softmax in (0, 1, 2, 4):
        changes = {"layer_types": [LINEAR] * (4 - softmax) + [FULL] * softmax, **small}
        arms.append(Arm(f"{softmax} of 4", _matched(changes, target), how))
    return arms


def optimizers() -> list[Arm]:
    """Each at two rates."""
    rates = 2e-3, 6e-3
    return [Arm(f"{o}, lr {lr:g}", {}, {"optimizer": o, "lr": lr}) for o in ("adamw", "muon") for lr in rates]


def balance() -> list[Arm]:
    """Steps of four micro-batches of one window each."""
    how = {"batch_size": 1, "accumulate": 4}
    kinds = {"over the micro-batch": "micro", "over the batch": "batch"}
    return [Arm(name, {}, {"balance": kind, **how}) for name, kind in kinds.items()]


EXPERIMENTS: dict[str, Callable[[], list[Arm]]] = {
    "mixers": mixers,
    "recall": recall,
    "optimizers": optimizers,
    "balance": balance,
}


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
    todo = [(e, arm, seed) for e in chosen for seed in options.seeds for arm in EXPERIMENTS[e]()]
    if set(chosen) - {"recall"}:  # few held-out bytes, because every run measures all of them
        how = DataOptions(options.data, options.out / "text", "bytes", workers=1, validation_share=0.005)
        prepare(how, console=Console(quiet=True))
    for number, (experiment, arm, seed) in enumerate(todo, start=1):
        folder = options.out / experiment / f"{arm.name.replace(' ', '-').replace(':', '-').replace(',', '')}-{seed}"
        if not (folder / "evidence.json").is_file():
            console.print(f"{number}/{len(todo)}: {experiment}, {arm.name}, seed {seed}", highlight=False)
            begun = time.process_time()
            row = (_recall_run if experiment == "recall" else _text_run)(options, arm, seed, folder)
            row |= {"parameters": _size(arm.config), "cpu_seconds": time.process_time() - begun}
            write_atomically(folder / "evidence.json", json.dumps(row).encode())
        made.setdefault(experiment, {}).setdefault(arm.name, {})[str(seed)] = json.loads(
            (folder / "evidence.json").read_bytes()
        )
        found = {"options": asdict(options) | {"out": str(options.out)}, "machine": machine(), "results": made}
        write_atomically(options.out / "evidence.json", (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(options.out / "evidence.md", page(found).encode())
    draw(made, options.out)
    console.print(f"The page is {options.out / 'evidence.md'}.", highlight=False)
    return found


def _text_run(options: Options, arm: Arm, seed: int, folder: Path) -> Row:
    """Train on bytes of text; held-out bits per byte, needle recall and speed."""
    settings = Settings(
        data=(str(options.out / "text"),),
        preset="tiny",
        model=tuple(f"{key}={json.dumps(value)}" for key, value in (SIZE | arm.config).items()),
        steps=options.steps,
        batch_size=4,
        window=256,
        lr=4e-3,
        seed=seed,
        out=folder,
        eval_every=max(options.steps // 4, 1),
        save_every=max(options.steps // 2, 1),
        needles=(64, 256),
        tensorboard=False,
        precision="fp32",
    )
    settings = replace(settings, **arm.settings, resume=(folder / "settings.json").is_file())
    result, last = train(settings, console=Console(quiet=True)), read_metrics(folder)[-1]
    measured = ("needle/64", "needle/256", "load_entropy", "max_load", "mtp_accuracy/1")
    return {"bits_per_byte": result.bits_per_byte, "tokens_per_second": result.tokens_per_second} | {
        key: last[key] for key in measured if key in last
    }


class Pairs:
    """Multi-query associative recall: pairs of a key and a value, then every key again, in another order.

    Keys are tokens 1 to 64, values 65 to 128; values behind the keys' second appearance are to be predicted. Sequences
    are a pure function of their number. Source: arXiv:2312.04927.
    """

    def __init__(self, window: int, seed: int) -> None:
        self.pairs, self.window, self.seed = window // 4, window, seed

    def batch(self, first_sample: int, batch_size: int) -> LabelledBatch:
        """Sequences first_sample to first_sample + batch_size - 1, (b, window)."""
        ids = np.zeros((batch_size, self.window), dtype=np.int64)
        labels = np.full_like(ids, -100)
        n = self.pairs
        for row in range(batch_size):
            generator = np.random.default_rng([self.seed, first_sample + row])
            keys, values = generator.permutation(64)[:n] + 1, generator.integers(65, 129, n)
            again = generator.permutation(n)
            ids[row, : 2 * n : 2], ids[row, 1 : 2 * n : 2] = keys, values
            ids[row, 2 * n : 4 * n : 2], ids[row, 2 * n + 1 : 4 * n : 2] = keys[again], values[again]
            labels[row, 2 * n + 1 : 4 * n : 2] = values[again]
        tensors = (
            torch.from_numpy(ids),
            torch.zeros(batch_size, self.window, dtype=torch.long),
            torch.from_numpy(labels),
        )
        return LabelledBatch(*tensors)


@torch.no_grad()
def recalled(model: q.Qwen3Next, windows: Pairs, *, sequences: int = 64) -> Row:
    """Share of the values that are the most likely token, in sequences that were never trained on."""
    part = Part.of(windows.batch(HELD_OUT, sequences), model.embed_tokens.weight.device)
    assert part.labels is not None
    guess = model(part.input_ids).logits[:, :-1].argmax(-1)
    place = part.labels[:, 1:] != -100
    return {"recall": float((guess == part.labels[:, 1:])[place].float().mean())}


def _recall_run(options: Options, arm: Arm, seed: int, folder: Path) -> Row:
    """Train on pairs, by the loop of `recipes.pretrain`."""
    settings = Settings(
        data=("pairs",),
        tokenizer="none",
        preset=arm.name,
        steps=options.steps,
        warmup=max(options.steps // 10, 1),
        seed=seed,
        out=folder,
        eval_every=max(options.steps // 8, 1),
        save_every=max(options.steps // 2, 1),
        tensorboard=False,
        precision="fp32",
    )
    settings = replace(settings, **arm.settings, resume=(folder / "settings.json").is_file())
    windows = Pairs(settings.window, seed)
    torch.manual_seed(seed)
    model = q.Qwen3Next(q.presets.tiny(**(SIZE | {"vocab_size": 129, "eos_token_id": 0} | arm.config)))
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
    return {"recall": curve[-1][1], "loss": rows[-1]["lm"], "curve": curve}


SHOWN = {"bits_per_byte": 3, "recall": 3, "loss": 3, "needle/64": 2, "needle/256": 2, "mtp_accuracy/1": 3}
SHOWN |= {"load_entropy": 3, "tokens_per_second": 0, "parameters": 0}


def page(found: dict[str, Any]) -> str:
    """The tables: mean over seeds, and the smallest and largest value."""
    options, lines = found["options"], ["# Evidence", ""]
    total = 0.0
    for experiment, arms in found["results"].items():
        keys = [key for key in SHOWN if any(key in row for seeds in arms.values() for row in seeds.values())]
        lines += [f"## {experiment}", "", EXPERIMENTS[experiment].__doc__ or "", ""]
        lines += [f"| arm | seeds | {' | '.join(keys)} |", "|---|--:|" + "--:|" * len(keys)]
        for arm, seeds in arms.items():
            cells = [_cell([row[key] for row in seeds.values() if key in row], SHOWN[key]) for key in keys]
            lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
            total += sum(row["cpu_seconds"] for row in seeds.values())
        lines.append("")
    lines.append(
        f"{options['steps']} steps a run; {total / 60:.0f} CPU minutes in all; {found['machine']}. A cell is the mean "
        "over seeds, with the smallest and the largest value in brackets."
    )
    return "\n".join(lines) + "\n"


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def draw(results: dict[str, Any], out: Path) -> None:
    """One picture an experiment: each arm's seeds as dots and their mean as a bar."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    for experiment, arms in results.items():
        key = "recall" if experiment == "recall" else "bits_per_byte"
        figure = Figure(figsize=(1.6 + 1.4 * len(arms), 3.4), dpi=120, layout="constrained")
        axis = figure.subplots()
        for place, seeds in enumerate(arms.values()):
            values = [row[key] for row in seeds.values()]
            axis.bar(place, statistics.fmean(values), color="#b9cbe4", width=0.6)
            axis.plot([place] * len(values), values, "o", color="#1f4e9c", markersize=4)
        every = [row[key] for seeds in arms.values() for row in seeds.values()]
        if key == "bits_per_byte":
            room = max(max(every) - min(every), 0.05)
            axis.set_ylim(min(every) - room, max(every) + 0.3 * room)
        else:
            axis.set_ylim(0, 1)
        axis.set_xticks(range(len(arms)), [name.replace(", ", "\n") for name in arms], fontsize=8)
        axis.set_title("share of values recalled" if key == "recall" else "held-out bits per byte", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(out / f"{experiment}.png")


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(tyro.cli(Options, args=args, prog="python -m recipes.evidence")))


if __name__ == "__main__":
    sys.exit(main())
