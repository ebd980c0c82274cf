"""Measure the cost of context length for a hybrid, an attention-only and a Gated-DeltaNet-only model of equal size.

    python -m recipes.growth                              1k to 128k tokens of context; see docs/performance.md
    python -m recipes.growth --quick                      1k and 4k tokens, within a minute
    python -m recipes.growth --lengths 1k 8k --dtype bfloat16 --out docs/benchmarks/2026-11-26-growth

At each length the models run alternately, each in a separate process, so that peak memory is measured for each. The
measurements are compared with theory: for prefill, the floating-point operations at the rate of a large matrix product;
for decoding, the bytes of weights and cache at the read bandwidth. Both rates are measured before and after each
process. The tables use these rates; the lines in the picture use their medians over the run. If the weights fit into
the processor's caches, decoding can be faster than its line.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qwen3next as q
from qwen3next.commands.context import parse_tokens
from qwen3next.files.sizes import binary
from qwen3next.inspect import count_parameters
from recipes.measure.measuring import (
    in_own_process,
    machine,
    machine_can,
    peak_memory,
    random_bytes,
    seconds_of,
    write_figure,
    write_results,
)
from recipes.measure.work import bytes_by_operation, forward_flops
from recipes.pretrain import exit_status

MIXERS = {"hybrid": (), "attention": ("full_attention",), "Gated DeltaNet": ("linear_attention",)}
TWICE_UP_TO = 16_384  # tokens: the first prefill also builds code and tables, which costs little at larger lengths
WARM = 192  # tokens


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        preset: model size (random weights, without MTP).
        lengths: tokens of context, such as 1k or 128k.
        dtype: dtype of weights, keys and values: float32 or bfloat16.
        decode: tokens decoded at each length.
        rounds: repetitions at each length; times are medians, memory is the maximum.
        once_from: tokens of context from which there is only one round.
        chunk_size: tokens in a chunk of prefill.
        most_seconds: a model that takes longer than this is stopped and left out at larger lengths.
        seed: random seed of weights and tokens.
        out: path without suffix, for a .json, a .md and a .png file; default writes none.
        quick: use 1k and 4k tokens and one round.
    """

    preset: str = "small"
    lengths: tuple[str, ...] = ("1k", "4k", "16k", "64k", "128k")
    dtype: str = "float32"
    decode: int = 32
    rounds: int = 3
    once_from: str = "64k"
    chunk_size: int = 4096
    most_seconds: float = 3600.0
    seed: int = 0
    out: Path | None = None
    quick: bool = False


def configs(preset: str, longest: int) -> dict[str, q.ModelConfig]:
    """The three models, with the feed-forward that every token passes resized until their sizes are equal.

    Total and active parameters are equal up to the rounding of the feed-forward size to 16 columns.
    Raises: ValueError for an unknown preset, or one whose feed-forwards are too narrow to compensate the mixers.
    """
    make = q.presets.ALL.get(preset)
    if make is None:
        raise ValueError(f"There is no preset {preset!r}: choose {', '.join(q.presets.ALL)}.")
    base = make(mtp_num_hidden_layers=0, max_position_embeddings=longest)
    field = "shared_expert_intermediate_size" if base.num_experts else "intermediate_size"
    made, columns, size = {}, getattr(base, field), count_parameters(base).main
    for name, mixers in MIXERS.items():
        config = base.replace(layer_types=mixers * base.num_hidden_layers) if mixers else base
        missing = size - count_parameters(config).main
        wider = columns + round(missing / (3 * base.hidden_size * base.num_hidden_layers) / 16) * 16
        if wider < 16:
            raise ValueError(f"{preset} has feed-forwards too narrow for models of one size: choose another.")
        made[name] = config.replace(**{field: wider})
    return made


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one model at one length, in a separate process: times in seconds, memory in bytes."""
    n, new = job["tokens"], job["decode"]
    torch.manual_seed(job["seed"])
    config = configs(job["preset"], n + new)[job["model"]]
    model = q.Qwen3Next(config).to(getattr(torch, job["dtype"]))
    ids = torch.randint(config.vocab_size, (1, n + new))

    def prefill() -> q.HybridCache:
        cache = model.new_cache(max_len=n + new)
        for _ in model.prefill(ids[:, :n], cache, job["chunk_size"]):
            pass
        return cache

    list(model.prefill(ids[:, :WARM], model.new_cache()))
    caches: list[q.HybridCache] = []
    with peak_memory() as peak:
        seconds = seconds_of(lambda: caches.append(prefill()))
    (cache,) = caches
    if n <= TWICE_UP_TO:
        seconds = seconds_of(prefill)
    held, reserved = cache.nbytes(), cache.reserved
    steps = [seconds_of(partial(model.step, token, cache)) for token in ids[:, n:].split(1, dim=1)]
    return {"prefill": seconds, "decode": median(steps), "peak": peak.nbytes, "held": held, "reserved": reserved}


def measure(options: Options) -> dict[str, Any]:
    """Models, measured limits of the machine, and a row for each length and model; shows progress."""
    lengths = sorted({parse_tokens(text) for text in options.lengths})
    if not lengths:
        raise ValueError("Give at least one length, as --lengths 1k 16k.")
    if options.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{options.dtype!r} cannot be measured: choose float32 or bfloat16.")
    if min(options.decode, options.rounds, options.chunk_size) < 1:
        raise ValueError("decode, rounds and chunk_size must be at least 1.")
    once_from, dtype = parse_tokens(options.once_from), getattr(torch, options.dtype)
    models = configs(options.preset, lengths[-1] + options.decode)
    rounds = {n: 1 if n >= once_from else options.rounds for n in lengths}
    jobs = [(n, name) for n in lengths for _ in range(rounds[n]) for name in models]
    work = {(n, name): forward_flops(config, n) for n in lengths for name, config in models.items()}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {key: [] for key in work}
    given_up: dict[str, str] = {}
    memory = random_bytes()
    cans = [machine_can(dtype, memory)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=sum(work[job] for job in jobs))
        for n, name in jobs:
            progress.update(task, description=f"{name}, {n:,} tokens")
            if name not in given_up:
                job = {key: value for key, value in asdict(options).items() if key != "out"}
                once = in_own_process("recipes.growth", job | {"model": name, "tokens": n}, options.most_seconds)
                cans.append(machine_can(dtype, memory))
                found[n, name].append(once | {key: (cans[-2][key] + cans[-1][key]) / 2 for key in cans[-1]})
                if "failed" in once:
                    given_up[name] = once["failed"]
            progress.advance(task, work[n, name])
    run = {key: median(can[key] for can in cans) for key in cans[0]}
    rows = []
    for (n, name), times in found.items():
        times = [once for once in times if "failed" not in once]
        nbytes = bytes_by_operation(models[name], n, dtype.itemsize)
        row: dict[str, Any] = {"tokens": n, "model": name, "flops": work[n, name], "nbytes": sum(nbytes.values())}
        row |= {"formula": nbytes["delta rule"] + nbytes["attention"], "theory": least(row, run)}
        if times:
            row |= {key: median(once[key] for once in times) for key in ("prefill", "decode", *run)}
            row |= {key: max(once[key] for once in times) for key in ("peak", "held", "reserved")}
            row |= {"limit": least(row, row), "each": times}
        else:
            row["failed"] = given_up[name]
        rows.append(row)
    spread = {f"{which.__name__}_{key}": which(can[key] for can in cans) for key in run for which in (min, max)}
    return {
        "models": {name: _sizes(config) for name, config in models.items()},
        "machine_can": run | spread,
        "rows": rows,
    }


def least(work: dict[str, Any], can: dict[str, Any]) -> dict[str, float]:
    """Least seconds of a row's prefill and decoding step at the given rates."""
    return {"prefill": work["flops"] / can["flops_per_second"], "decode": work["nbytes"] / can["read_bytes_per_second"]}


def _sizes(config: q.ModelConfig) -> dict[str, Any]:
    counts = count_parameters(config)
    return {
        "parameters": counts.main,
        "active": counts.active,
        "attention_layers": config.layer_types.count("full_attention"),
        "layers": config.num_hidden_layers,
        "feed_forward": config.shared_expert_intermediate_size if config.num_experts else config.intermediate_size,
    }


Show = Callable[[dict[str, Any]], str]
TABLES: dict[str, Show] = {
    "prefill, tokens/s (share of the limit)": lambda row: (
        f"{row['tokens'] / row['prefill']:,.0f} ({row['limit']['prefill'] / row['prefill']:.0%})"
    ),
    "decode, ms a token (share of the limit)": lambda row: (
        f"{1e3 * row['decode']:.2f} ({row['limit']['decode'] / row['decode']:.0%})"
    ),
    "cache": lambda row: binary(row["held"]),
    "most memory in a prefill, cache included, beside the weights": lambda row: (
        "-" if row["peak"] < 0 else binary(row["peak"])
    ),
}


def cells(found: dict[str, Any], show: Show) -> list[list[str]]:
    """Tables with a row for each length and a column for each model."""
    lengths = dict.fromkeys(row["tokens"] for row in found["rows"])
    at = {(row["tokens"], row["model"]): row for row in found["rows"]}
    return [
        [f"{n:,}", *(row["failed"] if "failed" in (row := at[n, name]) else show(row) for name in found["models"])]
        for n in lengths
    ]


def conditions(found: dict[str, Any], options: Options) -> list[str]:
    """The conditions of the run and the measured limits, in sentences."""
    can = found["machine_can"]
    lines = [f"Preset {options.preset}, {options.dtype}, prefill in chunks of {options.chunk_size}."]
    for name, size in found["models"].items():
        lines.append(
            f"{name}: {size['parameters']:,} parameters, {size['active']:,} active, softmax attention in "
            f"{size['attention_layers']} of {size['layers']} layers, feed-forward of {size['feed_forward']}."
        )
    products, reading = (
        f"{can[key] / 1e9:,.0f} {unit} ({can[f'min_{key}'] / 1e9:,.0f} to {can[f'max_{key}'] / 1e9:,.0f})"
        for key, unit in (("flops_per_second", "GFLOP/s"), ("read_bytes_per_second", "GB/s"))
    )
    lines.append(f"Measured in this run, median and range: matrix products {products}, reading {reading}.")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw prefill, decoding and memory against context length, with theory as thin lines."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    panels: list[tuple[str, str, Callable[[dict[str, Any]], float], Callable[[int, float], float]]] = [
        ("prefill, tokens a second", "prefill", lambda row: row["theory"]["prefill"], lambda n, x: n / x),
        ("decoding, ms a token", "decode", lambda row: row["theory"]["decode"], lambda _, x: 1e3 * x),
        ("most memory in a prefill, MiB", "peak", lambda row: row["formula"], lambda _, x: x / 2**20),
    ]
    lengths = sorted({row["tokens"] for row in found["rows"]})
    for axis, (title, key, theory, scale) in zip(axes, panels, strict=True):
        for i, name in enumerate(found["models"]):
            rows = [row for row in found["rows"] if row["model"] == name]
            seen = [row for row in rows if row.get(key, -1) > 0]
            x = [row["tokens"] for row in seen]
            axis.plot(x, [scale(row["tokens"], row[key]) for row in seen], "os^"[i] + "-", c=f"C{i}", label=name)
            axis.plot(lengths, [scale(row["tokens"], theory(row)) for row in rows], "--", c=f"C{i}", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
        axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.grid(alpha=0.3)
    handles = [*axes[0].get_legend_handles_labels()[0]]
    thin = "theory: operations or bytes at this machine's rates, bytes of the cache"
    handles.append(Line2D([], [], c="0.4", ls="--", lw=0.8, label=thin))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    write_figure(figure, path)
    plt.close(figure)


def main(options: Options) -> dict[str, Any]:
    """Measure, print the tables, write the files."""
    if options.quick:
        options = replace(options, lengths=("1k", "4k"), rounds=1)
    found, where = measure(options), machine()
    told = [*conditions(found, options), "; ".join(f"{k}: {v}" for k, v in where.items()) + "."]
    lines = ["\n".join(told)]
    for title, show in TABLES.items():
        shown, rows = Table(title=title), cells(found, show)
        for head in ("tokens", *found["models"]):
            shown.add_column(head, justify="right")
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
        heads = [f"{title}: tokens", *found["models"]]
        lines += ["", *(f"| {' | '.join(row)} |" for row in (heads, ["--:"] * len(heads), *rows))]
    for line in told:
        Console().print(line, highlight=False)
    if options.out is not None:
        content = {"options": asdict(options) | {"out": str(options.out)}, **where, **found}
        write_results(options.out, content, "\n".join(lines) + "\n")
        draw(found, options.out.with_suffix(".png"))
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(worker(json.load(sys.stdin))))
    else:
        sys.exit(exit_status(lambda: main(tyro.cli(Options, description=__doc__))))
