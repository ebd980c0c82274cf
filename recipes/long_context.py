"""Measure long contexts, compared with transformers on the same weights: prefill, memory, decoding, a second question.

    python -m recipes.long_context                     1k to 128k tokens, and ours alone at 256k; bf16: ten minutes
    python -m recipes.long_context --quick             1k and 4k tokens, about two minutes
    python -m recipes.long_context --lengths 1k 32k --out docs/benchmarks/2026-11-25-long-context

Each length of each side runs in a separate process, so that peak memory is measured for each; the sides alternate.
The figures are compared with theory: the bytes of the cache by its formula, and for decoding the time to read them at
the bandwidth measured in the same process.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from qwen3next.commands.common import show
from qwen3next.commands.context import parse_tokens
from qwen3next.files.sizes import binary
from recipes.measure.measuring import (
    in_own_process,
    machine,
    peak_memory,
    read_bandwidth,
    seconds_of,
    write_figure,
    write_results,
)

QUESTION = 32  # tokens


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        preset: model size (random weights).
        lengths: tokens of context, such as 1k or 128k.
        ours_alone: lengths at which transformers does not run.
        decode: tokens decoded at each length.
        dtype: dtype of weights, keys and values.
        chunk_size: tokens in a chunk of our prefill.
        most_seconds: a side that takes longer than this is stopped and left out at larger lengths.
        seed: random seed of weights and tokens.
        out: path without suffix, for a .json, a .md and a .png file; default writes none.
        quick: use short contexts.
    """

    preset: str = "small"
    lengths: tuple[str, ...] = ("1k", "8k", "32k", "128k")
    ours_alone: tuple[str, ...] = ("256k",)
    decode: int = 32
    dtype: str = "float32"
    chunk_size: int = 4096
    most_seconds: float = 3600.0
    seed: int = 0
    out: Path | None = None
    quick: bool = False


def ours(folder: str, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """One length: a cold prefill, decoding, then the same prompt and another question with the prefix store."""
    model = q.load(folder, dtype=options["dtype"])
    total, question = ids.shape[1], ids[:, :QUESTION]
    warm = model.new_cache(max_len=256)
    list(model.prefill(ids[:, :192], warm))
    store = q.PrefixStore(model, budget="64GiB")
    bandwidth = read_bandwidth()
    with peak_memory() as peak:
        run, began = store.prefill(ids, chunk_size=options["chunk_size"], max_len=total + 4096), time.perf_counter()
        list(run)
        prefill = time.perf_counter() - began
    found: dict[str, Any] = {
        "prefill": prefill,
        "peak": peak.nbytes,
        "held": run.cache.nbytes(),
        "bandwidth": bandwidth,
    }
    found["formula"] = q.HybridCache.estimate(
        model.config,
        total,
        kv_bytes=warm.kv_dtype.itemsize if warm.kv_dtype else 0,
        conv_bytes=model.norm.weight.itemsize,
    )
    found["reading"] = found["formula"] / bandwidth
    found["decode"] = _times(lambda x: model.step(x, run.cache), ids[:, : options["decode"]])
    for name, text in (("again", ids), ("question", torch.cat((ids, question), dim=1))):
        began = time.perf_counter()
        list(store.prefill(text, chunk_size=options["chunk_size"], max_len=total + 4096))
        found[name] = time.perf_counter() - began
    return found


def theirs(folder: str, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The same with transformers: prefill in one call, decoding, and another question on a copy of the KV cache."""
    from transformers import Qwen3NextForCausalLM

    model = Qwen3NextForCausalLM.from_pretrained(folder, dtype=options["dtype"])
    model(ids[:, :192], use_cache=True, logits_to_keep=1)
    with peak_memory() as peak:
        began = time.perf_counter()
        past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        prefill = time.perf_counter() - began
    found: dict[str, Any] = {"prefill": prefill, "peak": peak.nbytes}
    new = ids[:, : options["decode"]]
    found["decode"] = _times(lambda x: model(x, past_key_values=past, use_cache=True, logits_to_keep=1), new)
    return found


def _times(step: Any, ids: torch.Tensor) -> list[float]:
    return [seconds_of(partial(step, token)) for token in ids.split(1, dim=1)]


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """The measurement that runs in a separate process."""
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vocab = q.ModelConfig.load(job["folder"]).vocab_size
    ids = torch.randint(vocab, (1, job["length"]), generator=torch.Generator().manual_seed(job["options"]["seed"]))
    side = {"ours": ours, "theirs": theirs}[job["side"]]
    with torch.no_grad():
        return side(job["folder"], ids, job["options"])


def measure(options: Options) -> list[dict[str, Any]]:
    """Rows for all lengths and sides; shows progress."""
    lengths = [parse_tokens(text) for text in (("1k", "4k") if options.quick else options.lengths)]
    alone = [] if options.quick else [parse_tokens(text) for text in options.ours_alone]
    jobs = [(n, side) for n in lengths for side in ("ours", "theirs")] + [(n, "ours") for n in alone]
    rows: dict[int, dict[str, Any]] = {n: {"tokens": n} for n, _ in jobs}
    given_up: set[str] = set()
    torch.manual_seed(options.seed)
    make = q.presets.ALL.get(options.preset)
    if make is None:
        raise ValueError(f"There is no preset {options.preset!r}: choose {', '.join(q.presets.ALL)}.")
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        longest = max(rows) + 4096
        q.Qwen3Next(make(mtp_num_hidden_layers=0, max_position_embeddings=longest)).save_pretrained(f"{folder}/model")
        task = progress.add_task("measuring", total=sum(n for n, _ in jobs))
        for n, side in jobs:
            progress.update(task, description=f"{side}, {n:,} tokens")
            if side not in given_up:
                job = {"folder": f"{folder}/model", "side": side, "length": n, "options": asdict(options) | {"out": ""}}
                rows[n][side] = in_own_process("recipes.long_context", job, options.most_seconds)
                if "failed" in rows[n][side]:
                    given_up.add(side)
            progress.advance(task, n)
    return list(rows.values())


Show = Callable[[Any], str]
SECTIONS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "prefill": {
        "tokens/s": lambda row: _of(row, "ours", "prefill", lambda s: f"{row['tokens'] / s:,.0f}"),
        "transformers": lambda row: _of(row, "theirs", "prefill", lambda s: f"{row['tokens'] / s:,.0f}"),
        "ratio": lambda row: _ratio(row, "prefill"),
        "peak memory": lambda row: _of(row, "ours", "peak", binary),
        "transformers\u200b": lambda row: _of(row, "theirs", "peak", binary),
        "cache": lambda row: _of(row, "ours", "held", binary),
        "by the formula": lambda row: _of(row, "ours", "formula", binary),
    },
    "after it": {
        "decode, ms": lambda row: _of(row, "ours", "decode", lambda s: f"{1e3 * median(s):.2f}"),
        "transformers": lambda row: _of(row, "theirs", "decode", lambda s: f"{1e3 * median(s):.2f}"),
        "ratio": lambda row: _ratio(row, "decode"),
        "reading the cache, ms": lambda row: _of(row, "ours", "reading", lambda s: f"{1e3 * s:.2f}"),
        "the prompt again, ms": lambda row: _of(row, "ours", "again", lambda s: f"{1e3 * s:.1f}"),
        "cold / again": lambda row: _of(row, "ours", "again", lambda s: f"{row['ours']['prefill'] / s:,.0f}"),
        "another question, ms": lambda row: _of(row, "ours", "question", lambda s: f"{1e3 * s:.0f}"),
    },
}


def _of(row: dict[str, Any], side: str, key: str, show: Show) -> str:
    found = row.get(side, {})
    return show(found[key]) if key in found else found.get("failed", "-")


def _ratio(row: dict[str, Any], key: str) -> str:
    if any(key not in row.get(side, {}) for side in ("ours", "theirs")):
        return "-"
    a, b = (median(x) if isinstance(x := row[side][key], list) else x for side in ("ours", "theirs"))
    return f"**{b / a:.2f}**"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw speed and memory against context length."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for side, label, colour in (("ours", "qwen3next", "C0"), ("theirs", "transformers", "C1")):
        kept = [row for row in rows if "prefill" in row.get(side, {})]
        x = [row["tokens"] for row in kept]
        axes[0].plot(x, [n / row[side]["prefill"] for n, row in zip(x, kept, strict=True)], "o-", c=colour, label=label)
        axes[1].plot(x, [row[side]["peak"] / 2**20 for row in kept], "o-", c=colour, label=label)
        axes[2].plot(x, [1e3 * median(row[side]["decode"]) for row in kept], "o-", c=colour, label=label)
    mine = [row for row in rows if "formula" in row.get("ours", {})]
    x = [row["tokens"] for row in mine]
    axes[1].plot(
        x, [row["ours"]["formula"] / 2**20 for row in mine], "k:", label="keys, values and state, by the formula"
    )
    for axis, title in zip(
        axes, ("prefill, tokens a second", "peak memory of a prefill, MiB", "ms a decoded token"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
        axis.set_xticks(x, [f"{n // 1024}k" for n in x], minor=False)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    write_figure(figure, path)
    plt.close(figure)


def main(options: Options) -> list[dict[str, Any]]:
    """Measure, print the table, write the files."""
    rows, where = measure(options), machine()
    lines = [f"Preset {options.preset}, {options.dtype}. " + "; ".join(f"{k}: {v}" for k, v in where.items())]
    for name, columns in SECTIONS.items():
        shown, heads = Table(title=name), [f"{name}: tokens", *columns]
        cells = [[f"{row['tokens']:,}", *(of(row) for of in columns.values())] for row in rows]
        for head in ("tokens", *columns):
            shown.add_column(head, justify="right")
        for row in cells:
            shown.add_row(*(cell.strip("*") for cell in row))
        show(shown)
        lines += ["", *(f"| {' | '.join(row)} |" for row in (heads, ["--:"] * len(heads), *cells))]
    print("; ".join(where.values()))
    if options.out is not None:
        content = {"options": asdict(options) | {"out": str(options.out)}, **where, "rows": rows}
        write_results(options.out, content, "\n".join(lines) + "\n")
        draw(rows, options.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(worker(json.load(sys.stdin))))
    else:
        main(tyro.cli(Options, description=__doc__))
