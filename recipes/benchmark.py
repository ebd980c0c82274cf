"""Compare the speed with transformers, on the same weights in the same run, and with the limits of the machine.

    python -m recipes.benchmark                 everything, fp32 and bf16; about twelve minutes on 2 cores
    python -m recipes.benchmark --quick         short lengths, under two minutes
    python -m recipes.benchmark --only decode   the rows whose name contains one of these words
    python -m recipes.benchmark --out FILE      writes FILE.json and FILE.md after each row
    python -m recipes.benchmark --resume FILE.json    goes on where a run with --out was stopped
    python -m recipes.benchmark --peer my.py    adds a third implementation, see docs/benchmarks.md

Repetitions are interleaved (ours, theirs, ours, ...), so that a slowdown of the machine affects both. A row gives the
median and the range of the pairwise ratios. `of the limit` is the least time for the row's work, divided by our time;
the least time follows from the rates of matrix products and of memory reads, measured in this run. The logits of both
implementations are compared before timing starts. llama.cpp takes part where it is installed.
"""

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import qwen3next as q
from layers.cpp import cpu
from qwen3next.commands.common import show
from recipes.measure import benchmark_cases as cases
from recipes.measure import draft_cases, group_cases
from recipes.measure.benchmark_cases import Case, Job, Models
from recipes.measure.benchmark_rows import COLUMNS, Results, Row, cells, draw, limits, line, read_results
from recipes.measure.llama_cpp import NAME, LlamaCpp, found, why_not
from recipes.measure.measuring import (
    give_back,
    gpu_name,
    machine,
    matmul_rate,
    peak_memory,
    read_bandwidth,
    seconds_told,
)
from recipes.pretrain import exit_status


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        preset: model size (random weights; only rows about drafts have MTP, which transformers does not implement).
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
        llama_cpp: "auto" measures llama.cpp where it is found, "yes" also writes a row that says why if it is not.
        device: "cpu", "cuda" or "auto".
        seed: random seed of weights and tokens.
        out: path without suffix, for a .json and a .md file, written after each row, and a .png; default writes none.
        resume: the .json file of a run that was stopped: measures what is missing, with that run's options.
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
    llama_cpp: Literal["auto", "yes", "no"] = "auto"
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    resume: Path | None = None
    quick: bool = False


QUICK = {"prefill": ("1x512",), "decode_after": 256, "train": ("2x256",), "question": (512, 32), "operators": (512,)}


def compare(case: Case, repetitions: int, *, dtype: str, limit: float) -> list[Row]:
    """Time the sides of a case alternately. A side that returns a float has measured its own seconds."""
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    for n in range(repetitions + 1):
        for name, run in case.sides.items():
            took = seconds_told(run)
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
        rows.append(replace(row, machine=kind_of_machine(), runs=case.runs))
    return rows


def kind_of_machine() -> str:
    """The kind of processor that a row was measured on, and the number of threads; the GPU where there is one."""
    if torch.cuda.is_available():
        return gpu_name()
    return f"{cpu.kind()}, {torch.get_num_threads()} threads"


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
    _check_equal(a, b, dtype, "transformers")
    return found


def _check_equal(ours: Tensor, theirs: Tensor, dtype: str, peer: str) -> None:
    """Raises: RuntimeError if the logits differ by more than rounding."""
    apart = ((ours - theirs).square().mean().sqrt() / theirs.std()).item()
    if not apart < (1e-4 if dtype == "float32" else 0.3):  # bf16 rounding changes the experts of some tokens
        raise RuntimeError(f"The logits of ours and {peer} differ by {apart:.0%}: fix that before timing.")


def llama(options: Options, folder: Path, dtype: str, ours: q.Qwen3Next) -> LlamaCpp | None:
    """llama.cpp with the same weights, None where it is not measured.

    Raises: RuntimeError if its logits differ.
    """
    if options.llama_cpp == "no" or found() is None or ours.device.type != "cpu":
        return None
    peer = LlamaCpp(folder, dtype, threads=torch.get_num_threads(), steps=options.steps)
    if peer.bindings is not None:
        ids = torch.arange(100) % ours.vocab_size
        with torch.no_grad():
            logits = ours(ids[None], logits_to_keep=1).logits.float()[0, -1]
        _check_equal(logits, peer.bindings.logits(ids.tolist(), ours.vocab_size), dtype, NAME)
    return peer


def plan(options: Options, dtype: str, found: Models, exact: Models, folder: Path) -> Iterator[Job]:
    """The cases, each created just before it runs; `exact` has fp32 weights, for training."""

    def sizes(texts: tuple[str, ...]) -> list[tuple[int, int]]:
        return [(int(b), int(t)) for b, _, t in (text.partition("x") for text in texts)]

    for b, t in sizes(options.prefill):
        yield Job(f"prefill {b} x {t}", partial(cases.prefill, found, b, t))
    for b in options.decode:
        context = options.decode_after
        yield Job(f"decode {b} x 1 after {context}", partial(cases.decode, found, b, context, options.steps))
    for n in options.at_once:
        run = partial(cases.decode, found, 1, options.decode_after, options.steps, at_once=n)
        yield Job(f"decode 1 x {n} after {options.decode_after}", run)
    lengths = {"after": options.decode_after, "steps": options.steps, "length": sizes(options.prefill[:2])[-1][1]}
    yield from group_cases.jobs(found, folder, dtype, **lengths)
    document, tokens = options.question
    yield Job(f"question of {tokens} after {document}", partial(cases.question, found, document, tokens))
    for b, t in sizes(options.train):
        yield Job(f"train {b} x {t}", partial(cases.train, exact, b, t, autocast=dtype != "float32"))
    yield Job(f"experts alone, {options.operators[0]}", partial(cases.experts, found, options.operators[0]))
    for t in options.operators:
        heads = (4, 8) if t > 4096 else (16, 32)  # transformers' backward pass needs too much memory with more heads
        for backward in (False, True):
            what = f"delta rule {'and gradients ' if backward else ''}{heads[0]}:{heads[1]} x 128, {t}"
            yield Job(what, partial(cases.delta_rule, found, t, heads=heads, dim=128, backward=backward))
    yield from _speculation(options, dtype, found)


def _speculation(options: Options, dtype: str, found: Models) -> Iterator[Job]:
    """What drafts cost: with random weights they are never accepted, so that "auto" should draft little."""

    def model() -> q.Qwen3Next:
        return draft_cases.with_mtp(options.preset, dtype, options.seed).to(found.device)

    ids = found.draw(1, options.decode_after)
    for n in (1, 3):
        yield Job(f"draft of {n}", partial(lambda n: draft_cases.drafting(model(), ids, n, options.steps), n))
    yield Job("take back 2 of 4", lambda: draft_cases.taking_back(model(), ids, 4, 2, options.steps))
    way, new = draft_cases.Way("auto"), 16 * options.steps
    yield Job(str(way), lambda: draft_cases.generating(model(), ids, new, way)[0])


def measure(options: Options, results: Results) -> None:
    """Add the rows that the results lack, and the measured limits of the machine; shows progress."""
    make = q.presets.ALL.get(options.preset)
    if make is None:
        raise ValueError(f"There is no preset {options.preset!r}: choose {', '.join(q.presets.ALL)}.")
    if unknown := [x for x in options.dtypes if x not in ("float32", "bfloat16")]:
        raise ValueError(f"{unknown[0]!r} cannot be measured: choose float32 and bfloat16.")
    peer = None if options.peer is None else _load(options.peer)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary, Progress(console=Console(stderr=True)) as progress:
        folder = Path(temporary) / "model"
        q.Qwen3Next(make(mtp_num_hidden_layers=0)).save_pretrained(folder)
        exact = models(options, folder, "float32")
        results.can["read_bytes_per_second"] = read_bandwidth(exact.device)
        if options.llama_cpp == "yes" and (found() is None or exact.device.type != "cpu"):
            reason = why_not() if found() is None else "llama.cpp is measured on the CPU alone: add --device cpu"
            _add(results, [_note(reason)], progress)
        for dtype in options.dtypes:
            results.can[f"{dtype}_flops_per_second"] = matmul_rate(getattr(torch, dtype), exact.device)
            pair = exact if dtype == "float32" else models(options, folder, dtype)
            peers = [] if peer is None else [peer(folder, dtype, pair.device)]
            other = llama(options, folder, dtype, pair.ours)
            peers += [] if other is None else [other.sides]
            jobs = [job for job in plan(options, dtype, pair, exact, folder) if _wanted(job, options, results, dtype)]
            for job in progress.track(jobs, description=f"timing, {dtype}"):
                rows = _rows(job.make(), options, results.can, dtype, peers)
                _add(results, rows if other is None else [_told(row, other) for row in rows], progress)


def _wanted(job: Job, options: Options, results: Results, dtype: str) -> bool:
    asked = not options.only or any(word in job.what for word in options.only)
    return asked and not results.done(dtype, job.what)


def _rows(case: Case, options: Options, can: dict[str, float], dtype: str, peers: list[Any]) -> list[Row]:
    for sides in peers:
        case.sides |= sides(case.what)
    limit = max(case.flops / can[f"{dtype}_flops_per_second"], case.nbytes / can["read_bytes_per_second"])
    return compare(case, options.repetitions, dtype=dtype, limit=limit)


def _told(row: Row, other: LlamaCpp) -> Row:
    return replace(row, runs=f"{row.runs}; peer: {other.runs}") if row.peer == NAME else row


def _note(reason: str) -> Row:
    return Row("-", NAME, NAME, 0, 0, 0, 0, 0, 0, 0, machine=kind_of_machine(), note=f"not measured: {reason}")


def _add(results: Results, rows: list[Row], progress: Progress) -> None:
    """Keep the rows and print them now; where both outputs are a terminal, above the progress."""
    new = [row for row in rows if not results.done(row.dtype, row.what)]
    results.add(new)
    for row in new:
        if sys.stdout.isatty():
            progress.console.print(line(row), highlight=False, soft_wrap=True)
        else:
            print(line(row), flush=True)


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


def _resumed(options: Options, where: dict[str, str]) -> tuple[Options, Results]:
    """The options and the results of the file to go on with.

    Raises: ValueError as `read_results`, and for options beside --resume.
    """
    assert options.resume is not None
    if replace(options, resume=None) != Options():
        raise ValueError("--resume goes on with the options of its file: give no others.")
    results = read_results(options.resume, where)
    kinds = {f.name for f in fields(Options)}
    if results.options.keys() - kinds:
        raise ValueError(f"{options.resume} is not a result of this recipes.benchmark: start a new one with --out.")
    values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in results.options.items()}
    values |= {key: Path(values[key]) for key in ("peer", "out") if values.get(key) is not None}
    return Options(**values), results


def main(options: Options) -> list[Row]:
    """Measure, print and write each row as it comes; at the end a table and a picture."""
    where = machine()
    if options.resume is not None:
        options, results = _resumed(options, where)
    else:
        if options.quick:
            options = replace(options, **QUICK, repetitions=3)  # type: ignore[arg-type]
        told = {key: str(x) if isinstance(x, Path) else x for key, x in asdict(options).items()}
        results = Results(told, where, options.out)
    measure(options, results)
    if sys.stdout.isatty():
        table = Table(*COLUMNS, title="; ".join(where.values()), caption=limits(results.can))
        for row in results.rows:
            table.add_row(*cells(row))
        show(table)
    else:
        print("; ".join(where.values()), limits(results.can), sep="\n", flush=True)
    if results.out is not None:
        draw(results.rows, results.out.with_suffix(".png"))
    return results.rows


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, description=__doc__))))
