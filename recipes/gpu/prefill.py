"""Long prompts, beside transformers with flash-linear-attention on the same weights: speed and peak memory."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch

from recipes.gpu import peer as peers
from recipes.gpu.bench import Bench, Job, Row
from recipes.measure.measuring import peak_memory
from recipes.measure.work import forward_flops

LENGTHS = (8192, 32_768, 131_072)
SHORT = 2.0  # seconds; what takes less is repeated
MARGIN = 0.4  # of the free memory: the other implementation takes the whole prompt at once


def jobs(bench: Bench) -> Iterator[Job]:
    other = Other(bench)
    yield Job("model", lambda: [bench.load(margin=MARGIN)])
    yield Job("peer", other.checked)
    for length in (256, 1024) if bench.quick else LENGTHS:
        yield Job(f"{length}, qwen3next", partial(_ours, bench, length))
        yield Job(f"{length}, transformers", partial(other.prefill, length))


def _ours(bench: Bench, length: int) -> Iterator[Row]:
    model, ids = bench.model, bench.ids(1, length)
    held = 0

    def run() -> None:
        nonlocal held
        cache = model.new_cache(max_len=length)
        list(model.prefill(ids, cache))
        held = cache.nbytes()

    def warm_up() -> None:
        list(model.prefill(ids[:, :8192], model.new_cache(max_len=length)))

    row = _measured(bench, length, run, warm_up)
    yield {"what": f"prefill {length}, {bench.layers}"} | row | {"cache bytes": held, "runs": bench.runs()}


class Other:
    """transformers' model, made at its first use. A job that finds it missing says so."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self._peer: Any = None

    @property
    def peer(self) -> Any:
        if self._peer is None:
            self._peer = peers.peer_of(self.bench.model)
        return self._peer

    @torch.no_grad()
    def checked(self) -> Iterator[Row]:
        """What runs in it, and that it computes the same. In bf16, rounding changes the experts of some tokens."""
        ids = self.bench.ids(1, 100)
        a, b = self.bench.model(ids).logits.float(), self.peer(ids).logits.float()
        error = ((a - b).norm() / b.norm()).item()
        yield {"what": "logits against transformers, 100 tokens, bf16", "error": error, "within": error <= 0.3}
        yield {"what": "transformers runs", "runs": peers.what_runs(self.peer)}

    @torch.no_grad()
    def prefill(self, length: int) -> Iterator[Row]:
        """The whole prompt in one call, then decoding."""
        bench, peer, ids = self.bench, self.peer, self.bench.ids(1, length)
        past: Any = None

        def run() -> None:
            nonlocal past
            past = None  # before a new cache is made
            past = peer(ids, use_cache=True, logits_to_keep=1).past_key_values

        def warm_up() -> None:
            peer(ids[:, :8192], use_cache=True, logits_to_keep=1)

        row = _measured(bench, length, run, warm_up)
        yield {"what": f"prefill {length}, transformers, {bench.layers}"} | row | {"runs": peers.what_runs(peer)}
        steps = 4 if bench.quick else 16
        times = []
        for token in bench.ids(1, steps + 4).split(1, dim=1):
            bench.synchronize()
            began = time.perf_counter()
            peer(token, past_key_values=past, use_cache=True)
            bench.synchronize()
            times.append(time.perf_counter() - began)
        ms = 1e3 * median(times[4:])
        yield {
            "what": f"decode 1 x 1 after {length}, transformers, {bench.layers}",
            "ms with a wait a token": ms,
            **bench.extrapolated(ms),
        }


def _measured(bench: Bench, length: int, run: Callable[[], None], warm_up: Callable[[], None]) -> Row:
    """Seconds, once or the median of three; peak memory above what was allocated before, of the first run."""
    warm_up()  # compiles and tunes
    bench.synchronize()
    times = []
    with peak_memory() as peak:
        times.append(_seconds(bench, run))
    while times[0] < SHORT and len(times) < 3:
        times.append(_seconds(bench, run))
    seconds = median(times)
    limit = forward_flops(bench.config, length) / bench.can["bfloat16_flops_per_second"]
    row = {"tokens/s": length / seconds, "seconds": seconds, "runs timed": len(times), "peak bytes": peak.nbytes}
    return row | {"of the limit of products": limit / seconds}


def _seconds(bench: Bench, run: Callable[[], None]) -> float:
    bench.synchronize()
    began = time.perf_counter()
    run()
    bench.synchronize()
    return time.perf_counter() - began
