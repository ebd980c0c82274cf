"""Compare the speed with transformers, on the same weights in the same run, and with the limits of the machine.

    python -m recipes.benchmark                 everything, fp32 and bf16; about twelve minutes on 2 cores
    python -m recipes.benchmark --quick         short lengths, under two minutes
    python -m recipes.benchmark --only decode   the rows whose name contains one of these words
    python -m recipes.benchmark --peer my.py    adds a third implementation, see docs/benchmarks.md

Repetitions are interleaved (ours, theirs, ours, ...), so that a slowdown of the machine affects both. A row gives the
median and the range of the pairwise ratios. `of the limit` is the least time for the row's work, divided by our time;
the least time follows from the rates of matrix products and of memory reads, measured in this run. The logits of both
implementations are compared before timing starts.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qwen3next as q
from qwen3next.commands.common import show
from recipes.measure import benchmark_cases as cases
from recipes.measure.benchmark_cases import Case, Models
from recipes.measure.measuring import (
    give_back,
    machine,
    matmul_rate,
    peak_memory,
    read_bandwidth,
    seconds_of,
    write_figure,
    write_results,
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        preset: model size (random weights, without MTP, which transformers does not implement).
        dtypes: dtypes of weights and arithmetic; training in bfloat16 uses autocast over fp32 weights.
        prefill: prompts, as BATCHxTOKENS.
        decode: rows of single-token steps.
        at_once: tokens of steps of one row that brings several, as in speculative decoding.
        decode_after: tokens of context before the decoding steps; `steps` of them are timed together.
        train: training steps, as SEQUENCESxTOKENS.
        question: tokens of a document that is already in the cache, and of a question about it.
        operators: tokens for the delta rule alone and the experts alone.
        repetitions: repetitions of each measurement, after one warm-up.
        only: measure only rows whose name contains one of these words; default all.
        peer: Python file with a third implementation.
        device: "cpu", "cuda" or "auto".
        seed: random seed of weights and tokens.
        out: path without suffix, for a .json, a .md and a .png file; default writes none.
        quick: use short lengths and few repetitions.
    """

    preset: str = "medium"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    prefill: tuple[str, ...] = ("1x512", "1x2048", "1x8192", "4x512")
    decode: tuple[int, ...] = (1, 2, 4, 8, 16)
    at_once: tuple[int, ...] = (2, 3, 4)
    decode_after: int = 1024
    steps: int = 16
    train: tuple[str, ...] = ("2x256", "2x512", "2x2048")
    question: tuple[int, int] = (4096, 32)
    operators: tuple[int, ...] = (2048, 8192)
    repetitions: int = 5
    only: tuple[str, ...] = ()
    peer: Path | None = None
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    quick: bool = False


QUICK = {"prefill": ("1x512",), "decode_after": 256, "train": ("2x256",), "question": (512, 32), "operators": (512,)}


@dataclass(frozen=True)
class Row:
    """One comparison with one peer. Times are median seconds; ratios are theirs / ours, median and range over pairs.

    `limit` is the least time in seconds for products and reads, 0 if neither was counted. `memory` and `peer_memory`
    are the peak bytes of a run above the level before it, −1 if unknown.
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


def compare(case: Case, repetitions: int, *, dtype: str, limit: float) -> list[Row]:
    """Time the sides of a case alternately."""
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    for n in range(repetitions + 1):
        for name, run in case.sides.items():
            took = seconds_of(run)
            if n:  # the first run is a warm-up
                times[name].append(took)
    memory = {name: _memory(run) for name, run in case.sides.items()}
    ours, *peers = times
    rows = []
    for peer in peers:
        ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
        seconds = median(times[ours]), median(times[peer])
        spread = median(ratios), min(ratios), max(ratios)
        row = Row(dtype, case.what, peer, case.tokens, *seconds, *spread, limit, memory[ours], memory[peer])
        rows.append(row)
    return rows


def _memory(run: Callable[[], object]) -> int:
    give_back()
    with peak_memory() as peak:
        run()
    return peak.nbytes


def models(options: Options, folder: Path, dtype: str) -> Models:
    """Load the same random weights into both implementations and check that their logits are equal.

    Raises: RuntimeError if the logits differ.
    """
    from transformers import Qwen3NextForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = q.load(folder, dtype=dtype, device=options.device)
        theirs = Qwen3NextForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.to(ours.embed_tokens.weight.device)
    found = Models(ours, theirs, torch.Generator().manual_seed(options.seed))
    ids = found.draw(1, 100)
    with torch.no_grad():
        a, b = ours(ids).logits.float(), theirs(ids).logits.float()
    apart = ((a - b).square().mean().sqrt() / b.std()).item()
    if apart > (1e-4 if dtype == "float32" else 0.3):  # bf16 rounding changes the experts of some tokens
        raise RuntimeError(f"The logits of the two models differ by {apart:.0%}: fix that before timing.")
    return found


def plan(options: Options, dtype: str, found: Models, exact: Models) -> Iterator[Callable[[], Case]]:
    """The cases, each created just before it runs; `exact` has fp32 weights, for training."""

    def sizes(texts: tuple[str, ...]) -> list[tuple[int, int]]:
        return [(int(b), int(t)) for b, _, t in (text.partition("x") for text in texts)]

    like = found.ours.embed_tokens.weight
    for b, t in sizes(options.prefill):
        yield partial(cases.prefill, found, b, t)
    for b in options.decode:
        yield partial(cases.decode, found, b, options.decode_after, options.steps)
    for t in options.at_once:
        yield partial(cases.decode, found, 1, options.decode_after, options.steps, at_once=t)
    yield partial(cases.question, found, *options.question)
    for b, t in sizes(options.train):
        yield partial(cases.train, exact, b, t, autocast=dtype != "float32")
    yield partial(cases.experts, found, options.operators[0])
    for t in options.operators:
        heads = (4, 8) if t > 4096 else (16, 32)  # transformers' backward pass needs too much memory with more heads
        for backward in (False, True):
            yield partial(cases.delta_rule, t, heads=heads, dim=128, backward=backward, like=like)


def measure(options: Options) -> tuple[list[Row], dict[str, float]]:
    """All rows, and the measured limits of the machine; shows progress."""
    make = q.presets.ALL.get(options.preset)
    if make is None:
        raise ValueError(f"There is no preset {options.preset!r}: choose {', '.join(q.presets.ALL)}.")
    if unknown := [x for x in options.dtypes if x not in ("float32", "bfloat16")]:
        raise ValueError(f"{unknown[0]!r} cannot be measured: choose float32 and bfloat16.")
    peer = None if options.peer is None else _load(options.peer)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary, Progress(console=Console(stderr=True)) as progress:
        folder = Path(temporary) / "model"
        q.Qwen3Next(make(mtp_num_hidden_layers=0)).save_pretrained(folder)
        exact = models(options, folder, "float32")
        machine_can = {"read_bytes_per_second": read_bandwidth(exact.device)}
        for dtype in options.dtypes:
            rate = machine_can[f"{dtype}_flops_per_second"] = matmul_rate(getattr(torch, dtype), exact.device)
            found = exact if dtype == "float32" else models(options, folder, dtype)
            third = None if peer is None else peer(folder, dtype, found.device)
            jobs = list(plan(options, dtype, found, exact))
            for job in progress.track(jobs, description=f"timing, {dtype}"):
                case = job()
                if options.only and not any(word in case.what for word in options.only):
                    continue
                if third is not None:
                    case.sides |= third(case.what)
                limit = max(case.flops / rate, case.nbytes / machine_can["read_bytes_per_second"])
                rows += compare(case, options.repetitions, dtype=dtype, limit=limit)
    return rows, machine_can


def _load(path: Path) -> Any:
    """The function `make` of a peer's file."""
    spec = importlib.util.spec_from_file_location("benchmark_peer", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: give one that defines make(folder, dtype, device).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "make", None)):
        raise ValueError(f"{path} does not define make(folder, dtype, device): see docs/benchmarks.md.")
    return module.make


def cells(row: Row) -> list[str]:
    """The cells of a table row."""
    speeds = (f"{row.tokens / seconds:,.0f}" if row.tokens / seconds >= 100 else f"{row.tokens / seconds:.1f}"
              for seconds in (row.ours, row.theirs))  # fmt: skip
    share = f"{row.limit / row.ours:.0%}" if row.limit else "-"
    memory = ("-" if n < 0 else f"{n / 2**20:,.0f}" for n in (row.memory, row.peer_memory))
    spread = f"{row.ratio:.2f}", f"{row.lowest:.2f} to {row.highest:.2f}"
    return [row.dtype, row.what, *speeds, row.peer, *spread, share, *memory]


COLUMNS = ("dtype", "what", "tok/s", "peer tok/s", "peer", "ratio", "range", "of the limit", "MiB", "peer MiB")


def as_markdown(rows: list[Row], options: Options, where: dict[str, str], can: dict[str, float]) -> str:
    """The Markdown table, below its conditions and limits."""
    lines = [f"Preset {options.preset}, without MTP. " + "; ".join(f"{k}: {v}" for k, v in where.items()), ""]
    lines += [_limits(can), "", f"| {' | '.join(COLUMNS)} |", "|---|---|--:|--:|---|--:|---|--:|--:|--:|"]
    for row in rows:
        parts = cells(row)
        lines.append(f"| {' | '.join([*parts[:5], f'**{parts[5]}**', *parts[6:]])} |")
    return "\n".join(lines) + "\n"


def _limits(can: dict[str, float]) -> str:
    rates = ", ".join(f"{can[k] / 1e9:,.0f} GFLOP/s in {k.split('_')[0]}" for k in can if "flops" in k)
    return f"Measured in this run: reading {can['read_bytes_per_second'] / 1e9:.1f} GB/s, matrix products {rates}."


def draw(rows: list[Row], path: Path) -> None:
    """Draw the ratios as bars, with their ranges."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

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


def main(options: Options) -> list[Row]:
    """Measure, print the table, write the files."""
    if options.quick:
        options = replace(options, **QUICK, repetitions=3)  # type: ignore[arg-type]
    (rows, can), where = measure(options), machine()
    table = Table(*COLUMNS, title="; ".join(where.values()), caption=_limits(can))
    for row in rows:
        table.add_row(*cells(row))
    show(table)
    if options.out is not None:
        content: dict[str, Any] = {
            "options": asdict(options) | {"out": str(options.out), "peer": str(options.peer)}
        } | where
        content |= {"machine_can": can, "rows": [asdict(row) for row in rows]}
        write_results(options.out, content, as_markdown(rows, options, where, can))
        draw(rows, options.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
