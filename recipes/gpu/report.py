"""The results of a run of the GPU check, as JSON and as Markdown; replaced atomically after every row."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.gpu.bench import Row
from recipes.measure.measuring import write_results

HIDDEN = ("section", "job", "what")


@dataclass
class Report:
    """Rows, and which jobs need not run again.

    Attributes:
        path: without suffix.
        options: those that decide what is measured; a run is resumed with the same.
        machines: where it ran, one for each start.
    """

    path: Path
    options: dict[str, Any]
    machines: list[dict[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    done: dict[str, list[str]] = field(default_factory=dict)

    def add(self, section: str, job: str, row: Row) -> None:
        self.rows.append({"section": section, "job": job} | row)
        self.write()

    def finish(self, section: str, job: str) -> None:
        self.done.setdefault(section, []).append(job)

    def write(self) -> None:
        content = {"options": self.options, "machines": self.machines, "done": self.done, "rows": self.rows}
        write_results(self.path, content, as_markdown(self.rows, self.machines))

    def rates(self) -> dict[str, float]:
        """The rates that the section "device" measured; empty if it did not."""
        found = next((row for row in self.rows if row["what"] == "rates"), {})
        names = ("read_bytes_per_second", "bfloat16_flops_per_second")
        return {name: found[name] for name in names} if all(name in found for name in names) else {}


def resumed(file: Path, folder: Path, options: dict[str, Any]) -> Report:
    """The report in a .json file, to be continued in `folder`. Rows of jobs that were not finished are dropped.

    Raises: ValueError for a file that is none, or of a run with other options.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found, done, rows = content["options"], content["done"], content["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no result of this program: give the .json file of an earlier run.") from None
    for name, value in options.items():
        if found.get(name) != value:
            raise ValueError(f"{file} was made with {name} {found.get(name)!r}, not {value!r}: give the same options.")
    kept = [row for row in rows if row["job"] in done.get(row["section"], ())]
    return Report(folder / file.stem, options, content["machines"], kept, done)


def as_markdown(rows: list[Row], machines: list[dict[str, str]]) -> str:
    """A list of rows for each section."""
    lines = ["; ".join(f"{k}: {v}" for k, v in machine.items()) for machine in machines]
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += ["", f"## {section}", ""]
        for row in (r for r in rows if r["section"] == section):
            lines += _item(row)
    return "\n".join(lines) + "\n"


def _item(row: Row) -> list[str]:
    """A row as a line; a list of things in it as lines below."""
    said = [f"{k} {shown(v)}" for k, v in row.items() if k not in HIDDEN and not isinstance(v, list)]
    lines = [f"- {row['what']}: " + ", ".join(said)]
    for name, things in row.items():
        if isinstance(things, list):
            lines.append(f"    - {name}:")
            for thing in things:
                parts = thing.items() if isinstance(thing, dict) else [("", thing)]
                lines.append("        - " + ", ".join(f"{k} {shown(v)}".strip() for k, v in parts))
    return lines


def shown(value: Any) -> str:
    """A number with four digits or with commas; anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)
