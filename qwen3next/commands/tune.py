"""`qwen3next tune`: measure which implementation of each operation is faster on this CPU."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from layers.dispatch import speeds
from qwen3next.commands.common import print_json
from qwen3next.tuning import Measured, tune, write_table


def tune_here(repetitions: int = 5, out: Path | None = None, seed: int = 0, json: bool = False) -> None:
    """Measure on this CPU which implementations "auto" should pick, and keep the figures for this machine.

    Takes about a minute, less on an idle machine. The figures go to the user's cache folder and replace those that are
    shipped for this kind of processor. `qwen3next explain` names the figures that decide. The environment variable
    QWEN3NEXT_TUNED=0 leaves them out; deleting the file forgets them.

    $ qwen3next tune
    $ qwen3next tune --repetitions 10

    Args:
        repetitions: least number of turns of each measurement, after one that does not count.
        out: another file for the figures, which "auto" then does not use.
        seed: random seed of the inputs.
        json: print one JSON object at the end, and the figures as they come to stderr.
    """
    if repetitions < 1:
        raise ValueError("repetitions must be at least 1.")
    if (busy := os.getloadavg()[0]) > 0.5 * (os.cpu_count() or 1):
        print(f"{busy:.1f} other processes are busy: figures are more exact on an idle machine.", file=sys.stderr)
    measured: list[Measured] = []
    last, aloud = None, sys.stderr if json else sys.stdout
    for m in tune(repetitions, seed):
        measured.append(m)
        what = f"{m.operation}, {str(m.dtype).removeprefix('torch.')}{', with gradients' if m.gradients else ''}"
        if what != last:
            _end_line(last, aloud)
            print(f"{what + ':':44}", end="", flush=True, file=aloud)
        last = what
        print(f" {m.name} {m.ratio:.2f}x at {m.tokens}", end="", flush=True, file=aloud)
    _end_line(last, aloud)
    path = speeds.tuned_path() if out is None else out
    write_table(measured, path)
    speeds.forget()
    if json:
        figures = [{**asdict(m), "dtype": str(m.dtype).removeprefix("torch.")} for m in measured]
        print_json({"written": str(path), "figures": figures})
    else:
        print(f"Written to {path}.")


def _end_line(last: str | None, aloud: TextIO) -> None:
    if last is not None:
        aloud.write("\n")
