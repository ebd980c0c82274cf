"""Live progress of the study: one run step by step, or all runs, read from their folders."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from recipes.study.run import Task
from recipes.training.report import Live, Row, clock

SECONDS_BETWEEN_LINES = 30.0


def say(console: Console, sentence: str) -> None:
    """Print without markup."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


class StudyLive(Live):
    """`Live` with the attention to the first token."""

    def show(self, row: Row, total: int | None) -> None:
        if "first_token_attention" in row:
            self.validation = f"{row['first_token_attention']:.3f}"
        left = clock(((total or 0) - row["step"]) * row["seconds_per_step"])
        text = f"step {row['step']}/{total}  loss {row['lm']:.3f}  first token {self.validation}  {left} left"
        self.bar.update(self.task, completed=row["step"], total=total, description=text)
        if not self.console.is_terminal and (
            row["step"] == total or time.monotonic() - self.last > SECONDS_BETWEEN_LINES
        ):
            say(self.console, text)
            self.last = time.monotonic()


class Watched(StudyLive):
    """`StudyLive` for a worker process; stops the run, as a signal would, if the parent process is gone."""

    def show(self, row: Row, total: int | None) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os.kill(os.getpid(), signal.SIGTERM)
        super().show(row, total)


class Board:
    """Progress of all runs, read from their folders."""

    def __init__(self, console: Console, tasks: Sequence[Task]) -> None:
        self.console, self.tasks, self.last = console, tasks, float("-inf")
        columns = BarColumn(bar_width=20), TextColumn("{task.description}")
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting", total=None)

    def __enter__(self) -> "Board":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, active: set[int], finished: int, seconds: float) -> None:
        due = time.monotonic() - self.last
        if due < (1.0 if self.console.is_terminal else SECONDS_BETWEEN_LINES):
            return
        self.last = time.monotonic()
        under_way, parts = 0.0, []
        for number in sorted(active):
            task = self.tasks[number]
            step = last_step(task.settings.out)
            under_way += step / (task.settings.steps or 1)
            parts.append(f"{task.name} {step}/{task.settings.steps}")
        share = (finished + under_way) / len(self.tasks)
        left = clock(seconds / share * (1 - share)) if share > 0.002 else "?"
        text = f"{finished} of {len(self.tasks)} runs done; {'; '.join(parts) or 'starting'}; {left} left"
        self.bar.update(self.task, completed=share, total=1.0, description=text)
        if not self.console.is_terminal:
            say(self.console, text)


def last_step(folder: Path) -> int:
    """The last step that a run has written, read from the end of its metrics file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 8192, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            continue
    return 0
