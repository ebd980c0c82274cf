"""Single-token steps: time, share of the read bandwidth, and equality with the modules over many tokens."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import qwen3next as q
from layers.state.kv_cache import KVCache
from recipes.gpu.bench import Bench, Job, Row, build
from recipes.measure.work import active_weight_bytes

CONTEXTS = (1024, 32_768, 131_072)
STEPS = 32  # between two waits for the device
WARM_UP = 8  # the first steps compile, tune and capture
SHARE = 0.35  # of the section's time that one prefill may take; random keys and values fill the rest


def jobs(bench: Bench) -> Iterator[Job]:
    """The first job makes the model; a job that is repeated after a crash makes its own."""
    yield Job("model", lambda: [bench.load(margin=0.15)])
    names = ("graph", "torch") if bench.device.type == "cuda" else ("cpp", "torch")
    filled: dict[int, Filled] = {}
    for context in (64, 256) if bench.quick else CONTEXTS:
        for backend in names:
            yield Job(f"after {context}, {backend}", partial(_timed, bench, context, backend, filled))
        filled.clear()
    for dtype in (torch.float32, torch.bfloat16):
        yield Job(f"many tokens, small model, {dtype}", partial(_many_tokens_small, bench, dtype))
    yield Job("many tokens", lambda: _many_tokens(bench, bench.model, (0.5, 0.3), bench.layers))


@dataclass
class Filled:
    """A cache with a context in it, and how that came there."""

    cache: q.HybridCache
    how: str


def fill(bench: Bench, context: int, room: int) -> Filled:
    """A cache with `context` tokens and places for `room` more.

    By a real prefill as far as time allows, then by random keys, values and states.
    """
    model, ids = bench.model, bench.ids(1, context)
    cache = model.new_cache(max_len=context + room)
    began, limit = time.monotonic(), SHARE * bench.left
    for _ in model.prefill(ids, cache):
        bench.synchronize()
        if time.monotonic() - began > limit:
            break
    done = cache.lengths[0]
    if done == context:
        return Filled(cache, "real prefill")
    put_random(model, cache, ids[:, done:], bench.settings.seed)
    return Filled(cache, f"real prefill of {done} tokens, then {context - done} random keys and values")


@torch.no_grad()
def put_random(model: q.Qwen3Next, cache: q.HybridCache, ids: Tensor, seed: int) -> None:
    """Extend a cache by these tokens with random keys and values; recurrent states stay, or are random if empty."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    (b, t), c, empty = ids.shape, model.config, not max(cache.lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=ids.device, dtype=model.dtype)

    with cache.extend(ids, None, model) as call:
        for state in call.layers:
            if isinstance(state, KVCache):
                keys, values = (random(b, t, c.num_key_value_heads, c.head_dim) for _ in "kv")
                state.append(keys, values, call.segments)
            elif empty:
                state.replace(random(*state.conv.shape), 0.1 * random(*state.recurrent.shape).float())
        call.hidden = random(b, 1, c.hidden_size)


def _timed(bench: Bench, context: int, backend: str, filled: dict[int, Filled]) -> Iterator[Row]:
    """Steps with one wait for the device in STEPS, and with one a step."""
    model, steps = bench.model, 4 if bench.quick else STEPS
    rounds = 2 if bench.quick else 4
    if context not in filled:
        filled[context] = fill(bench, context, (rounds + 1) * steps + WARM_UP)
    (cache,) = filled[context].cache.fork()
    tokens = iter(bench.ids(1, (rounds + 1) * steps + WARM_UP).split(1, dim=1))

    def seconds_of(n: int) -> float:
        bench.synchronize()
        began = time.perf_counter()
        for _ in range(n):
            model.step(next(tokens), cache)
        bench.synchronize()
        return (time.perf_counter() - began) / n

    with chosen(model, backend), captures(bench.device) as seconds_of_captures:
        first = seconds_of(1)
        seconds_of(WARM_UP - 1)
        together = median(seconds_of(steps) for _ in range(rounds))
        singly = median(seconds_of(1) for _ in range(steps))
        runs, step = bench.runs(), next(row.why for row in q.explain(model) if row.operation == "decode")
    weights, held = active_weight_bytes(model.config, 2), cache.nbytes()
    reading = (weights + held) / bench.can["read_bytes_per_second"]
    yield {
        "what": f"decode 1 x 1 after {context}, {backend}, {bench.layers}",
        "cache": filled[context].how,
        "ms": 1e3 * together,
        "tokens/s": 1 / together,
        "ms with a wait a token": 1e3 * singly,
        "bytes read": weights + held,
        "of the bandwidth": reading / together,
        "ms of the first step": 1e3 * first,
        "captures": len(seconds_of_captures),
        **bench.extrapolated(1e3 * together),
        "step": step,
        "runs": runs,
    }


@contextmanager
def chosen(model: q.Qwen3Next, backend: str) -> Iterator[None]:
    """Decode by this backend in the block. Raises: RuntimeError where it cannot run."""
    model.set_backend("decode", backend)
    try:
        yield
    finally:
        model.set_backend("decode", "auto")


@contextmanager
def captures(device: torch.device) -> Iterator[list[float]]:
    """The seconds of each capture of a CUDA graph in the block, through torch's own context manager."""
    seconds: list[float] = []
    if device.type != "cuda":
        yield seconds
        return
    usual = torch.cuda.graph

    class Timed(usual):  # type: ignore[misc, valid-type]
        def __enter__(self) -> None:
            self.began = time.perf_counter()
            super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            seconds.append(time.perf_counter() - self.began)

    torch.cuda.graph = Timed  # type: ignore[misc]
    try:
        yield seconds
    finally:
        torch.cuda.graph = usual  # type: ignore[misc]


def _many_tokens_small(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    """Held to close bounds. fp32 products in tf32 are off by 1e-3; in bf16 every expert is chosen, so none changes."""
    changes: dict[str, Any] = {"num_hidden_layers": 4, "mtp_num_hidden_layers": 0, "initializer_range": 0.06}
    changes |= {"num_experts": 4, "num_experts_per_tok": 4} if dtype == torch.bfloat16 else {}
    config = (q.presets.tiny if bench.quick else q.presets.small)(**changes)
    model = build(config, bench.device, bench.settings.seed, dtype)
    bound = 1e-2 if dtype == torch.float32 else 0.1
    yield from _many_tokens(bench, model, (bound, bound), "small model")


def _many_tokens(bench: Bench, model: q.Qwen3Next, bounds: tuple[float, float], size: str) -> Iterator[Row]:
    """Decoded tokens, while buffers grow, against the modules' logits for the same tokens.

    The modules take the tokens in chunks, and the first of them one at a time as well. In bf16, rounding changes the
    experts of tokens in a model with random weights; logits that have nothing to do with each other are apart by 1.4.

    Args:
        bounds: of the median relative error, in chunks and a token at a time.
    """
    before, new, few = (240, 40, 10) if bench.quick else (64, 2000, 200)
    backend = "graph" if bench.device.type == "cuda" else "cpp"
    ids = bench.ids(1, before) % model.vocab_size
    with chosen(model, backend), captures(bench.device) as seconds:
        cache = _prompt(model, ids, new)
        capacities = {_capacity(cache)}
        assert cache.last_logits is not None
        token, tokens, found = cache.last_logits.argmax(-1, keepdim=True), [], []
        for _ in range(new):
            tokens.append(token)
            found.append(model.step(token, cache))
            token = found[-1].argmax(-1, keepdim=True)
            capacities.add(_capacity(cache))
    given, logits = torch.cat(tokens, dim=1), torch.stack(found, dim=1)
    what = f"{new} tokens after {before}, {backend}, {size}, {str(model.dtype).removeprefix('torch.')}"
    for how, n, chunk, bound in (("in chunks", new, 256, bounds[0]), ("a token at a time", few, 1, bounds[1])):
        row: Row = {"what": f"{what}: {n} against the modules {how}"}
        row |= _compared(model, ids, given[:, :n], logits[:, :n], chunk, bound)
        row |= {"captures": len(seconds), "seconds of captures": sum(seconds)}
        yield row | {"sizes of the buffer": len(capacities)}


def _prompt(model: q.Qwen3Next, ids: Tensor, room: int) -> q.HybridCache:
    cache = model.new_cache(max_len=ids.shape[1] + room)
    list(model.prefill(ids, cache))
    return cache


def _capacity(cache: q.HybridCache) -> int:
    return max((s.capacity for s in cache.layers if isinstance(s, KVCache)), default=0)


@torch.no_grad()
def _compared(model: q.Qwen3Next, ids: Tensor, tokens: Tensor, logits: Tensor, chunk: int, bound: float) -> Row:
    """Relative rms error of the logits of each token, and whether the largest is the same."""
    cache, apart, same = _prompt(model, ids, tokens.shape[1]), [], []
    with chosen(model, "torch"):
        for part, found in zip(tokens.split(chunk, dim=1), logits.split(chunk, dim=1), strict=True):
            expected = model(part, cache=cache).logits
            apart.append((found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1))
            same.append(found.argmax(-1) == expected.argmax(-1))
    error, equal = torch.cat(apart, dim=1), torch.cat(same, dim=1).float().mean().item()
    middle = error.median().item()
    return {
        "error, median": middle,
        "error, largest": error.max().item(),
        "same token": equal,
        "within": middle <= bound,
    }
