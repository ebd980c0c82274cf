"""`qwen3next tune`: measure which implementation of each operation is faster on this CPU."""

import os
import sys
from pathlib import Path

from layers.dispatch import speeds
from qwen3next.tuning import Measured, tune, write_table


def tune_here(repetitions: int = 5, out: Path | None = None, seed: int = 0) -> None:
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
    """
    if repetitions < 1:
        raise ValueError("repetitions must be at least 1.")
    if (busy := os.getloadavg()[0]) > 0.5 * (os.cpu_count() or 1):
        print(f"{busy:.1f} other processes are busy: figures are more exact on an idle machine.", file=sys.stderr)
    measured: list[Measured] = []
    last = None
    for m in tune(repetitions, seed):
        measured.append(m)
        what = f"{m.operation}, {str(m.dtype).removeprefix('torch.')}{', with gradients' if m.gradients else ''}"
        if what != last:
            _end_line(last)
            print(f"{what + ':':44}", end="", flush=True)
        last = what
        print(f" {m.name} {m.ratio:.2f}x at {m.tokens}", end="", flush=True)
    _end_line(last)
    path = speeds.tuned_path() if out is None else out
    write_table(measured, path)
    speeds.forget()
    print(f"Written to {path}.")


def _end_line(last: str | None) -> None:
    if last is not None:
        sys.stdout.write("\n")
