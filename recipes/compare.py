"""Draw runs beside each other, from their metrics.jsonl, and print a table.

    python -m recipes.compare runs/a runs/b --out comparison.png

Runs may still be going. Each curve is a run; losses are smoothed.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from recipes.pretrain import exit_status
from recipes.training.report import Row, read_metrics, smoothed

COLOURS = ("#1f4e9c", "#c2410c", "#15803d", "#7e22ce", "#0f766e", "#a16207", "#be185d", "#4b5563")
# Title, unit, and the keys of metrics that are tried in turn; of tokens seen.
PANELS = (
    ("training loss (next token)", "nats per token", ("lm",)),
    ("held-out text", "bits per byte", ("val_bits_per_byte",)),
    ("gradient norm before clipping", "", ("gradient_norm",)),
    ("load of the busiest expert", "multiple of an even share", ("max_load",)),
    ("most likely token of the MTP layer is right", "share", ("mtp_accuracy/1",)),
    ("speed", "tokens per second", ("tokens_per_second",)),
)
SMOOTHED = {"lm", "gradient_norm", "max_load"}


@dataclass(frozen=True)
class Options:
    """Draw runs beside each other.

    Attributes:
        runs: folders of runs.
        out: the picture.
        metrics: keys of metrics.jsonl to draw instead of the usual ones, such as needle/256 gradient_norm/experts.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = Path("comparison.png")
    metrics: tuple[str, ...] = ()


def compare(options: Options, *, console: Console | None = None) -> None:
    """Write the picture and print the table.

    Raises: ValueError for a folder without metrics, or a metric that no run has; ImportError without matplotlib.
    """
    if not options.runs:
        raise ValueError("No runs are given: name their folders, such as runs/a runs/b.")
    rows = {run: read_metrics(run) for run in options.runs}
    for run, found in rows.items():
        if not found:
            raise ValueError(f"{run} holds no metrics.jsonl with a step: name the folder of a run.")
    names = _names(options.runs)
    panels = tuple((key, "", (key,)) for key in options.metrics) or PANELS
    for key in options.metrics:
        if not any(key in row for found in rows.values() for row in found):
            known = sorted({name for found in rows.values() for row in found for name in row})
            raise ValueError(f"No run has the metric {key!r}: choose of {', '.join(known)}.")
    draw({names[run]: found for run, found in rows.items()}, panels, options.out)
    console = Console() if console is None else console
    console.print(table({names[run]: (run, found) for run, found in rows.items()}))
    console.print(f"The picture is {options.out}.", highlight=False, soft_wrap=True)


def _names(runs: tuple[Path, ...]) -> dict[Path, str]:
    """The last parts of the paths that tell the runs apart."""
    parts = {run: run.resolve().parts for run in runs}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {run: "/".join(p[-count:]) for run, p in parts.items()}
        if len(set(names.values())) == len(set(runs)):
            return names
    return names


def table(runs: dict[str, tuple[Path, list[Row]]]) -> Table:
    """One line a run: settings that differ, and the last measures."""
    settings: dict[str, dict[str, Any]] = {}
    for name, (run, _) in runs.items():
        path = run / "settings.json"
        settings[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    keys = sorted({key for values in settings.values() for key in values} - {"out", "resume"})
    differing = [k for k in keys if len({json.dumps(s.get(k)) for s in settings.values()}) > 1]
    made = Table("run", *differing, "steps", "tokens", "loss", "bits/byte", "tok/s", "skipped")
    for name, (_, rows) in runs.items():
        measured = [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row]
        made.add_row(
            name,
            *(str(settings[name].get(key, "")) for key in differing),
            str(rows[-1]["step"]),
            f"{rows[-1]['tokens']:,}",
            f"{smoothed([row['lm'] for row in rows if row.get('targets', 1)])[-1]:.3f}",
            f"{measured[-1]:.3f}" if measured else "-",
            f"{rows[-1]['tokens_per_second']:,.0f}",
            str(sum(bool(row.get("skipped")) for row in rows)),
        )
    return made


def draw(runs: dict[str, list[Row]], panels: tuple[tuple[str, str, tuple[str, ...]], ...], path: Path) -> None:
    """Draw the panels that some run has metrics for. Raises: ImportError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install matplotlib.") from error
    every = [row for rows in runs.values() for row in rows]
    shown = [panel for panel in panels if any(row.get(key) for row in every for key in panel[2])]  # not zero alone
    if not shown:
        raise ValueError("All metrics to draw are zero: choose others with --metrics.")
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (title, unit, keys) in zip(axes, shown, strict=False):
        values: list[float] = []
        for number, (name, rows) in enumerate(runs.items()):
            for key in keys:
                points = [
                    (row["tokens"], row[key]) for row in rows if row.get(key) is not None and row.get("targets", 1)
                ]
                if not points:
                    continue
                x, y = [p[0] / 1e6 for p in points], [float(p[1]) for p in points]
                y = smoothed(y) if key in SMOOTHED else y
                marker = "o" if len(x) < 30 else None
                axis.plot(
                    x, y, color=COLOURS[number % len(COLOURS)], marker=marker, markersize=3, linewidth=1.5, label=name
                )
                values += y[len(y) // 10 :]  # the first values would hide the last ones
        if values:
            room = 0.05 * (max(values) - min(values) or 1)
            axis.set_ylim(min(values) - room, max(values) + room)
        axis.set(title=title, xlabel="million tokens", ylabel=unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        try:
            compare(tyro.cli(Options, args=args, prog="python -m recipes.compare"))
        except ImportError as error:
            raise ValueError(str(error)) from error

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
