"""Measure what drafts cost, how many are accepted, and what that makes of generation's speed, for a model of yours.

    python -m recipes.speculation runs/mine                    a run of recipes.pretrain: its held-out text
    python -m recipes.speculation CHECKPOINT --text notes.txt  a checkpoint, and a text to begin from
    python -m recipes.speculation runs/mine --out FILE         writes FILE.json, FILE.md and FILE.png, row by row

Each way of drafting is timed in turn with generation without drafts, from the same prompts; the tokens are compared
and must be equal. With --out a run that was stopped goes on where it was.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import qwen3next as q
from qwen3next.files.json_files import read_object
from recipes.measure.benchmark_cases import Case
from recipes.measure.draft_cases import Generating, Way, checking, drafting, generating, taking_back
from recipes.measure.measuring import machine, seconds_told, write_figure, write_results
from recipes.pretrain import exit_status
from recipes.training.data import ValidationBatches
from recipes.training.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Options:
    """Measure what drafts cost, how many are accepted, and what that makes of generation's speed.

    Attributes:
        model: folder of a run, or of a checkpoint.
        text: file to take prompts from; None means the held-out documents of the run.
        dtype: of weights and arithmetic; "auto" means as stored.
        prompts: number of prompts, from even distances of the text.
        context: tokens of a prompt.
        new: tokens to generate after each.
        most: largest number of drafts.
        temperatures: 0 is greedy.
        drafts: who drafts, of "mtp", "lookup" and "both".
        repetitions: pairs of runs with and without drafts, prompt by prompt.
        out: path without suffix of the files to write; None writes none.
    """

    model: tyro.conf.Positional[Path]
    text: Path | None = None
    dtype: str = "auto"
    prompts: int = 4
    context: int = 128
    new: int = 128
    most: int = 4
    temperatures: tuple[float, ...] = (0.0, 0.8)
    drafts: tuple[str, ...] = ("mtp", "lookup", "both")
    repetitions: int = 3
    out: Path | None = None


@dataclass(frozen=True)
class Row:
    """A measurement. Times of costs are in steps of one token; those of generation in plain generation's.

    Attributes:
        time, lowest, highest: median and range over pairs, ours / plain.
        drafted, accepted: by place in the draft, over all prompts; empty for costs.
        mean_length: tokens of a round.
    """

    what: str
    time: float
    lowest: float
    highest: float
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    mean_length: float = 0.0

    def __str__(self) -> str:
        if not self.drafted:
            return f"{self.what:52} {self.time:5.2f} steps ({self.lowest:.2f} to {self.highest:.2f})"
        shares = " ".join(f"{a / n:.0%}" for a, n in zip(self.accepted, self.drafted, strict=True) if n)
        speed = f"{1 / self.time:5.2f} x plain ({1 / self.highest:.2f} to {1 / self.lowest:.2f})"
        return f"{self.what:52} {speed}, {self.mean_length:.2f} tokens a round, accepted by place {shares or '-'}"


def prompts(options: Options) -> tuple[Path, list[Tensor]]:
    """The checkpoint's folder, and the prompts (1, context).

    Raises: ValueError where there is no text, or less than one prompt of it.
    """
    folder = options.model / "model" if (options.model / "model").is_dir() else options.model
    if options.text is not None:
        ids = load_tokenizer(folder).encode(options.text.read_text(encoding="utf-8")).ids
        if len(ids) < options.context:
            raise ValueError(f"{options.text} has {len(ids)} tokens, fewer than --context {options.context}.")
        last = len(ids) - options.context
        starts = [last * n // max(1, options.prompts - 1) for n in range(options.prompts)]
        texts = [ids[start : start + options.context] for start in starts]
    elif (options.model / "data").is_dir():
        held_out = ValidationBatches(options.model / "data", window=options.context, batch_size=1)
        begins = [int(held_out.starts[d]) for d in held_out.documents]
        ends = [int(held_out.starts[d + 1]) for d in held_out.documents]
        long = [a for a, b in zip(begins, ends, strict=True) if b - a > options.context]
        if not long:
            raise ValueError(f"No held-out document has more than --context {options.context} tokens.")
        chosen = [long[n * len(long) // options.prompts] for n in range(min(options.prompts, len(long)))]
        texts = [held_out.tokens[a : a + options.context].astype("int64").tolist() for a in chosen]
    else:
        raise ValueError(f"{options.model} is no run with held-out text: name a file with --text.")
    return folder, [torch.tensor([text]) for text in texts]


def measure(options: Options, model: q.Qwen3Next, ids: list[Tensor], done: set[str]) -> Iterator[Row]:
    """The rows that are not done yet: first what drafts cost, then what generation gains."""
    calls = 8
    costs = [checking(model, ids[0], n + 1, calls) for n in range(1, options.most + 1)]
    costs += [drafting(model, ids[0], n, calls) for n in range(1, options.most + 1) if model.mtp is not None]
    costs += [taking_back(model, ids[0], options.most, options.most // 2, calls)]
    for case in costs:
        if case.what not in done:
            yield _paired(case, 3 * options.repetitions)
    for temperature in options.temperatures:
        for drafts in options.drafts:
            if drafts != "lookup" and model.mtp is None:
                continue
            for count in (*range(1, options.most + 1), "auto"):
                way = Way(count, drafts, temperature)
                if str(way) not in done:
                    yield _gained(options, model, ids, way)


def _paired(case: Case, repetitions: int) -> Row:
    ratios = []
    for n in range(repetitions + 1):
        ours, step = map(seconds_told, case.sides.values())
        if n:  # the first is a warm-up
            ratios.append(ours / step)
    return Row(case.what, median(ratios), min(ratios), max(ratios))


def _gained(options: Options, model: q.Qwen3Next, ids: list[Tensor], way: Way) -> Row:
    """Raises: RuntimeError if drafts changed the text."""
    ratios: list[float] = []
    drafted, accepted, tokens, rounds = [0] * options.most, [0] * options.most, 0, 0
    for prompt in ids:
        case, ours = generating(model, prompt, options.new, way)
        plain = next(side for side in case.sides.values() if side is not ours)
        assert isinstance(plain, Generating)
        for n in range(options.repetitions):
            order = (ours, plain) if n % 2 else (plain, ours)
            took = {id(side): side() for side in order}
            ratios.append(took[id(ours)] / took[id(plain)])
        if ours.tokens != plain.tokens:
            raise RuntimeError(f"{way}: the text differs from that without drafts.")
        report = ours.report
        tokens, rounds = tokens + report.tokens, rounds + report.row_rounds
        for totals, counts in ((drafted, report.drafted), (accepted, report.accepted)):
            totals[: len(counts)] = [a + b for a, b in zip(totals, counts, strict=False)]
    length = tokens / max(1, rounds)
    return Row(str(way), median(ratios), min(ratios), max(ratios), drafted, accepted, length)


def markdown(where: dict[str, str], rows: list[Row]) -> str:
    """The rows as two tables."""
    lines = [
        "; ".join(f"{key}: {value}" for key, value in where.items()),
        "",
        "| cost | steps | range |",
        "|---|--:|---|",
    ]
    costs, gains = [r for r in rows if not r.drafted], [r for r in rows if r.drafted]
    lines += [f"| {r.what} | {r.time:.2f} | {r.lowest:.2f} to {r.highest:.2f} |" for r in costs]
    lines += ["", "| generation | × plain | range | tokens a round | accepted by place |", "|---|--:|---|--:|---|"]
    for r in gains:
        shares = ", ".join(f"{a / n:.0%}" for a, n in zip(r.accepted, r.drafted, strict=True) if n)
        spread = f"{1 / r.highest:.2f} to {1 / r.lowest:.2f}"
        lines.append(f"| {r.what} | **{1 / r.time:.2f}** | {spread} | {r.mean_length:.2f} | {shares or '-'} |")
    return "\n".join(lines) + "\n"


def draw(options: Options, rows: list[Row], path: Path) -> None:
    """Three panels: what drafts cost, which are accepted, and the speed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    by_name, counts = {row.what: row for row in rows}, list(range(1, options.most + 1))
    figure, (cost, share, speed) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, label in (("{} tokens in a step", "checking: a step of k + 1 tokens"), ("draft of {}", "k drafts")):
        names = [name.format(k + 1 if "tokens" in name else k) for k in counts]
        known = [(k, by_name[name].time) for k, name in zip(counts, names, strict=True) if name in by_name]
        if known:
            cost.plot(*zip(*known, strict=True), "o-", label=label)
    cost.axhline(1, color="k", lw=0.8, ls=":")
    cost.set(xlabel="drafts k", ylabel="time, in steps of one token", ylim=(0, None), xticks=counts, title="cost")
    cost.legend()
    for color, drafts in enumerate(options.drafts):
        for temperature in options.temperatures:
            style = {"color": f"C{color}", "ls": "--" if temperature else "-", "marker": "o"}
            label = f"{drafts}, " + (f"temperature {temperature:g}" if temperature else "greedy")
            longest = by_name.get(str(Way(options.most, drafts, temperature)))
            if longest is not None:
                shares = [a / n if n else float("nan") for a, n in zip(longest.accepted, longest.drafted, strict=True)]
                share.plot(counts, shares, label=label, **style)
            known = [(k, 1 / row.time) for k in counts if (row := by_name.get(str(Way(k, drafts, temperature))))]
            if known:
                speed.plot(*zip(*known, strict=True), label=label, **style)
            if auto := by_name.get(str(Way("auto", drafts, temperature))):
                speed.plot(
                    [options.most + 1], [1 / auto.time], color=f"C{color}", marker="o" if not temperature else "x"
                )
    share.set(xlabel="place in the draft", ylabel="share, if those before were accepted", ylim=(0, 1), xticks=counts)
    share.set_title("accepted")
    speed.axhline(1, color="k", lw=0.8, ls=":")
    speed.set(xlabel="drafts k", ylabel="times as fast as without drafts", title="speed", ylim=(0, None))
    speed.set_xticks([*counts, options.most + 1], [*map(str, counts), "auto"])
    share.legend(fontsize=8)
    write_figure(figure, path)
    plt.close(figure)


def _rows_before(options: Options, where: dict[str, str], told: dict[str, Any]) -> list[Row]:
    """Rows of a stopped run with the same options. Raises: ValueError for a file of other options or machines."""
    path = None if options.out is None else options.out.with_suffix(".json")
    if path is None or not path.exists():
        return []
    content = read_object(path, "a result of recipes.speculation")
    now = {"options": told, **{key: where[key] for key in ("machine", "commit", "versions")}}
    for key, value in now.items():
        if content.get(key) != value:
            raise ValueError(f"{path} was measured with other {key}: name another file with --out, or delete it.")
    return [Row(**row) for row in content["rows"]]


def main(options: Options) -> list[Row]:
    """Measure, print and write each row as it comes."""
    if options.most < 1 or options.prompts < 1 or options.new < 2:
        raise ValueError("--most and --prompts must be at least 1, and --new at least 2.")
    where, told = machine(), {key: str(value) for key, value in asdict(options).items() if key != "out"}
    rows = _rows_before(options, where, told)
    folder, ids = prompts(options)
    model = q.load(folder, dtype=options.dtype)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=None)
        for row in measure(options, model, ids, {row.what for row in rows}):
            rows.append(row)
            print(row, flush=True)
            progress.update(task, description=row.what)
            if options.out is not None:
                content = {"options": told, **where, "rows": [asdict(row) for row in rows]}
                write_results(options.out, content, markdown(where, rows))
    if options.out is not None:
        draw(options, rows, options.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, description=__doc__))))
