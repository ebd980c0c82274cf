"""The rows of recipes.benchmark on this device: the preset of the CPU benchmarks, beside transformers."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import qwen3next as q
from recipes import benchmark
from recipes.gpu.bench import Bench, Job, Row
from recipes.measure.benchmark_cases import Case


def jobs(bench: Bench) -> Iterator[Job]:
    options = _options(bench)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        torch.manual_seed(options.seed)
        make = q.presets.ALL[options.preset]
        q.Qwen3Next(make(mtp_num_hidden_layers=0)).save_pretrained(folder)
        exact = benchmark.models(options, folder, "float32")
        found = benchmark.models(options, folder, "bfloat16")
        for i, job in enumerate(benchmark.plan(options, "bfloat16", found, exact, folder)):
            yield Job(f"row {i}", partial(_row, bench, options, job.make))


def _options(bench: Bench) -> benchmark.Options:
    quick = bench.quick
    return benchmark.Options(
        preset="tiny" if quick else "medium",
        prefill=("1x64",) if quick else ("1x2048", "1x8192"),
        decode=(1,) if quick else (1, 16),
        decode_after=16 if quick else 1024,
        steps=2 if quick else 16,
        train=("1x32",) if quick else ("4x2048",),
        question=(64, 8) if quick else (4096, 32),
        operators=(64,) if quick else (2048, 8192),
        repetitions=1 if quick else 3,
        device=bench.settings.device,
        seed=bench.settings.seed,
    )


def _row(bench: Bench, options: benchmark.Options, make: Callable[[], Case]) -> Iterator[Row]:
    case = make()
    products, reads = bench.can["bfloat16_flops_per_second"], bench.can["read_bytes_per_second"]
    limit = max(case.flops / products, case.nbytes / reads)
    for row in benchmark.compare(case, options.repetitions, dtype="bfloat16", limit=limit):
        yield asdict(row)
