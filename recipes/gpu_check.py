"""Check what needs a GPU, in ten minutes: whether the kernels are correct, and how fast they are.

    python -m recipes.gpu_check                            on a machine with an NVIDIA GPU; or: make gpu-check
    python -m recipes.gpu_check --only device parity       these sections alone
    python -m recipes.gpu_check --resume RESULTS.json      go on with what an earlier run did not finish
    python -m recipes.gpu_check --quick --device cpu       runs the program at tiny sizes, without a GPU

Models have the shapes of Qwen3-Next-80B-A3B and as many of its layers as the GPU has room for. Each section runs in a
process of its own and has a time limit; what it leaves over goes to the later ones. A job that fails, hangs or crashes
is reported as a row, and the others still run. DATE-GPU.json and .md are replaced atomically after every row;
DATE-GPU.log has what the processes printed. docs/gpu.md explains the sections.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import qwen3next as q
from layers.cpp.build import missing
from recipes.gpu.bench import Row, Section, Settings
from recipes.gpu.parent import Runner, shares
from recipes.gpu.report import Report, resumed
from recipes.measure.measuring import gpu_name, machine


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        out: folder for the results; default $OUT, else docs/benchmarks.
        device: "cuda", or "cpu" to try the program.
        preset: model size (random weights, bf16); default the released 80B-A3B model on a GPU, tiny on a CPU.
        seconds: time for all sections together.
        only: run only sections whose name contains one of these words; default all.
        resume: .json file of an earlier run with the same options, which is continued.
        quick: use tiny sizes.
        seed: random seed of weights and tokens.
    """

    out: Path | None = None
    device: str = "cuda"
    preset: str | None = None
    seconds: float = 500.0
    only: tuple[str, ...] = ()
    resume: Path | None = None
    quick: bool = False
    seed: int = 0


def settings_of(options: Options) -> Settings:
    """Raises: ValueError for a device or a preset that does not exist."""
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"The device must be cuda or cpu, not {options.device!r}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "gpu-check needs an NVIDIA GPU and a torch built for CUDA, and there is none here: "
            "try the program without a GPU with --quick --device cpu."
        )
    preset = options.preset or ("qwen3_next_80b_a3b" if options.device == "cuda" else "tiny")
    if preset not in q.presets.ALL:
        raise ValueError(f"There is no preset {preset!r}: choose {', '.join(q.presets.ALL)}.")
    return Settings(options.device, preset, options.quick, options.seed)


def chosen(sections: dict[str, Section], only: tuple[str, ...]) -> dict[str, Section]:
    """The sections that contain one of these words; all without words. Raises: ValueError for a word in none."""
    for word in only:
        if not any(word in name for name in sections):
            raise ValueError(f"There is no section {word!r}: choose of {', '.join(sections)}.")
    return {name: section for name, section in sections.items() if not only or any(word in name for word in only)}


def report_of(options: Options, settings: Settings) -> Report:
    """A new report, or the one that is resumed."""
    folder = options.out or Path(os.environ.get("OUT") or "docs/benchmarks")
    what = {"device": settings.device, "preset": settings.preset, "quick": settings.quick, "seed": settings.seed}
    where = machine()
    if options.resume is not None:
        report = resumed(options.resume, folder, what)
    else:
        name = gpu_name() if settings.device == "cuda" else "cpu"
        report = Report(folder / f"{where['date']}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}", what)
    report.machines.append(where)
    return report


def noting(report: Report, began: float) -> Callable[[str, str, Row], None]:
    """Adds a row to the report and prints it."""

    def note(section: str, job: str, row: Row) -> None:
        report.add(section, job, row)
        Console().print(f"[{time.monotonic() - began:.0f} s] {section}: {row}", markup=False, soft_wrap=True)

    return note


def main(options: Options, *, module: str = "recipes.gpu.sections") -> list[dict[str, Any]]:
    """Run the sections; print and write each row as soon as it is measured.

    Args:
        module: where SECTIONS are, for this process and for those of the sections.
    Raises: ValueError for options that do not fit.
    """
    settings = settings_of(options)
    sections = chosen(import_module(module).SECTIONS, options.only)
    if settings.device == "cpu":
        missing()  # compiles the code for the CPU where that was not done yet, which no section has the time for
    report, began = report_of(options, settings), time.monotonic()
    report.write()
    runner = Runner(noting(report, began), report.finish, report.path.with_suffix(".log"), module)
    for name in sections:
        left = options.seconds - (time.monotonic() - began)
        known = Settings(settings.device, settings.preset, settings.quick, settings.seed, report.rates())
        runner.run(name, known, shares(sections, left, name), report.done.get(name, []))
        report.write()
    return report.rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as mistake:
        sys.exit(str(mistake))
