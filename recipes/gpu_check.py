"""Check what needs a GPU, in ten minutes: whether the kernels are correct, and how fast they are.

    make gpu-check                                         on a machine with an NVIDIA GPU
    python -m recipes.gpu_check --out results              writes into that folder; default $OUT, else docs/benchmarks
    python -m recipes.gpu_check --quick --device cpu       runs the program at tiny sizes, without a GPU

DATE-GPU.json and DATE-GPU.md are replaced atomically after every row. Each section has a time limit, after which the
next one starts. A failure is reported as a row.
"""

import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.console import Console

import qwen3next as q
from layers.dispatch.self_check import PACKAGES
from recipes import benchmark
from recipes.measure.gpu_parity import LENGTHS, parity
from recipes.measure.measuring import machine, matmul_rate, peak_memory, read_bandwidth, synchronize, write_results
from recipes.measure.work import active_weight_bytes, forward_flops, train_flops

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        out: folder for the results; default $OUT, else docs/benchmarks.
        device: "cuda", or "cpu" to try the program.
        preset: model size (random weights, bf16).
        seconds: time for all sections together.
        only: run only sections whose name contains one of these words; default all.
        quick: use tiny sizes.
        seed: random seed of weights and tokens.
    """

    out: Path | None = None
    device: str = "cuda"
    preset: str = "medium"
    seconds: float = 570.0
    only: tuple[str, ...] = ()
    quick: bool = False
    seed: int = 0


class OutOfTime(Exception):
    """The time limit of a section has passed."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`, at the next Python instruction (Unix, main thread)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_signal: int, _frame: object) -> None:
        raise OutOfTime(f"the section's {seconds:.0f} s were over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """A model of the preset, created once, and the measured limits of the device."""

    def __init__(self, options: Options):
        self.options, self.device = options, torch.device(options.device)
        self.config = q.presets.ALL[options.preset](mtp_num_hidden_layers=0, max_position_embeddings=2**18)
        self._model: q.Qwen3Next | None = None
        self._can: dict[str, float] = {}

    @property
    def model(self) -> q.Qwen3Next:
        if self._model is None:
            torch.manual_seed(self.options.seed)
            self._model = q.Qwen3Next(self.config).to(self.device, torch.bfloat16).eval()
        return self._model

    @property
    def can(self) -> dict[str, float]:
        """Bytes read per second and bf16 floating-point operations per second."""
        if not self._can:
            rate = matmul_rate(torch.bfloat16, self.device)
            self._can = {"read_bytes_per_second": read_bandwidth(self.device), "bfloat16_flops_per_second": rate}
        return self._can

    def ids(self, b: int, t: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(self.options.seed)
        return torch.randint(self.config.vocab_size, (b, t), generator=drawn).to(self.device)


def check_device(bench: Bench) -> Rows:
    """The device, the installed packages, its measured limits, and the implementation of each operation."""
    versions = {}
    for package in (*PACKAGES, "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    yield {"what": "releases", **versions}
    if bench.device.type == "cuda":
        p = torch.cuda.get_device_properties(bench.device)
        yield {"what": "device", "name": p.name, "capability": f"{p.major}.{p.minor}", "bytes": p.total_memory}
    yield {"what": "rates", **bench.can}
    for row in q.explain(bench.model):
        yield {"what": f"runs: {row.operation}", "backend": row.runs, "why": row.why, "faster": row.faster}


def check_parity(bench: Bench) -> Rows:
    yield from parity(bench.device, (1, 65) if bench.options.quick else LENGTHS)


def check_prefill(bench: Bench) -> Rows:
    """Long prompts in chunks, with their peak memory."""
    lengths = (256, 2048) if bench.options.quick else (8192, 131072)
    for t in lengths:
        ids, cache = bench.ids(1, t), bench.model.new_cache(max_len=t)
        list(bench.model.prefill(ids[:, :128], bench.model.new_cache(max_len=128)))
        synchronize()
        with peak_memory() as peak:
            began = time.perf_counter()
            list(bench.model.prefill(ids, cache))
            synchronize()
            seconds = time.perf_counter() - began
        limit = forward_flops(bench.config, t) / bench.can["bfloat16_flops_per_second"]
        row = {
            "what": f"prefill {t}",
            "tokens/s": t / seconds,
            "peak bytes": peak.nbytes,
            "cache bytes": cache.nbytes(),
        }
        yield row | {"of the limit": limit / seconds}


def check_decode(bench: Bench) -> Rows:
    """Single-token steps with each decode backend: read rate of weights and cache as a share of the bandwidth."""
    steps, before = (4, 64) if bench.options.quick else (64, 4096)
    names = ("graph", "torch") if bench.device.type == "cuda" else ("cpp", "torch")
    for backend in names:
        row: dict[str, Any] = {"what": f"decode 1 x 1 after {before}, {backend}"}
        try:
            bench.model.set_backend("decode", backend)
            cache, ids = bench.model.new_cache(max_len=before + steps + 16), bench.ids(1, before + steps + 8)
            list(bench.model.prefill(ids[:, :before], cache))
            times = []
            for token in ids[:, before:].split(1, dim=1):
                synchronize()
                began = time.perf_counter()
                bench.model.step(token, cache)
                synchronize()
                times.append(time.perf_counter() - began)
            seconds = median(times[8:])  # the first steps compile, tune and capture
            nbytes = active_weight_bytes(bench.config, 2) + cache.nbytes()
            yield row | {
                "ms": 1e3 * seconds,
                "tokens/s": 1 / seconds,
                "of the limit": nbytes / bench.can["read_bytes_per_second"] / seconds,
            }
        except RuntimeError as error:
            yield row | {"failed": str(error).splitlines()[0]}
        finally:
            bench.model.set_backend("decode", "auto")


def check_train(bench: Bench) -> Rows:
    """Loss and gradients in bf16; MFU: operations per second as a share of those of a large matrix product."""
    sizes, repetitions = (((1, 64),), 2) if bench.options.quick else (((4, 2048), (16, 2048)), 5)
    for b, t in sizes:
        ids, times = bench.ids(b, t), []
        with peak_memory() as peak:
            for _ in range(repetitions + 1):
                bench.model.zero_grad()
                synchronize()
                began = time.perf_counter()
                bench.model.loss(ids).total.backward()
                synchronize()
                times.append(time.perf_counter() - began)
        bench.model.zero_grad()
        seconds = median(times[1:])
        rate = b * train_flops(bench.config, t) / seconds
        mfu = rate / bench.can["bfloat16_flops_per_second"]
        yield {"what": f"train {b} x {t}", "tokens/s": b * t / seconds, "MFU": mfu, "peak bytes": peak.nbytes}


def check_benchmark(bench: Bench) -> Rows:
    """The rows of recipes.benchmark: comparison with transformers on the same weights."""
    o = bench.options
    options = benchmark.Options(
        preset=o.preset,
        prefill=("1x64",) if o.quick else ("1x2048", "1x8192"),
        decode=(1,) if o.quick else (1, 16),
        decode_after=16 if o.quick else 1024,
        steps=2 if o.quick else 16,
        train=("1x32",) if o.quick else ("4x2048",),
        question=(64, 8) if o.quick else (4096, 32),
        operators=(64,) if o.quick else (2048, 8192),
        repetitions=1 if o.quick else 3,
        device=o.device,
        seed=o.seed,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        torch.manual_seed(o.seed)
        q.Qwen3Next(bench.config).save_pretrained(folder)
        exact = benchmark.models(options, folder, "float32")
        found = benchmark.models(options, folder, "bfloat16")
        for job in benchmark.plan(options, "bfloat16", found, exact):
            case = job()
            limit = max(
                case.flops / bench.can["bfloat16_flops_per_second"], case.nbytes / bench.can["read_bytes_per_second"]
            )
            for row in benchmark.compare(case, options.repetitions, dtype="bfloat16", limit=limit):
                yield asdict(row)


# The most important first, each with its share of the total time.
SECTIONS: dict[str, tuple[Callable[[Bench], Rows], float]] = {
    "device": (check_device, 0.1),
    "parity": (check_parity, 0.3),
    "decode": (check_decode, 0.12),
    "prefill": (check_prefill, 0.12),
    "train": (check_train, 0.12),
    "benchmark": (check_benchmark, 0.24),
}


def as_markdown(rows: list[dict[str, Any]], where: dict[str, str]) -> str:
    """The report in Markdown, with a list of rows for each section."""
    lines = ["; ".join(f"{k}: {v}" for k, v in where.items())]
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += ["", f"## {section}", ""]
        for row in (r for r in rows if r["section"] == section):
            said = (f"{k} {_shown(v)}" for k, v in row.items() if k not in ("section", "what"))
            lines.append(f"- {row['what']}: " + ", ".join(said))
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def main(options: Options) -> list[dict[str, Any]]:
    """Run the sections; print and write each row as soon as it is measured.

    Raises: ValueError for a device or a preset that does not exist.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "gpu-check needs an NVIDIA GPU and a torch built for CUDA, and there is none here: "
            "try the program without a GPU with --quick --device cpu."
        )
    if options.preset not in q.presets.ALL:
        raise ValueError(f"There is no preset {options.preset!r}: choose {', '.join(q.presets.ALL)}.")
    where = machine()
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    folder = options.out or Path(os.environ.get("OUT") or "docs/benchmarks")
    path = folder / f"{where['date']}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}"
    rows: list[dict[str, Any]] = []
    content = {"options": asdict(options) | {"out": str(folder)}, **where, "rows": rows}
    bench, began = Bench(options), time.perf_counter()

    def note(section: str, row: dict[str, Any]) -> None:
        rows.append({"section": section} | row)
        Console().print(f"[{time.perf_counter() - began:.0f} s] {section}: {row}", markup=False, soft_wrap=True)
        write_results(path, content, as_markdown(rows, where))

    for name, (section, share) in SECTIONS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        try:
            with at_most(min(share * options.seconds, options.seconds - (time.perf_counter() - began))):
                for row in section(bench):
                    note(name, row)
        except Exception as error:  # reported as a row, so that the other sections still run
            first = (str(error).splitlines() or [""])[0]
            note(name, {"what": "stopped", "failed": f"{type(error).__name__}: {first}"})
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as mistake:
        sys.exit(str(mistake))
