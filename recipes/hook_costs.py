"""Measure the cost of hooks, compared with other tools on the same weights, in one process.

    python -m recipes.hook_costs              # T = 2048, a small hybrid, about five minutes
    python -m recipes.hook_costs --tokens 256 --repeats 2

Rows: a plain forward, idle hook points, every activation kept, states at 64 positions, the implicit attention of a
Gated DeltaNet layer. If they are installed, TransformerLens' bridge and nnsight, both around transformers' model, are
measured on the same tasks as far as they support them. Each figure is the median over interleaved repeats; `x plain` is
the ratio to the plain forward of the same library.
"""

import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

import qwen3next as q
from qwen3next.commands.common import show

Row = tuple[str, str, Callable[[], object]]
LAYER = 1  # a Gated DeltaNet layer


def ours(model: q.Qwen3Next, ids: torch.Tensor) -> list[Row]:
    t = ids.shape[1]
    places = list(range(t // 64 - 1, t, t // 64))[:64]

    def states() -> object:
        with model.materialize(state={LAYER: places}):
            return model.run_with_cache(ids, names_filter=f"blocks.{LAYER}.linear_attn.hook_state")

    def matrix() -> object:
        with model.materialize(pattern=[LAYER]):
            return model.run_with_cache(ids, names_filter=f"blocks.{LAYER}.linear_attn.hook_pattern")

    one = f"blocks.{LAYER}.linear_attn.hook_beta"
    return [
        ("qwen3next", "plain forward, all points idle", lambda: model(ids)),
        ("qwen3next", "one point kept", lambda: model.run_with_cache(ids, names_filter=one)),
        ("qwen3next", "every point kept that fires", lambda: model.run_with_cache(ids)),
        ("qwen3next", f"one layer's state at {len(places)} positions", states),
        ("qwen3next", "one layer's implicit attention, exact", matrix),
    ]


def bridge(hf: Any, folder: str, ids: torch.Tensor) -> list[Row]:
    """TransformerLens. Its Gated DeltaNet hooks fire only with use_cache=False; its matrix omits the delta term."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu", dtype=torch.float32)
    mixer = model.blocks[LAYER].linear_attn

    def kept() -> Any:
        return model.run_with_cache(ids, use_cache=False)[1]

    points = [f"blocks.{LAYER}.linear_attn.hook_{name}" for name in ("q", "k", "v", "beta", "log_decay")]

    def some() -> Any:
        return model.run_with_cache(ids, use_cache=False, names_filter=points)[1]

    name = "TransformerLens bridge"
    return [
        (name, "plain forward, all points idle", lambda: model(ids, use_cache=False)),
        (name, "every point kept that fires", kept),
        (name, "one layer's states, all positions (token loop)", lambda: mixer.compute_ssm_state(some(), LAYER)),
        (name, "one layer's matrix, without erasing", lambda: mixer.compute_effective_attention(some(), LAYER)),
    ]


def traced(hf: Any, ids: torch.Tensor) -> list[Row]:
    """nnsight: keeps the output of every block; inner tensors would need references to lines of source code."""
    from nnsight import NNsight

    model = NNsight(hf)

    def blocks() -> object:
        with model.trace(ids):
            saved = [].save()  # type: ignore[attr-defined]  # nnsight gives objects this method inside a trace
            for layer in model.model.layers:
                saved.append(layer.output)
        return saved

    def nothing() -> object:
        with model.trace(ids):
            logits = model.lm_head.output.save()
        return logits

    return [("nnsight", "logits kept", nothing), ("nnsight", "every block's output kept", blocks)]


def main(tokens: int = 2048, repeats: int = 5, threads: int = 2, seed: int = 0, out: Path | None = None) -> None:
    """Measure the cost of hooks.

    Args:
        tokens: length of the text, in tokens.
        repeats: repetitions of each row.
        threads: threads of torch.
        seed: random seed of weights and text.
        out: JSON file for the figures.
    """
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    config = q.presets.small(vocab_size=512, mtp_num_hidden_layers=0, tie_word_embeddings=False)
    ids = torch.randint(0, 512, (1, tokens))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        q.Qwen3Next(config).save_pretrained(folder)
        model = q.load(folder).eval()
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rows = [*ours(model, ids), ("transformers", "plain forward", lambda: hf(ids, use_cache=False))]
        if importlib.util.find_spec("nnsight"):
            rows += traced(hf, ids)
        if importlib.util.find_spec("transformer_lens"):  # last, because it wraps the given model
            rows += bridge(hf, folder, ids)
        times: list[list[float]] = [[] for _ in rows]
        for turn in range(repeats + 1):
            for i, (_, _, call) in enumerate(rows):
                began = time.perf_counter()
                call()
                if turn:  # the first round is a warm-up
                    times[i].append(time.perf_counter() - began)
    report(rows, [median(x) for x in times], [max(x) - min(x) for x in times], tokens, out)


def report(rows: list[Row], medians: list[float], spreads: list[float], tokens: int, out: Path | None) -> None:
    plain = {"qwen3next": medians[0]}
    plain |= {name: m for (name, what, _), m in zip(rows, medians, strict=True) if what.startswith("plain")}
    plain.setdefault("nnsight", plain["transformers"])
    table = Table(
        box=SIMPLE_HEAD, title=f"{tokens} tokens, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for header in ("", "", "ms", "spread", "x plain", "x our plain"):
        table.add_column(header, justify="right" if header else "left")
    found = []
    for (name, what, _), m, spread in zip(rows, medians, spreads, strict=True):
        ratios = m / plain[name], m / medians[0]
        table.add_row(name, what, f"{m * 1e3:.0f}", f"{spread * 1e3:.0f}", *(f"{r:.2f}" for r in ratios))
        found.append({"library": name, "row": what, "seconds": m, "spread": spread, "over_plain": ratios[0]})
    show(table)
    if out is not None:
        out.write_text(json.dumps({"tokens": tokens, "torch": torch.__version__, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
