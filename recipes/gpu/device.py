"""The device, the installed packages, its measured limits, and the implementation of each operation."""

import shutil
from collections.abc import Iterator
from importlib import metadata

import torch

import qwen3next as q
from layers.dispatch.self_check import PACKAGES
from qwen3next.inspect import on_meta
from recipes.gpu.bench import Bench, Job, Row
from recipes.gpu.nominal import nominal_flops
from recipes.measure.measuring import matmul_rate


def jobs(bench: Bench) -> Iterator[Job]:
    yield Job("releases", _releases)
    yield Job("device", lambda: _device(bench))
    yield Job("rates", lambda: _rates(bench))
    yield Job("what runs", lambda: _what_runs(bench))


def _releases() -> Iterator[Row]:
    versions = {}
    for package in (*PACKAGES, "transformers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    compilers = {name: shutil.which(name) or "not found" for name in ("nvcc", "ptxas")}
    yield {"what": "releases", **versions, "torch built for CUDA": str(torch.version.cuda), **compilers}


def _device(bench: Bench) -> Iterator[Row]:
    if bench.device.type != "cuda":
        yield {"what": "device", "name": bench.device.type}
        return
    p = torch.cuda.get_device_properties(bench.device)
    yield {
        "what": "device",
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "bytes": p.total_memory,
        "bytes free": torch.cuda.mem_get_info(bench.device)[0],
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def _rates(bench: Bench) -> Iterator[Row]:
    row: Row = {"what": "rates", **bench.can, "float32_flops_per_second": matmul_rate(torch.float32, bench.device)}
    nominal = nominal_flops(bench.device)
    if nominal:
        row |= {
            "bf16 products, nominal": f"{nominal.flops:.4g} ({nominal.name})",
            "of the nominal rate": bench.can["bfloat16_flops_per_second"] / nominal.flops,
        }
    yield row


def _what_runs(bench: Bench) -> Iterator[Row]:
    for row in q.explain(on_meta(bench.full), device=bench.device, dtype=torch.bfloat16):
        yield {"what": f"runs: {row.operation}", "backend": row.runs, "why": row.why, "faster": row.faster}
