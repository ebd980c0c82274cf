"""Kernels that a decoding step and a training step launch, by torch's profiler; on a CPU, operators in their place."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from recipes.gpu.bench import Bench, Job, Row
from recipes.gpu.decode import WARM_UP, chosen, fill
from recipes.gpu.train import step

HEAVIEST = 15


def jobs(bench: Bench) -> Iterator[Job]:
    yield Job("model", lambda: [bench.load(copies=2, margin=0.4)])
    names = ("graph", "torch") if bench.device.type == "cuda" else ("cpp", "torch")
    for backend in names:
        yield Job(f"decode, {backend}", partial(_decode, bench, backend))
    yield Job("prefill", lambda: _prefill(bench))
    yield Job("train", lambda: _train(bench))


def _decode(bench: Bench, backend: str) -> Iterator[Row]:
    context, steps = (64, 2) if bench.quick else (1024, 4)
    cache = fill(bench, context, steps + WARM_UP).cache
    tokens = iter(bench.ids(1, steps + WARM_UP).split(1, dim=1))
    with chosen(bench.model, backend):
        for _ in range(WARM_UP):
            bench.model.step(next(tokens), cache)
        row = counted(bench, steps, lambda: bench.model.step(next(tokens), cache))
        yield {"what": f"decode 1 x 1 after {context}, {backend}, {bench.layers}"} | row | {"runs": bench.runs()}


def _prefill(bench: Bench) -> Iterator[Row]:
    length = 64 if bench.quick else 4096
    ids = bench.ids(1, length)

    def run() -> None:
        list(bench.model.prefill(ids, bench.model.new_cache(max_len=length)))

    run()
    yield {"what": f"prefill {length}, {bench.layers}"} | counted(bench, 1, run) | {"runs": bench.runs()}


def _train(bench: Bench) -> Iterator[Row]:
    b, t = (1, 64) if bench.quick else (4, 2048)

    def run() -> None:
        bench.model.zero_grad()
        step(bench, b, t)

    run()
    row = counted(bench, 1, run)
    bench.model.zero_grad()
    yield {"what": f"train {b} x {t}, {bench.layers}"} | row | {"runs": bench.runs(gradients=True)}


def counted(bench: Bench, steps: int, run: Callable[[], Any]) -> Row:
    """Launches and their time in one step, the mean of `steps`; the heaviest kernels by time."""
    on_gpu = bench.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    bench.synchronize()
    with profile(activities=kinds) as profiler:
        for _ in range(steps):
            run()
        bench.synchronize()
    found: dict[str, list[float]] = {}  # calls and microseconds by name
    for event in profiler.key_averages():
        if event.device_type != (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            continue
        if getattr(event, "is_user_annotation", False) or not (on_gpu or event.key.startswith("aten::")):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entry = found.setdefault(event.key, [0.0, 0.0])
        entry[0], entry[1] = entry[0] + event.count, entry[1] + us
    kernels, ms = sum(c for c, _ in found.values()) / steps, sum(us for _, us in found.values()) / steps / 1e3
    heaviest = sorted(found.items(), key=lambda item: -item[1][1])[:HEAVIEST]
    counted_what = "kernels" if on_gpu else "operators (no GPU)"
    return {
        counted_what: kernels,
        "a layer": kernels / bench.config.num_hidden_layers,
        "ms in them": ms,
        "heaviest": [{"name": n[:90], "calls": c / steps, "ms": us / steps / 1e3} for n, (c, us) in heaviest],
    }
