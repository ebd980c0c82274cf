"""Time a prefill and a decoding step on the CPU by operation, in plain torch and with the fast backends.

    python -m recipes.where_time_goes --preset medium --tokens 2048 --dtype bfloat16
    python -m recipes.where_time_goes --preset medium --dtype float32 --out docs/benchmarks/2026-11-25-where-float32

Before: torch's own operations, with the delta rule as `chunked`. After: what "auto" chooses here. Both run the same
weights alternately. A table shows the repetition with the median time, so that its rows add up. "Least" is the time of
an operation's matrix products at the rate of a large product, or of its weights and cache at the read bandwidth, both
measured in the same repetition. The last table has the delta rule alone, by implementation.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import layers.gated_deltanet
import layers.kernels.attention
import layers.mlp
import layers.moe
import qwen3next as q
from layers.delta_rule import gated_delta_rule
from layers.dispatch import availability, backends, speeds
from layers.norm import l2_normalise
from qwen3next.decoding.plan import Plan
from recipes.measure.measuring import machine, machine_can, random_bytes, seconds_of, write_results
from recipes.measure.work import bytes_by_operation, delta_rule_flops, flops_by_operation
from recipes.pretrain import exit_status

ROWS = "norms, gates, activations"
# The timed functions and the names of their rows. Timed calls do not nest: products inside the experts count there.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (layers.linear.Linear, "forward", "linear maps"),
    (layers.moe, "linear", "linear maps"),  # the router's
    (layers.moe.Experts, "forward", "experts"),
    (layers.gated_deltanet.GatedDeltaNet, "rule", "delta rule"),
    (layers.gated_deltanet, "causal_conv", "convolution"),
    (layers.kernels.attention, "attend_in_tiles", "attention"),
    (layers.norm.RMSNorm, "forward", ROWS),
    (layers.norm.GatedRMSNorm, "forward", ROWS),
    (layers.gated_deltanet, "l2_normalise", ROWS),
    (layers.mlp, "activate", ROWS),
    (Plan, "run", "the compiled step"),
)
REST = "the rest"
ORDER = (*dict.fromkeys(part for _, _, part in PARTS), REST)


Turn = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Options:
    """Options of the measurement.

    Attributes:
        preset: model size (random weights, without MTP).
        tokens: tokens of the prompt; decoding continues it.
        dtype: dtype of weights and arithmetic: float32 or bfloat16.
        repetitions: repetitions of each measurement, after one warm-up.
        steps: tokens decoded in a repetition.
        seed: random seed of weights and tokens.
        out: path without suffix, for a .json and a .md file; default writes none.
    """

    preset: str = "medium"
    tokens: int = 2048
    dtype: str = "bfloat16"
    repetitions: int = 5
    steps: int = 16
    seed: int = 0
    out: Path | None = None


@dataclass
class Clock:
    """Seconds by part; code outside the parts is not timed."""

    seconds: dict[str, float] = field(default_factory=dict)
    inside: bool = False

    @contextmanager
    def watching(self, parts: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Time these PARTS inside the block."""
        with ExitStack() as stack:
            for owner, name, part in parts:
                timed: Any = self._timed(getattr(owner, name), part)
                stack.enter_context(patch.object(owner, name, staticmethod(timed) if name == "rule" else timed))
            yield

    def _timed(self, run: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return run(*args, **kwargs)
            self.inside, begin = True, perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - begin

        return timed


@contextmanager
def torch_alone(model: q.Qwen3Next) -> Iterator[None]:
    """Use torch's own operations inside the block: no C++ kernels, no other library, the chunked delta rule."""
    chosen = {"decode": "torch"}
    if "linear_attention" in model.config.layer_types:
        chosen["delta_rule"] = "chunked"
    with (
        patch.object(availability, "missing", lambda: "it is left out"),
        speeds.using(),  # without figures, products are torch's
    ):
        for operation, name in chosen.items():
            model.set_backend(operation, name)
        try:
            yield
        finally:
            for operation in chosen:
                model.set_backend(operation, "auto")


def split(
    model: q.Qwen3Next,
    run: Callable[[], object],
    repetitions: int,
    tick: Callable[[], dict[str, float]],
    *,
    ready: Callable[[], object] = lambda: None,
    after: Sequence[tuple[Any, str, str]] = PARTS,
) -> Turn:
    """Seconds of `run` by part, before and after, and the machine's limits, of the repetition with the median time.

    Args:
        tick: called at the end of each repetition; returns the machine's limits.
        ready: called before each timing, untimed.
        after: the parts to time on the second side.
    """
    turns = []
    for _ in range(repetitions + 1):
        turn: Turn = {}
        for side in ("before", "after"):
            clock = Clock()
            with torch_alone(model) if side == "before" else nullcontext():
                ready()
                with clock.watching(PARTS if side == "before" else after):
                    total = seconds_of(run)
            turn[side] = clock.seconds | {REST: total - sum(clock.seconds.values())}
        turns.append(turn | {"can": tick()})
    return _typical(turns[1:], lambda turn: sum(sum(turn[side].values()) for side in ("before", "after")))


def _typical(turns: list[Turn], took: Callable[[Turn], float]) -> Turn:
    return sorted(turns, key=took)[len(turns) // 2]


def delta_rules(config: q.ModelConfig, options: Options, tick: Callable[[], dict[str, float]]) -> Turn:
    """Seconds of one layer's delta rule by implementation, without and with gradients, of the median repetition."""
    c, t, dtype = config, options.tokens, getattr(torch, options.dtype)
    keys, values = (c.linear_num_key_heads, c.linear_key_head_dim), (c.linear_num_value_heads, c.linear_value_head_dim)
    inputs = [torch.randn(1, t, *shape).to(dtype) for shape in (keys, keys, values, values[:1], values[:1])]

    def run(backend: str, gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            leaves = [x.requires_grad_(gradients) for x in inputs]
            a, b, v, decay, beta = leaves
            a, b = l2_normalise(a, scale=keys[1] ** -0.5), l2_normalise(b)
            o, _ = gated_delta_rule(a, b, v, -decay.float().abs(), beta.float().sigmoid(), backend=backend)
            if gradients:
                torch.autograd.grad(o.float().sum(), leaves)

    able = [i.name for i in backends.OPERATIONS["delta_rule"] if i.missing(torch.device("cpu"), dtype) is None]
    turns = []
    for _ in range(options.repetitions + 1):
        turn: Turn = {}
        for name in ("chunked", "chunked_recompute", "cpp"):
            if name in able:
                forward = seconds_of(partial(run, name, False))
                turn[name] = {"forward": forward, "with gradients": seconds_of(partial(run, name, True))}
        turns.append(turn | {"can": tick()})
    found = _typical(turns[1:], lambda turn: sum(sum(turn[name].values()) for name in turn if name != "can"))
    least = delta_rule_flops(tokens=t, heads=values[0], key_dim=keys[1], value_dim=values[1])
    least_seconds = least / found["can"]["flops_per_second"]
    return found | {"least": {"forward": least_seconds, "with gradients": 3 * least_seconds}}


def measure(options: Options) -> dict[str, Any]:
    """The data of all tables, in seconds; shows progress."""
    make = q.presets.ALL.get(options.preset)
    if make is None:
        raise ValueError(f"There is no preset {options.preset!r}: choose {', '.join(q.presets.ALL)}.")
    if options.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{options.dtype!r} cannot be timed: choose float32 or bfloat16.")
    if min(options.tokens, options.repetitions, options.steps) < 1:
        raise ValueError("tokens, repetitions and steps must be at least 1.")
    torch.manual_seed(options.seed)
    n, dtype, turns = options.tokens, getattr(torch, options.dtype), options.repetitions + 1
    room = n + 2 * turns * (options.steps + 1)
    config = make(mtp_num_hidden_layers=0, max_position_embeddings=room)
    model = q.Qwen3Next(config).to(dtype).eval()
    ids, new = torch.randint(config.vocab_size, (1, n)), torch.randint(config.vocab_size, (1, options.steps))
    cache, memory = model.new_cache(max_len=room), random_bytes()
    list(model.prefill(ids, cache))

    def decode() -> None:
        for token in new.split(1, dim=1):
            model.step(token, cache)

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=(3 if "linear_attention" in config.layer_types else 2) * turns)

        def tick() -> dict[str, float]:
            progress.advance(task)
            return machine_can(dtype, memory)

        prefill = split(model, lambda: list(model.prefill(ids, model.new_cache(max_len=n))), options.repetitions, tick)
        # The compiled step is planned again after a change of backends. It is timed as a whole, because a module whose
        # forward is replaced for timing would run instead of it.
        steps = split(
            model, decode, options.repetitions, tick, ready=lambda: model.step(new[:, :1], cache), after=PARTS[-1:]
        )
        rules = delta_rules(config, options, tick) if "linear_attention" in config.layer_types else {}
    flops, nbytes = flops_by_operation(config, n), bytes_by_operation(config, n, dtype.itemsize)
    rate, bandwidth = prefill["can"]["flops_per_second"], steps["can"]["read_bytes_per_second"]
    for side in ("before", "after"):
        steps[side] = {part: x / options.steps for part, x in steps[side].items()}
    return {
        "prefill": prefill | {"least": {part: x / rate for part, x in flops.items()}},
        "decode": steps | {"least": {part: x / bandwidth for part, x in nbytes.items()}},
        "delta rule": rules,
    }


def by_part(found: dict[str, dict[str, float]]) -> list[list[str]]:
    """Rows of a table: part, and milliseconds before, after and at least."""
    sides = ("before", "after", "least")
    rows = [
        [part, *(f"{1e3 * found[side][part]:.2f}" if part in found[side] else "" for side in sides)]
        for part in ORDER
        if any(part in found[side] for side in sides)
    ]
    return [*rows, ["all", *(f"{1e3 * sum(found[side].values()):.2f}" for side in sides)]]


def main(options: Options) -> dict[str, Any]:
    """Time, print the tables, write the files."""
    found, where = measure(options), machine()
    rate = found["prefill"]["can"]["flops_per_second"] / 1e9
    bandwidth = found["decode"]["can"]["read_bytes_per_second"] / 1e9
    told = f"Preset {options.preset}, {options.dtype}. Beside the prefill, matrix products ran at {rate:,.0f} GFLOP/s; "
    told += f"beside decoding, reading at {bandwidth:.1f} GB/s. "
    told += "; ".join(f"{k}: {v}" for k, v in where.items()) + "."
    sides = ["before, ms", "after, ms", "least, ms"]
    tables = [
        ([f"prefill of {options.tokens} tokens", *sides], by_part(found["prefill"])),
        ([f"a decoding step behind {options.tokens} tokens", *sides], by_part(found["decode"])),
    ]
    if rules := found["delta rule"]:
        rows = [[name, *(f"{1e3 * x:.2f}" for x in times.values())] for name, times in rules.items() if name != "can"]
        tables.append((["delta rule of one layer", "forward, ms", "with gradients, ms"], rows))
    lines = [told]
    for heads, rows in tables:
        shown = Table()
        for i, head in enumerate(heads):
            shown.add_column(head, justify="right" if i else "left")
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
        rule = ["---", *["--:"] * (len(heads) - 1)]
        lines += ["", *(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))]
    Console().print(told, highlight=False)
    if options.out is not None:
        content = {"options": asdict(options) | {"out": str(options.out)}, **where, **found}
        write_results(options.out, content, "\n".join(lines) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, description=__doc__))))
