"""Measure the implementations of each operation on this CPU, so that "auto" picks the one that is faster here.

Every implementation that can run does the same work in turn. A figure is the time of the one in plain torch divided by
its own, each the shortest of all turns: whatever else runs on the machine only adds to a time.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layers.causal_conv import causal_conv
from layers.cpp import cpu
from layers.delta_rule import gated_delta_rule
from layers.dispatch import speeds
from layers.dispatch.backends import OPERATIONS, run
from layers.linear import linear
from layers.mlp import activate
from layers.norm import l2_normalise
from layers.segments import Segments
from qwen3next import presets
from qwen3next.api import Qwen3Next
from qwen3next.files.atomic import fresh_file

SIZES = (256, 2048)  # tokens
WIDTH, EXPERTS, CHOSEN = 512, 16, 4
MOST_TURNS, ENOUGH = 50, 0.3  # at most so many turns, and no more than the least number after so many seconds
# What the fast implementations replace: the figure of these is 1.
REPLACED = {
    "linear": "torch",
    "delta_rule": "chunked",
    "causal_conv": "torch",
    "attention": "sdpa",
    "elementwise": "torch",
    "experts": "grouped",
    "decode": "torch",
}
LEFT_OUT = ("recurrent", "eager", "loop", "gathered")  # many times slower than what replaces them


@dataclass(frozen=True)
class Work:
    """One piece of work: `run` does it by an implementation's name; `inputs` are what gradients are taken of."""

    run: Callable[[str], Tensor | None]
    inputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One figure: how many times as fast as plain torch an implementation is."""

    operation: str
    dtype: torch.dtype
    gradients: bool
    tokens: int
    name: str
    ratio: float


def tune(repetitions: int = 5, seed: int = 0) -> Iterator[Measured]:
    """Measure all figures of this CPU, one after another.

    Args:
        repetitions: least number of turns of each, after one that does not count.
        seed: random seed of inputs.
    """
    for operation in REPLACED:
        for dtype in (torch.float32, torch.bfloat16):
            for gradients in (False, True):
                names = candidates(operation, dtype, gradients)
                for tokens in SIZES if len(names) > 1 else ():
                    if operation == "decode" and tokens != SIZES[0]:
                        continue  # a step is of one token
                    torch.manual_seed(seed)
                    work = WORK[operation](tokens, dtype)
                    ratios = compare(names, work, REPLACED[operation], gradients=gradients, repetitions=repetitions)
                    for name, ratio in ratios.items():
                        yield Measured(operation, dtype, gradients, tokens, name, ratio)


def candidates(operation: str, dtype: torch.dtype, gradients: bool) -> list[str]:
    """The implementations that can run here, without those that only define the operation."""
    if operation == "decode" and gradients:
        return []
    with torch.set_grad_enabled(gradients):
        where = torch.device("cpu")
        able = [i.name for i in OPERATIONS[operation] if i.cannot(where, dtype, 128) is None]
    return [name for name in able if name not in LEFT_OUT]


def compare(names: list[str], work: Work, base: str, *, gradients: bool, repetitions: int) -> dict[str, float]:
    """How many times as fast as `base` each is, by the shortest turn of each; short work gets more turns."""
    turns: list[dict[str, float]] = []
    begin = time.perf_counter()
    while len(turns) <= repetitions or (len(turns) < MOST_TURNS and time.perf_counter() - begin < ENOUGH):
        turns.append({name: _seconds(work, name, gradients) for name in names})
    best = {name: min(turn[name] for turn in turns[1:]) for name in names}
    return {name: best[base] / best[name] for name in names}


def _seconds(work: Work, name: str, gradients: bool) -> float:
    with torch.set_grad_enabled(gradients):
        begin = time.perf_counter()
        y = work.run(name)
        if gradients and y is not None:
            torch.autograd.grad(y.float().sum(), work.inputs)
    return time.perf_counter() - begin


def _leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def _linear(tokens: int, dtype: torch.dtype) -> Work:
    x, weight = _leaf(tokens, 2 * WIDTH, dtype=dtype), _leaf(2 * WIDTH, 2 * WIDTH, dtype=dtype)
    return Work(lambda name: linear(x, weight, backend=name), (x, weight))


def _delta_rule(tokens: int, dtype: torch.dtype) -> Work:
    q, k = (_leaf(1, tokens, 2, 128, dtype=dtype) for _ in "qk")
    v, g, b = _leaf(1, tokens, 4, 128, dtype=dtype), *(_leaf(1, tokens, 4, dtype=torch.float32) for _ in "gb")

    def work(name: str) -> Tensor:
        normed = l2_normalise(q, scale=128**-0.5), l2_normalise(k)
        return gated_delta_rule(*normed, v, -0.1 * g.exp(), b.sigmoid(), backend=name)[0]

    return Work(work, (q, k, v, g, b))


def _convolution(tokens: int, dtype: torch.dtype) -> Work:
    x, weight = _leaf(1, tokens, 2 * WIDTH, dtype=dtype), _leaf(2 * WIDTH, 4, dtype=dtype)
    return Work(lambda name: causal_conv(x, weight, backend=name)[0], (x, weight))


def _attention(tokens: int, dtype: torch.dtype) -> Work:
    q = torch.randn(1, tokens, 4, 128).to(dtype)
    k, v = (torch.randn(1, tokens, 2, 128).to(dtype) for _ in "kv")
    options = {"segments": Segments.full(q), "state": None}
    return Work(lambda name: run("attention.sequences", name, q, q, k, v, **options))


def _elementwise(tokens: int, dtype: torch.dtype) -> Work:
    x, gate, up = (_leaf(tokens, WIDTH, dtype=dtype) for _ in range(3))
    weight = _leaf(WIDTH, dtype=dtype)

    def work(name: str) -> Tensor:
        y = run("elementwise.rms_norm", name, x, x, weight, eps=1e-6, zero_centred=True)
        y = run("elementwise.gated_rms_norm", name, x, y, weight, gate, eps=1e-6)
        return l2_normalise(activate(y, up, backend=name), backend=name)

    return Work(work, (x, gate, up, weight))


def _experts(tokens: int, dtype: torch.dtype) -> Work:
    x = _leaf(tokens, WIDTH, dtype=dtype)
    scale = WIDTH**-0.5  # numbers of about 1, so that results can be compared
    gate_up = _leaf(EXPERTS, WIDTH, WIDTH, dtype=dtype, scale=scale)
    down = _leaf(EXPERTS, WIDTH, WIDTH // 2, dtype=dtype, scale=scale)
    weights, indices = torch.rand(tokens, EXPERTS).softmax(-1).topk(CHOSEN)
    return Work(lambda name: run("experts", name, x, x, weights.to(dtype), indices, gate_up, down), (x, gate_up, down))


def _decode(tokens: int, dtype: torch.dtype) -> Work:
    model = Qwen3Next(presets.small(num_hidden_layers=4, mtp_num_hidden_layers=0)).to(dtype).eval()
    cache, token = model.new_cache(max_len=tokens + 1000), torch.zeros(1, 1, dtype=torch.long)
    list(model.prefill(torch.zeros(1, tokens, dtype=torch.long), cache))

    def work(name: str) -> None:
        if model.decode_backend != name:
            model.set_backend("decode", name)
            model.step(token, cache)  # which plans anew
        for _ in range(4):
            model.step(token, cache)

    return Work(work)


WORK: dict[str, Callable[[int, torch.dtype], Work]] = {
    "linear": _linear,
    "delta_rule": _delta_rule,
    "causal_conv": _convolution,
    "attention": _attention,
    "elementwise": _elementwise,
    "experts": _experts,
    "decode": _decode,
}


def write_table(measured: list[Measured], path: Path) -> None:
    """Write the figures as a table that layers/dispatch/speeds.py reads, atomically."""
    ratios: dict[tuple[str, str, bool], dict[str, dict[int, float]]] = {}
    for m in measured:
        key = (m.operation, str(m.dtype).removeprefix("torch."), m.gradients)
        ratios.setdefault(key, {}).setdefault(m.name, {})[m.tokens] = m.ratio
    where = f"{cpu.kind()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh_file(path) as fresh:
        fresh.write_text(json.dumps(speeds.as_json(ratios, where), indent=1) + "\n", encoding="utf-8")
