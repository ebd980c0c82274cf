"""How fast is it beside transformers, on the same weights, in the same run?

    python -m recipes.benchmark            prefill, decode and a training step, fp32, about two minutes on 2 cores
    python -m recipes.benchmark --quick    shorter lengths, about one minute

Repetitions are interleaved (ours, theirs, ours, …), so that a machine that slows down slows both; each row gives the
median of the pairwise ratios and the spread. The logits of both are compared before anything is timed.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import qwen3next as q
from recipes.measuring import machine, synchronize, write_results


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        preset: size of the model (random weights).
        prefill: tokens of the prompts.
        decode_after: tokens of context before the decoded ones.
        decode: tokens decoded in one repetition.
        train_batch, train_length: sequences and tokens of a training step.
        repetitions: of each measurement, after one that warms up.
        device: "cpu", "cuda" or "auto".
        dtype: of weights and arithmetic.
        seed: of weights and tokens.
        out: a .json to write, and beside it a .md; none if left out.
        quick: shorter lengths and three repetitions.
    """

    preset: str = "medium"
    prefill: tuple[int, ...] = (512, 2048)
    decode_after: int = 1024
    decode: int = 16
    train_batch: int = 2
    train_length: int = 512
    repetitions: int = 5
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    out: Path | None = None
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One comparison. Times are medians of seconds; the ratio is theirs / ours, median and range over the pairs."""

    what: str
    tokens: int
    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float


def compare(what: str, tokens: int, ours: Callable[[], None], theirs: Callable[[], None], repetitions: int) -> Row:
    """Time two functions that do the same work, in turn."""

    def seconds(run: Callable[[], None]) -> float:
        begin = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - begin

    seconds(ours), seconds(theirs)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repetitions)]
    ratios = [b / a for a, b in pairs]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(what, tokens, a, b, statistics.median(ratios), min(ratios), max(ratios))


def models(options: Options) -> tuple[q.Qwen3Next, torch.nn.Module, torch.device]:
    """The same random weights in both implementations, checked for equal logits.

    Raises: RuntimeError where they disagree.
    """
    from transformers import Qwen3NextForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    make = q.presets.ALL.get(options.preset)
    if make is None:
        raise ValueError(f"There is no preset {options.preset!r}: choose {', '.join(q.presets.ALL)}.")
    # transformers has no MTP, so neither side gets one.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        q.Qwen3Next(make(mtp_num_hidden_layers=0)).save_pretrained(Path(folder) / "model")
        ours = q.load(Path(folder) / "model", dtype=options.dtype, device=options.device)
        device = ours.embed_tokens.weight.device
        theirs = Qwen3NextForCausalLM.from_pretrained(Path(folder) / "model", dtype=options.dtype)
        theirs.to(device)  # type: ignore[arg-type]
    ids = torch.randint(ours.vocab_size, (1, 100), device=device)
    with torch.no_grad():
        apart = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    if apart > (1e-3 if options.dtype == "float32" else 1.0):
        raise RuntimeError(f"The two models disagree by {apart:.1e} on the same weights: nothing to compare.")
    return ours, theirs, device


def measure(options: Options) -> list[Row]:
    """All rows, with progress."""
    ours, theirs, device = models(options)
    lengths = (512,) if options.quick else options.prefill
    repetitions = 3 if options.quick else options.repetitions
    generator = torch.Generator().manual_seed(options.seed)
    rows = []

    def draw(b: int, t: int) -> torch.Tensor:
        return torch.randint(ours.vocab_size, (b, t), generator=generator).to(device)

    def prefill(ids: torch.Tensor) -> Row:
        t = ids.shape[1]

        @torch.no_grad()
        def a() -> None:
            ours(ids, cache=ours.new_cache(max_len=t), logits_to_keep=1)

        @torch.no_grad()
        def b() -> None:
            theirs(ids, use_cache=True, logits_to_keep=1)

        return compare(f"prefill {t}", t, a, b, repetitions)

    def decode() -> Row:
        # Both contexts grow from repetition to repetition, by the same tokens.
        before = 256 if options.quick else options.decode_after
        ids, new = draw(1, before), draw(1, options.decode)

        def steps(step: Callable[[torch.Tensor], object]) -> None:
            for i in range(options.decode):
                step(new[:, i : i + 1])

        with torch.no_grad():
            cache = ours.new_cache(max_len=before + (repetitions + 1) * options.decode)
            ours(ids, cache=cache)
            past = theirs(ids, use_cache=True).past_key_values

        @torch.no_grad()
        def a() -> None:
            steps(lambda x: ours(x, cache=cache, logits_to_keep=1))

        @torch.no_grad()
        def b() -> None:
            steps(lambda x: theirs(x, past_key_values=past, use_cache=True))

        return compare(f"decode after {before}", options.decode, a, b, repetitions)

    def train() -> Row:
        ids = draw(options.train_batch, 256 if options.quick else options.train_length)

        def a() -> None:
            ours.zero_grad()
            ours.loss(ids).lm.backward()

        def b() -> None:
            theirs.zero_grad()
            theirs(ids, labels=ids).loss.backward()

        return compare(f"train {ids.shape[0]} x {ids.shape[1]}", ids.numel(), a, b, repetitions)

    jobs = [*(lambda t=t: prefill(draw(1, t)) for t in lengths), decode, train]
    with Progress(console=Console(stderr=True)) as progress:
        for job in progress.track(jobs, description="timing"):
            rows.append(job())
    return rows


def as_markdown(rows: list[Row], options: Options, where: dict[str, str]) -> str:
    """The table with its conditions."""
    lines = [
        f"Preset {options.preset}, {options.dtype}, without MTP. " + "; ".join(f"{k}: {v}" for k, v in where.items())
    ]
    lines += ["", "| what | qwen3next tok/s | transformers tok/s | ratio | range |", "|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r.what} | {r.tokens / r.ours:.1f} | {r.tokens / r.theirs:.1f} | **{r.ratio:.2f}** "
            f"| {r.lowest:.2f} to {r.highest:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(options: Options) -> list[Row]:
    """Measure, print the table, write the files."""
    rows, where = measure(options), machine()
    table = Table("what", "qwen3next tok/s", "transformers tok/s", "ratio", "range", title="; ".join(where.values()))
    for r in rows:
        speeds = (f"{r.tokens / seconds:.1f}" for seconds in (r.ours, r.theirs))
        table.add_row(r.what, *speeds, f"{r.ratio:.2f}", f"{r.lowest:.2f} to {r.highest:.2f}")
    Console().print(table)
    if options.out is not None:
        content = {"options": asdict(options) | {"out": str(options.out)}, **where, "rows": [asdict(r) for r in rows]}
        write_results(options.out, content, as_markdown(rows, options, where))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
