"""Rerun the gated-attention study (arXiv:2505.06708) at a small scale: arms, seeds, and its claims with their signs.

    python -m recipes.gated_attention toy --budget 40m
    python -m recipes.gated_attention lm --budget 75m --seeds 0 1 2
    python -m recipes.gated_attention report
    python -m recipes.gated_attention report --checkpoint DIR DIR

A run is one arm with one seed. Finished runs are kept. After Ctrl-C, a crash or a kill, the same command continues with
exactly the losses of an uninterrupted run. docs/gated_attention.md explains arms, figures and expected results.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro
from rich.console import Console

from recipes.pretrain import exit_status
from recipes.study.checkpoint import DEFAULT_SEQUENCES, How, report_checkpoints
from recipes.study.extrapolate import extension_task, measure_lengths
from recipes.study.progress import say
from recipes.study.queue import run_all, with_steps
from recipes.study.report import report
from recipes.study.run import Task
from recipes.study.sizes import PRESETS
from recipes.study.tasks import Which, plan_line, refuse_what_does_not_fit, tasks_of
from recipes.study.text import bos_id, prepare_text
from recipes.training.settings import pick_device
from recipes.training.tokenizer import load_tokenizer

EXTENDED = ("baseline", "g1_elementwise")
OUT = Path("runs/gated_attention")
PROGRAM = "python -m recipes.gated_attention"


@dataclass(frozen=True)
class Options:
    """Options that all experiments share.

    Attributes:
        preset: "cpu" for a laptop, "gpu" for one large GPU, "paper" for the paper's own sizes.
        arms: arms to run; default those of the preset. "all" runs every arm of the model.
        seeds: random seeds of data order and weights; default those of the preset.
        budget: wall-clock time for all these runs, such as 20m; sets the number of steps of each run, once.
        jobs: runs at a time; default the number of CPU cores, and 1 on a GPU.
        out: folder for runs, text and report.
        device: "auto", "cpu" or "cuda".
        compiled: train with torch.compile, which takes minutes to start and pays off on a GPU.
        dry_run: only print what would run.
    """

    preset: Literal["cpu", "gpu", "paper"] = "cpu"
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    budget: str | None = None
    jobs: int | None = None
    out: Path = OUT
    device: str = "auto"
    compiled: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Toy(Options):
    """Bigram-backcopy in one layer: attention sinks, small values at the sink, and gates; one to two minutes a run."""


@dataclass(frozen=True)
class WithText(Options):
    """Options that experiments on text share.

    Attributes:
        data: "stdlib" (the source of Python's standard library), a folder, a glob or a file.
    """

    data: str = "stdlib"


@dataclass(frozen=True)
class Lm(WithText):
    """Train one small language model for each arm, at equal parameters, and measure it during training.

    Attributes:
        model: "dense" or "moe" for softmax attention in every layer; "hybrid" for the variants of Gated DeltaNet.
    """

    model: Literal["dense", "moe", "hybrid"] = "dense"


@dataclass(frozen=True)
class Ladder(WithText):
    """Train a deep and narrow model at one to eight times the learning rate: loss, spikes, divergence.

    Attributes:
        rates: multiples of the preset's learning rate.
        precisions: precisions of training: fp32, bf16.
    """

    rates: tuple[float, ...] = ()
    precisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extrapolate(WithText):
    """Extend finished `lm` runs to longer windows, and further with YaRN: loss by position."""


@dataclass(frozen=True)
class Report:
    """Write pictures, the table of claims and one JSON file; or measure the study's figures of checkpoints.

    Attributes:
        out: folder of the runs.
        also: results.json of other reports, whose runs are added, such as other seeds from another machine.
        checkpoint: checkpoints to measure instead of the runs: folders, or hub names such as owner/name/folder.
        data: text to measure checkpoints on.
        window: tokens in a window of that text.
        sequences: number of windows.
        prompt: prompt whose attention is drawn; default a few lines of Python.
        device: "auto", "cpu" or "cuda".
        experts: how routed experts are held: "memory", "int8", or "disk" for models larger than memory.
    """

    out: Path = OUT
    also: tuple[Path, ...] = ()
    checkpoint: tuple[Path, ...] = ()
    data: str = "stdlib"
    window: int = 1024
    sequences: int = DEFAULT_SEQUENCES
    prompt: str = ""
    device: str = "auto"
    experts: Literal["memory", "int8", "disk"] = "memory"


def experiment(options: Options, console: Console) -> None:
    """Run one experiment. Raises: ValueError for options that cannot run; Stopped after a signal."""
    on_gpu = pick_device(options.device).type == "cuda"
    jobs = (1 if on_gpu else os.cpu_count() or 1) if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more.")
    preset = PRESETS[options.preset]
    text, vocabulary = None, 0
    if isinstance(options, Toy):
        kind, size = "toy", preset.toy
    elif isinstance(options, Ladder):
        kind, size = "ladder", preset.ladder
    else:
        model = options.model if isinstance(options, Lm) else "dense"
        if model not in preset.lm:
            raise ValueError(f"The preset {options.preset} has no {model} model: choose {', '.join(preset.lm)}.")
        kind, size = f"lm-{model}", preset.lm[model]
    if isinstance(options, WithText):
        text = options.out / "text"
        if options.dry_run and not (text / "tokenizer").is_dir():
            vocabulary = int(size.tokens[4:]) if size.tokens.startswith("bpe:") else 151_936
        else:
            tokenizer, _ = prepare_text(options.data, size.tokens, text)
            vocabulary = tokenizer.get_vocab_size()
    arms = options.arms or (EXTENDED if isinstance(options, Extrapolate) else ())
    which = Which(
        options.preset,
        kind,
        arms,
        options.seeds,
        rates=options.rates if isinstance(options, Ladder) else (),
        precisions=options.precisions if isinstance(options, Ladder) else (),
        out=options.out,
        device=options.device,
        data=options.data if isinstance(options, WithText) else None,
        text=text,
        compiled=options.compiled,
    )
    tasks = tasks_of(which, size, vocabulary=vocabulary)
    say(console, plan_line(tasks, jobs))
    if options.dry_run:
        return
    refuse_what_does_not_fit(tasks, jobs, options.device)
    if isinstance(options, Extrapolate):
        extend(options, tasks, jobs, console)
        return
    tasks = with_steps(tasks, plan=options.out / kind / "plan.json", budget=options.budget, jobs=jobs, console=console)
    run_all(tasks, jobs=jobs, console=console)
    say(console, f"Done. Pictures and table: {PROGRAM} report --out {options.out}")


def extend(options: Extrapolate, tasks: list[Task], jobs: int, console: Console) -> None:
    """Extend the finished runs of these tasks, and measure them."""
    numbers = PRESETS[options.preset].extension
    folder = options.out / "extension"
    extended = [
        extension_task(
            task, folder=folder, longer=int(numbers["longer"]), share=numbers["share"], theta=numbers["theta"]
        )
        for task in tasks
    ]
    extended = with_steps(extended, plan=folder / "plan.json", budget=options.budget, jobs=jobs, console=console)
    run_all(extended, jobs=jobs, console=console)
    bos = bos_id(load_tokenizer(options.out / "text" / "tokenizer"))
    for task in extended:
        say(console, f"Losses by position of {task.name} ...")
        measure_lengths(task, bos, yarn=int(numbers["yarn"]))


COMMANDS = {"toy": Toy, "lm": Lm, "ladder": Ladder, "extrapolate": Extrapolate, "report": Report}


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        chosen: type = Union[  # type: ignore[assignment]  # noqa: UP007
            tuple(Annotated[kind, tyro.conf.subcommand(name=name)] for name, kind in COMMANDS.items())
        ]
        options: Options | Report = tyro.cli(chosen, args=args, prog=PROGRAM, description=__doc__)
        console = Console()
        if not isinstance(options, Report):
            experiment(options, console)
        elif not options.checkpoint:
            report(options.out, console, options.also)
        else:
            how = How(options.data, options.window, options.sequences, options.prompt, options.device, options.experts)
            report_checkpoints(options.checkpoint, how, out=options.out / "report", console=console)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
