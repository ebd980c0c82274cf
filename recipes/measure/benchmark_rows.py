"""The rows of `recipes.benchmark`, and the files that hold them: written after each row, and read again to go on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3next.files.json_files import read_object
from recipes.measure.measuring import write_figure, write_results


@dataclass(frozen=True)
class Row:
    """One comparison with one peer. Times are median seconds; ratios are theirs / ours, median and range over pairs.

    `limit` is the least time in seconds for products and reads, 0 if neither was counted. `memory` and `peer_memory`
    are the peak bytes of a run above the level before it, −1 if unknown. `machine` is the kind of processor, `runs` the
    implementations of ours. A row that could not be measured has a `note` that says why, and zeros.
    """

    dtype: str
    what: str
    peer: str
    tokens: int
    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float
    limit: float
    memory: int = -1
    peer_memory: int = -1
    machine: str = ""
    runs: str = ""
    note: str = ""


COLUMNS = ("dtype", "what", "tok/s", "peer tok/s", "peer", "ratio", "range", "of the limit", "MiB", "peer MiB")
MORE = ("machine", "runs")


def _speed(tokens: int, seconds: float) -> str:
    if not seconds:
        return "-"
    return f"{tokens / seconds:,.0f}" if tokens / seconds >= 100 else f"{tokens / seconds:.1f}"


def cells(row: Row) -> list[str]:
    """The cells of a table row, for COLUMNS."""
    speeds = (_speed(row.tokens, seconds) for seconds in (row.ours, row.theirs))
    share = f"{row.limit / row.ours:.0%}" if row.limit else "-"
    memory = ("-" if n < 0 else f"{n / 2**20:,.0f}" for n in (row.memory, row.peer_memory))
    spread = ("-", "-") if row.note else (f"{row.ratio:.2f}", f"{row.lowest:.2f} to {row.highest:.2f}")
    return [row.dtype, row.what, *speeds, row.peer, *spread, share, *memory]


def line(row: Row) -> str:
    """A row as a line of text."""
    if row.note:
        return f"{row.dtype:9} {row.what:44} {row.note}"
    dtype, what, ours, theirs, peer, ratio, spread, share, *_ = cells(row)
    compared = f"{ratio:>6} x {peer} ({theirs}; {spread})  {share:>4} of the limit"
    return f"{dtype:9} {what:44} {ours:>9} tok/s {compared}  {row.machine}; {row.runs}"


def limits(can: Mapping[str, float]) -> str:
    """The limits of the machine, in a sentence."""
    rates = ", ".join(f"{can[k] / 1e9:,.0f} GFLOP/s in {k.split('_')[0]}" for k in can if "flops" in k)
    return f"Measured in this run: reading {can['read_bytes_per_second'] / 1e9:.1f} GB/s, matrix products {rates}."


@dataclass
class Results:
    """The rows so far, and the files that they are written to after each case.

    Attributes:
        options: of the run, as JSON values.
        where: machine, versions, commit and date.
        out: path of the files without suffix, None for no files.
        can: the limits of the machine. After a resumption, those of the latest run; each row's `limit` is of its own.
    """

    options: dict[str, Any]
    where: dict[str, str]
    out: Path | None
    can: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def done(self, dtype: str, what: str) -> bool:
        """Whether the rows of a case are there."""
        return any((row.dtype, row.what) == (dtype, what) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Append the rows of a case and write the files anew, each atomically."""
        self.rows += rows
        if self.out is not None:
            content = {"options": self.options, **self.where, "machine_can": self.can}
            write_results(self.out, content | {"rows": [asdict(row) for row in self.rows]}, self.markdown())

    def markdown(self) -> str:
        """The table, below its conditions and limits."""
        told = f"Preset {self.options['preset']}; only the rows about drafts have its MTP layer. "
        told += "; ".join(f"{k}: {v}" for k, v in self.where.items())
        lines = [told, "", limits(self.can), "", f"| {' | '.join((*COLUMNS, *MORE))} |"]
        lines.append("|---|---|--:|--:|---|--:|---|--:|--:|--:|---|---|")
        for row in self.rows:
            parts = cells(row)
            more = (row.machine, row.note or row.runs)
            lines.append(f"| {' | '.join([*parts[:5], f'**{parts[5]}**', *parts[6:], *more])} |")
        return "\n".join(lines) + "\n"


def read_results(path: Path, where: dict[str, str]) -> Results:
    """The results in a JSON file, to go on with on this machine.

    Raises: ValueError for another file, or one from another machine, commit or release.
    """
    content = read_object(path, "a result of recipes.benchmark")
    try:
        rows = [Row(**values) for values in content["rows"]]
        found = Results(content["options"], {key: content[key] for key in where}, path.with_suffix(""), {}, rows)
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a result of this recipes.benchmark: start a new one with --out.") from None
    for key in ("machine", "commit", "versions"):
        if found.where[key] != where[key]:
            raise ValueError(
                f"{path} has {key} {found.where[key]!r} and this is {where[key]!r}: start a new file with --out."
            )
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Draw the ratios as bars, with their ranges."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row.note]
    names = [f"{row.what}, {row.dtype}" + (f" ({row.peer})" if row.peer != "transformers" else "") for row in rows]
    figure, axis = plt.subplots(figsize=(8, 0.28 * len(rows) + 1), layout="constrained")
    for i, row in enumerate(rows):
        axis.barh(i, row.ratio, color="C0" if row.dtype == "float32" else "C1", height=0.7)
        axis.plot([row.lowest, row.highest], [i, i], "k-", lw=1)
    axis.axvline(1, color="k", lw=0.8, ls=":")
    axis.set(yticks=range(len(rows)), yticklabels=names, xscale="log", xlabel="times as fast as the peer")
    axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.invert_yaxis()
    write_figure(figure, path)
    plt.close(figure)
