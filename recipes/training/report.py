"""Output of a training run: live progress, metrics on disk, and the loss picture."""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from recipes.training.data import Baseline
from recipes.training.tokenizer import write_atomically

Row = dict[str, Any]  # metrics of one step by name
SECONDS_BETWEEN_LINES = 10.0  # if the output is not a terminal


class Metrics:
    """Writes metrics.jsonl, one line per step, and TensorBoard event files.

    Lines after `step` are removed on opening, because a killed run repeats the steps after its last saved state, and no
    step may appear twice.

    Args:
        folder: the run's folder.
        step: the last step whose line is kept.
        tensorboard: also write TensorBoard's event files, if the package is installed.
        tracker: "wandb" or "trackio": also send each line there. Steps that were sent before a kill are sent again.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool, console: Console, tracker: str = "none") -> None:
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = self.path.open("a", encoding="utf-8")
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                console.print("TensorBoard is not installed, so no event files are written: pip install tensorboard.")
            else:
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

        self.tracker: Any = None
        if tracker != "none":
            self.tracker = importlib.import_module(tracker)
            self.tracker.init(project="qwen3next", name=folder.name, config=self._settings(folder))

    @staticmethod
    def _settings(folder: Path) -> dict[str, Any]:
        path = folder / "settings.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add(self, row: Row) -> None:
        """Append the metrics of a step."""
        if self.tracker is not None:
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            self.tracker.log(numbers, step=row["step"])
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()  # so that no line is lost if the process is killed
        for name, value in row.items():
            if self.board is not None and isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Sync the lines to disk, because a saved state must not be newer than its lines."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.finish()


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl, without an incomplete last line."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Live:
    """A line of progress with a bar on a terminal, or a plain line every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console, self.validation, self.last = console, "-", float("-inf")
        columns = BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}")
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("first step", total=None)

    def __enter__(self) -> "Live":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, row: Row, total: int | None) -> None:
        """Show the metrics of a step; `total` is the planned number of steps, or None if unknown."""
        measured = "val_bits_per_byte" in row
        if measured:
            self.validation = f"{row['val_bits_per_byte']:.3f}"
        steps = f"{row['step']}/{total or '?'}"
        left = "?" if total is None else clock((total - row["step"]) * row["seconds_per_step"])
        text = (
            f"step {steps}  loss {row['lm']:.3f}  val {self.validation} bits/byte  "
            f"{row['tokens_per_second']:,.0f} tok/s  load {row['max_load']:.1f}x  {left} left"
        )
        self.bar.update(self.task, completed=row["step"], total=total, description=text)
        due = time.monotonic() - self.last >= SECONDS_BETWEEN_LINES or measured or row["step"] == total
        if not self.console.is_terminal and due:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            self.last = time.monotonic()

    def say(self, sentence: str) -> None:
        """Print above the bar."""
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def compressed(baselines: list[Baseline]) -> tuple[float, float]:
    """Bits per byte of gzip and xz over all documents together."""
    total = sum(b.utf8_bytes for b in baselines)
    gzip = sum(b.gzip * b.utf8_bytes for b in baselines)
    xz = sum(b.xz * b.utf8_bytes for b in baselines)
    return gzip / total, xz / total


def draw_loss(rows: list[Row], path: Path, *, gzip: float, xz: float, title: str) -> None:
    """Draw the training loss, and the bits per byte of held-out text with those of the compressors.

    Args:
        rows: rows of metrics.jsonl.
        path: the .png file to write.
        gzip, xz: bits per byte on the part of the held-out text that is measured during training.
    Raises: ImportError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The loss picture needs matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")  # no pyplot: no window, no global state
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)

    taught = [r for r in rows if r.get("targets", 1)]
    steps, losses = [r["step"] for r in taught], [r["lm"] for r in taught]
    left.plot(steps, losses, color="#b9cbe4", linewidth=0.8, label="each step")
    left.plot(steps, smoothed(losses), color="#1f4e9c", linewidth=1.8, label="smoothed")
    left.set(xlabel="step", ylabel="nats per token", title="training loss (next token)")

    measured = [r for r in rows if "val_bits_per_byte" in r]
    minutes = [r["elapsed"] / 60 for r in measured]
    values = [r["val_bits_per_byte"] for r in measured]
    right.plot(minutes, values, color="#1f4e9c", marker="o", markersize=4, label="model")
    right.axhline(gzip, color="#c2410c", linestyle="--", linewidth=1.4, label=f"gzip -9: {gzip:.2f}")
    right.axhline(xz, color="#15803d", linestyle=":", linewidth=1.8, label=f"xz -9: {xz:.2f}")
    if values:
        right.annotate(
            f"{values[-1]:.2f}", (minutes[-1], values[-1]), xytext=(0, -14), textcoords="offset points", ha="center"
        )
        right.set_ylim(min(*values, xz) - 0.3, min(max(values), 5.0) + 0.2)  # the first values would hide the last ones
    right.set(xlabel="minutes of training", ylabel="bits per byte", title="part of the held-out text")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def smoothed(values: list[float]) -> list[float]:
    """Running mean with a window of a fortieth of the run, corrected at the start."""
    keep, mean, weight, out = 1 - 1 / max(len(values) / 40, 1), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
