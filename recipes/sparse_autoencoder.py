"""Train a sparse autoencoder on the output of a Gated DeltaNet layer: minutes on two cores.

    make demo                              # trains a small model
    python -m recipes.sparse_autoencoder   # trains on its block 1

Writes report.md, features.png, the autoencoder and the activations into runs/sparse_autoencoder.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from layers.segments import Segments
from qwen3next.interp import ActivationRows, stream_activations
from qwen3next.interp.points import identity
from recipes.pretrain import exit_status
from recipes.training.data import PackedWindows
from recipes.training.dictionary import Scores, SparseAutoencoder, Step, fit, measure, principal_components
from recipes.training.shards import build_shards
from recipes.training.tokenizer import byte_tokenizer, load_tokenizer, write_atomically


@dataclass(frozen=True)
class Settings:
    """Train a sparse autoencoder on activations of a model, and report which tokens its features fire on.

    Attributes:
        model: folder of a checkpoint; if `make demo` has not run, the default is a small random model.
        data: "stdlib", a folder, a glob or a file; held-out documents are for measuring, the others for training.
        layer: number of the block; Gated DeltaNet or softmax attention.
        point: name of the hook point within the block.
        features: number of features in the dictionary.
        k: active codes per token; 0 uses an L1 penalty instead.
        l1: weight of the L1 penalty.
        tokens: tokens to train on; a tenth as many are for measuring.
        epochs: passes over the training tokens.
        out: folder for all output; existing activations are reused.
    """

    model: Path = Path("demo/run/model")
    data: str = "stdlib"
    layer: int = 1
    point: str = "hook_attn_out"
    features: int = 1024
    k: int = 16
    l1: float = 2e-3
    tokens: int = 200_000
    epochs: int = 8
    batch: int = 1024
    lr: float = 2e-3
    window: int = 256
    seed: int = 0
    out: Path = Path("runs/sparse_autoencoder")


def run(s: Settings, *, console: Console | None = None) -> Scores:
    """Write activations, train, measure, report. Raises: ValueError for settings that contradict each other."""
    console = Console() if console is None else console
    torch.manual_seed(s.seed)
    if s.model.exists() or s.model != Settings().model:
        model, tokenizer, what = q.load(s.model), load_tokenizer(s.model), f"the model in {s.model}"
    else:
        model, tokenizer, what = q.Qwen3Next(q.presets.tiny()).eval(), byte_tokenizer(), "a RANDOM model (`make demo`)"
    name = model.match_hooks(f"blocks.{s.layer}.{s.point}")[0]
    console.print(f"{name} of {what}", markup=False, highlight=False, soft_wrap=True)

    build_shards(s.data, tokenizer, s.out / "text", seed=s.seed, exact=False)  # bytes are not measured
    # The folder name contains every setting that determines the activations, so other settings never reuse old rows.
    decides = (identity(model), s.data, name, s.tokens, s.window, s.seed)
    folder = s.out / hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
    text = {"train": s.tokens, "val": max(s.tokens // 10, 1)}
    for split, tokens in text.items():
        windows = PackedWindows(s.out / "text", split, window=s.window, seed=s.seed)
        tokens = min(tokens, len(windows) * s.window)  # each window is used once
        steps = stream_activations(
            model,
            batches(windows),
            folder / split,
            name,
            rows=tokens,
            rows_per_shard=16_384,
            shuffle_shards=4 if split == "train" else 0,
            seed=s.seed,
        )
        total = -(-tokens // (8 * s.window))
        for _ in track(steps, f"{tokens:,} {split} rows", total=total, console=console, transient=True):
            pass
    train, held_out = ActivationRows(folder / "train"), ActivationRows(folder / "val")

    width = train.read(name, 0, 1).flatten(1).shape[1]
    sae, curve = SparseAutoencoder(width, s.features, k=s.k), []
    planned = max(s.epochs * len(train) // s.batch, 1)
    fitting = fit(sae, train, name, steps=planned, batch=s.batch, lr=s.lr, l1=s.l1, seed=s.seed)
    for step in track(fitting, "fitting", total=planned, console=console, transient=True):
        curve.append(step)
    scores = measure(sae, held_out, name)
    bar_count = max(round(scores.l0), 1)
    bar = principal_components(train, name, held_out, min(bar_count, width))
    losses = spliced(model, name, sae, PackedWindows(s.out / "text", "val", window=s.window, seed=s.seed))

    report = write_report(what, name, s, scores, bar, bar_count, losses, held_out, tokenizer)
    write_atomically(s.out / "report.md", report.encode())
    write_atomically(s.out / "autoencoder.safetensors", save(sae.state_dict()))
    draw(s.out / "features.png", curve, scores, bar, f"{name} of {what}")
    console.print(report.split("## Features")[0], markup=False, highlight=False, soft_wrap=True)
    console.print(f"In {s.out}: report.md with the tokens of features, features.png, autoencoder.safetensors.")
    return scores


def batches(windows: PackedWindows, *, size: int = 8) -> Iterator[tuple[Tensor, Segments]]:
    """Every window once, in its random order, with documents as separate sequences."""
    for first in range(0, len(windows), size):
        batch = windows.batch(first, min(size, len(windows) - first))
        yield batch.input_ids, Segments.from_document_ids(batch.document_ids)


@torch.no_grad()
def spliced(
    model: q.Qwen3Next, name: str, sae: SparseAutoencoder, windows: PackedWindows, *, count: int = 16
) -> tuple[float, float, float]:
    """Loss on held-out windows, in nats: unchanged, with x replaced by x̂ at the hook point, and with x set to zero."""
    batch = windows.batch(0, min(count, len(windows)))
    segments = Segments.from_document_ids(batch.document_ids)

    def loss(replace: bool, keep: float) -> float:
        def patch(x: Tensor, _: object) -> Tensor | None:
            flat = x.flatten(2).flatten(0, 1).float()
            return (keep * sae.decode(sae.encode(flat))).view(x.shape).to(x) if replace else None

        with model.hooks([(name, patch)]):
            return float(model.loss(batch.input_ids, segments=segments).lm)

    return loss(False, 1.0), loss(True, 1.0), loss(True, 0.0)


def write_report(
    what: str,
    name: str,
    s: Settings,
    scores: Scores,
    bar: float,
    bar_count: int,
    losses: tuple[float, float, float],
    rows: ActivationRows,
    tokenizer: Tokenizer,
) -> str:
    """The text of report.md: the figures, then randomly sampled features with the tokens they fire on most."""
    clean, with_sae, without = losses
    dead = float((scores.density == 0).float().mean())
    recovered = (without - with_sae) / (without - clean) if abs(without - clean) > 1e-9 else float("nan")
    lines = [
        f"# A sparse autoencoder for {name}",
        "",
        f"- Model: {what}; {s.tokens:,} tokens to train on, {len(rows):,} held out to measure; seed {s.seed}",
        f"- Dictionary: {s.features} features, " + (f"k = {s.k}" if s.k else f"L1 weight {s.l1}"),
        f"- Variance explained: {scores.explained:.1%} (as many principal components, {bar_count}: {bar:.1%})",
        f"- Codes a token (L0): {scores.l0:.1f}",
        f"- Features that never fire on held-out text: {dead:.1%}",
        f"- Loss in nats a token: {clean:.3f} unchanged, {with_sae:.3f} through the autoencoder, {without:.3f} with "
        f"zeros: {recovered:.1%} recovered",
        "",
        "## Features",
        "",
        "A random sample of the features that fire on at most a twentieth of the tokens. The feature fires on the "
        "token in ⟦ ⟧, with the code on the left.",
        "",
    ]
    tokens, positions = rows.read("token", 0, len(rows)), rows.read("position", 0, len(rows))
    usual = ((scores.density <= 0.05) & (scores.best[:, 4] > 0)).nonzero().flatten()
    drawn = usual[torch.randperm(len(usual), generator=torch.Generator().manual_seed(s.seed))[:12]]
    for feature in drawn.tolist():
        lines += [f"### {feature}: fires on {scores.density[feature]:.2%} of tokens", "", "~~~~text"]
        for code, row in zip(scores.best[feature, :5].tolist(), scores.rows[feature, :5].tolist(), strict=True):
            begin = row - min(8, int(positions[row]))
            before, after = (tokenizer.decode(tokens[a:b].tolist()) for a, b in ((begin, row), (row + 1, row + 5)))
            here = tokenizer.decode([int(tokens[row])], skip_special_tokens=False)
            lines.append(f"{code:6.2f}  {before}⟦{here}⟧{after}".replace("\n", "⏎"))
        lines += ["~~~~", ""]
    return "\n".join(lines)


def draw(path: Path, curve: list[Step], scores: Scores, bar: float, title: str) -> None:
    """Draw the variance explained during training, the dead features, and how often features fire."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    steps = [x.step for x in curve]
    left.plot(steps, [x.explained for x in curve], color="#1f4e9c", linewidth=1, label="variance explained, each batch")
    left.plot(steps, [x.dead for x in curve], color="#c2410c", linewidth=1.2, label="features silent for 100 steps")
    left.axhline(scores.explained, color="#15803d", linestyle="--", label=f"held out: {scores.explained:.3f}")
    left.axhline(bar, color="#777777", linestyle=":", label=f"as many principal components: {bar:.3f}")
    left.set(xlabel="step", ylabel="share", title="training", ylim=(0, 1))
    alive = scores.density[scores.density > 0]
    right.hist(alive.log10().numpy(), bins=40, color="#1f4e9c")
    silent = len(scores.density) - len(alive)
    right.set(
        xlabel="log₁₀ of the share of held-out tokens on which it fires",
        ylabel="features",
        title=f"{len(alive)} features fire, {silent} never do",
    )
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(tyro.cli(Settings, args=args, prog="python -m recipes.sparse_autoencoder")))


if __name__ == "__main__":
    sys.exit(main())
