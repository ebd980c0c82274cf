"""Loss and gradients in bf16: tokens a second, share of the arithmetic, memory; with and without recomputation."""

import time
from collections.abc import Iterator
from functools import partial
from statistics import median

from recipes.gpu.bench import Bench, Job, Row
from recipes.gpu.nominal import nominal_flops
from recipes.measure.measuring import peak_memory
from recipes.measure.work import train_flops

PARTS = ("linear_attention", "full_attention", "mlp")


def jobs(bench: Bench) -> Iterator[Job]:
    yield Job("model", lambda: [bench.load(copies=2, margin=0.4)])
    for b, t in ((1, 64),) if bench.quick else ((1, 2048), (4, 2048), (1, 32_768)):
        for again in (False, True):
            yield Job(f"{b} x {t}{', recomputing' if again else ''}", partial(_train, bench, b, t, again=again))


def step(bench: Bench, b: int, t: int) -> float:
    """The loss of one step, as a number."""
    losses = bench.model.loss(bench.ids(b, t))
    losses.total.backward()
    return losses.lm.item()


def _train(bench: Bench, b: int, t: int, *, again: bool) -> Iterator[Row]:
    model, times, loss = bench.model, [], 0.0
    model.recompute(*(PARTS if again else ()))
    try:
        with peak_memory() as peak:
            for _ in range(2 if bench.quick else 5):
                model.zero_grad()
                bench.synchronize()
                began = time.perf_counter()
                loss = step(bench, b, t)
                bench.synchronize()
                times.append(time.perf_counter() - began)
    finally:
        model.zero_grad()
        model.recompute()
    seconds = median(times[1:])
    rate = b * train_flops(model.config, t) / seconds
    row: Row = {
        "what": f"train {b} x {t}, {bench.layers}{', everything made again in the backward pass' if again else ''}",
        "tokens/s": b * t / seconds,
        "ms": 1e3 * seconds,
        "MFU, of the measured rate": rate / bench.can["bfloat16_flops_per_second"],
    }
    if nominal := nominal_flops(bench.device):
        row[f"MFU, of {nominal.flops / 1e12:.0f} TFLOP/s ({nominal.name})"] = rate / nominal.flops
    row |= {"peak bytes": peak.nbytes, "ms of the first step": 1e3 * times[0], "loss": loss}
    yield row | {**bench.extrapolated(1e3 * seconds), "runs": bench.runs(gradients=True)}
