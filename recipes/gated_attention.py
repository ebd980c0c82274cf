"""The gated-attention study (arXiv:2505.06708) at a scale that you have: arms, seeds, claims with their signs.

    python -m recipes.gated_attention toy --budget 40m
    python -m recipes.gated_attention lm --budget 75m --seeds 0 1 2
    python -m recipes.gated_attention report
    python -m recipes.gated_attention report --checkpoint DIR DIR

Each run is an arm and a seed. What is finished is kept; the same command goes on after Ctrl-C, a crash or a kill, with
exactly the losses it would have had. docs/gated_attention.md explains arms, figures and what to expect.
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
    """What all experiments share.

    Attributes:
        preset: "cpu" for a laptop, "gpu" for one large GPU, "paper" for the paper's own sizes.
        arms: which; those of the preset, if none are named. "all" names all that the model has.
        seeds: of order and weights; the preset's, if none are given.
        budget: wall-clock time for all that is named here, such as 20m; decides once how many steps each run has.
        jobs: runs at a time; as many as there are CPU cores, and one on a GPU.
        out: folder for runs, text and report.
        device: "auto", "cpu" or "cuda".
        compiled: train with torch.compile, which takes minutes to begin and pays on a GPU.
        dry_run: only say what would run.
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
    """Bigram-backcopy in one layer: sinks, drained values and gates, a minute or two a run."""


@dataclass(frozen=True)
class WithText(Options):
    """What experiments on text share.

    Attributes:
        data: "stdlib" (this Python's standard library), a folder, a glob or a file.
    """

    data: str = "stdlib"


@dataclass(frozen=True)
class Lm(WithText):
    """One small language model an arm, at equal parameters, measured while it trains.

    Attributes:
        model: "dense" or "moe" for softmax attention everywhere; "hybrid" for Gated DeltaNet's own choices.
    """

    model: Literal["dense", "moe", "hybrid"] = "dense"


@dataclass(frozen=True)
class Ladder(WithText):
    """Learning rates from once to eight times, on a deep and narrow model: loss, spikes, divergence.

    Attributes:
        rates: multiples of the preset's rate.
        precisions: of training: fp32, bf16.
    """

    rates: tuple[float, ...] = ()
    precisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extrapolate(WithText):
    """Extend finished `lm` runs to longer windows, then by YaRN beyond: loss by position."""


@dataclass(frozen=True)
class Report:
    """Pictures, the table of claims, one JSON; or the study's figures of checkpoints.

    Attributes:
        out: the folder of the runs.
        also: results.json of other reports, whose runs are told with those here: seeds of another machine.
        checkpoint: checkpoints to measure, instead of the runs: folders, or on the hub owner/name or owner/name/folder.
        data: text to measure it on.
        window: its windows, in tokens.
        sequences: how many.
        prompt: whose attention is drawn; a few lines of Python, if empty.
        device: "auto", "cpu" or "cuda".
        experts: where a checkpoint's routed experts are: "memory", "int8", or "mmap" for models larger than memory.
    """

    out: Path = OUT
    also: tuple[Path, ...] = ()
    checkpoint: tuple[Path, ...] = ()
    data: str = "stdlib"
    window: int = 1024
    sequences: int = DEFAULT_SEQUENCES
    prompt: str = ""
    device: str = "auto"
    experts: Literal["memory", "int8", "mmap"] = "memory"


def experiment(options: Options, console: Console) -> None:
    """Run one of the experiments. Raises: ValueError for what cannot run; Stopped after a signal."""
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
    """The finished runs of these tasks, extended and measured."""
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
