"""What the first call costs: Triton compiles and tunes its kernels for each shape of heads, CUDA graphs are captured.

The section has a Triton cache of its own, which is empty.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from layers.causal_conv import causal_conv
from layers.cross_entropy import linear_cross_entropy
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import choose
from layers.gated_attention import attend
from layers.norm import GatedRMSNorm, l2_normalise
from qwen3next.decoding.cuda_graph import graph_of
from recipes.gpu.bench import Bench, Job, Row
from recipes.gpu.decode import captures, chosen

HEADS = ((16, 32, 128), (4, 8, 64))  # key heads, value heads, their size; the first are the released model's


def jobs(bench: Bench) -> Iterator[Job]:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpu-check-triton-")
    t = 70 if bench.quick else 4096
    for heads in HEADS:
        for tokens, gradients in ((t, False), (t, True), (1, False)):
            how = f"{', gradients' if gradients else ''}"
            name = f"delta rule {heads[0]}:{heads[1]} x {heads[2]}, {tokens}{how}"
            yield Job(name, partial(_timed, bench, name, partial(_delta_rule, bench, heads, tokens, gradients)))
    others = {
        "causal_conv": partial(_conv, bench, t),
        "attention 16:2 x 256": partial(_attention, bench, t),
        "gated norm by fla": partial(_norm, bench, t),
        "cross_entropy": partial(_cross_entropy, bench, t),
    }
    for name, run in others.items():
        yield Job(name, partial(_timed, bench, f"{name}, {t}", run))
    yield Job("graph", lambda: _graph(bench))


def _timed(bench: Bench, name: str, make: Callable[[], tuple[str, Callable[[], object]]]) -> Iterator[Row]:
    """Seconds of the first and of the third call."""
    runs, run = make()
    bench.synchronize()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        bench.synchronize()
        times.append(time.perf_counter() - began)
    yield {"what": name, "seconds of the first call": times[0], "ms of the third": 1e3 * times[2], "runs": runs}


def _random(bench: Bench, *shape: int, gradients: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(bench.settings.seed)
    x = torch.randn(*shape, generator=generator).to(bench.device, torch.bfloat16)
    return x.requires_grad_(gradients)


def _delta_rule(bench: Bench, heads: tuple[int, int, int], t: int, gradients: bool) -> tuple[str, Callable[[], object]]:
    key_heads, value_heads, d = heads
    q, k = (l2_normalise(_random(bench, 1, t, key_heads, d)).detach() for _ in "qk")
    v, beta = _random(bench, 1, t, value_heads, d, gradients=gradients), _random(bench, 1, t, value_heads)
    decay, strength = -0.1 * beta.float().abs(), beta.float().sigmoid()
    state = None if gradients else torch.zeros(1, value_heads, d, d, device=bench.device)

    def run() -> None:
        with torch.set_grad_enabled(gradients):
            o, _ = gated_delta_rule(q * d**-0.5, k, v, decay, strength, state=state)
            if gradients:
                o.float().sum().backward()

    with torch.set_grad_enabled(gradients):
        return choose("delta_rule", "auto", v), run


@torch.no_grad()
def _conv(bench: Bench, t: int) -> tuple[str, Callable[[], object]]:
    x, weight = _random(bench, 1, t, 8192), _random(bench, 8192, 4)
    return choose("causal_conv", "auto", x), torch.no_grad()(lambda: causal_conv(x, weight))


@torch.no_grad()
def _attention(bench: Bench, t: int) -> tuple[str, Callable[[], object]]:
    q, k, v = _random(bench, 1, t, 16, 256), _random(bench, 1, t, 2, 256), _random(bench, 1, t, 2, 256)
    return choose("attention", "auto", q, head_dim=256), torch.no_grad()(lambda: attend(q, k, v))


@torch.no_grad()
def _norm(bench: Bench, t: int) -> tuple[str, Callable[[], object]]:
    norm = GatedRMSNorm(128).to(bench.device, torch.bfloat16)
    norm.backend = "fla" if bench.device.type == "cuda" else "torch"
    x = _random(bench, 1, t, 32, 128)
    return norm.backend, torch.no_grad()(lambda: norm(x, x))


def _cross_entropy(bench: Bench, t: int) -> tuple[str, Callable[[], object]]:
    c = bench.full
    hidden, weight = _random(bench, t, c.hidden_size, gradients=True), _random(bench, c.vocab_size, c.hidden_size)
    target = torch.arange(t, device=bench.device) % c.vocab_size
    return choose("cross_entropy", "auto", hidden), lambda: linear_cross_entropy(hidden, weight, target).backward()


def _graph(bench: Bench) -> Iterator[Row]:
    """The first steps behind a short prompt: warm-up and capture."""
    yield bench.load(margin=0.4)
    model, backend = bench.model, "graph" if bench.device.type == "cuda" else "cpp"
    cache, ids = model.new_cache(max_len=128), bench.ids(1, 68)
    list(model.prefill(ids[:, :64], cache))
    times = []
    with chosen(model, backend), captures(bench.device) as seconds:
        for token in ids[:, 64:].split(1, dim=1):
            bench.synchronize()
            began = time.perf_counter()
            model.step(token, cache)
            bench.synchronize()
            times.append(time.perf_counter() - began)
    yield {
        "what": f"first step, {backend}, {bench.layers}",
        "seconds of the first step": times[0],
        "of which capture": sum(seconds),
        "captures": len(seconds),
        "a graph is there": graph_of(cache) is not None,
        "ms of the third step": 1e3 * times[2],
    }
