"""Train a tiny Qwen3-Next on this machine in minutes, and inspect what it learnt: `make demo`.

    python -m recipes.demo

Trains on the source of Python's standard library, so nothing is downloaded. Writes loss.png, samples.md, report.md and
the run itself into demo/. An interrupted run is resumed; after a finished run a new one starts.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from layers.segments import Segments
from recipes.pretrain import LOOK, Result, Stopped, exit_status, train
from recipes.training.data import Baseline, ValidationBatches
from recipes.training.report import Row, clock, compressed, read_metrics
from recipes.training.settings import Settings, comparable, read_baselines, recorded
from recipes.training.tokenizer import load_tokenizer, write_atomically


@dataclass(frozen=True)
class Demo:
    """Train a tiny Qwen3-Next on this machine in minutes, and inspect what it learnt.

    Attributes:
        minutes: time for training and measuring; reading the text and continuing the prompts take extra time.
        out: folder for the pictures, the samples and the run.
        data: "stdlib", a folder, a glob or a file.
        preset: name of a preset in qwen3next.presets, or a config.json.
        tokenizer: "bytes", "bpe:N" or a tokenizer.json.
        prompts: number of held-out documents to continue.
    """

    minutes: float = 4.0
    out: Path = Path("demo")
    data: str = "stdlib"
    preset: str = "tiny"
    tokenizer: str = "bpe:4096"
    prompts: int = 3


@dataclass(frozen=True)
class Sample:
    """The beginning of a held-out document, and its continuations: the true one, a greedy and a sampled one."""

    document: str
    prompt: str
    truth: str
    greedy: str
    drawn: str


def run(demo: Demo, *, console: Console | None = None) -> Result:
    """Train, measure, continue prompts, write demo/. Raises: what `recipes.pretrain.train` raises."""
    console = Console() if console is None else console
    folder = demo.out / "run"
    settings = Settings(
        data=(demo.data,), tokenizer=demo.tokenizer, preset=demo.preset, minutes=demo.minutes, out=folder, eval_every=40
    )
    unfinished = (folder / "settings.json").exists() and not (folder / "result.json").exists()
    if unfinished and comparable(recorded(folder)) == comparable(settings):
        result = train(recorded(folder), console=console)
    else:
        if (folder / "settings.json").exists():  # delete only a folder that holds a run
            shutil.rmtree(folder)
        result = train(settings, console=console)

    model, tokenizer = q.load(folder / "model"), load_tokenizer(folder / "model")
    held_out = ValidationBatches(folder / "data", window=settings.window, batch_size=4)
    samples = continue_documents(model, tokenizer, held_out, count=demo.prompts)
    rows, part = read_metrics(folder), held_out.part(LOOK).documents
    baselines = read_baselines(folder)
    bars = compressed([baselines[i] for i in part])
    write_atomically(demo.out / "samples.md", write_samples(samples).encode())
    load = expert_load(model, held_out)
    report = write_report(settings, result, rows, baselines, bars, load)
    write_atomically(demo.out / "report.md", report.encode())
    shutil.copyfile(folder / "loss.png", demo.out / "loss.png")

    for sample in samples:
        console.rule(sample.document)
        console.print(f"[dim]{_escape(sample.prompt)}[/][bold green]{_escape(sample.greedy)}[/]", highlight=False)
    console.rule()
    console.print(
        f"In {demo.out}: loss.png, samples.md, report.md and run/model, in the released layout. What to try next:\n"
        f"  qwen3next generate {folder / 'model'} --temperature 0.6 "
        "--prompt $'class Reader:\\n    def __init__(self, '\n"
        f"  python -m recipes.pretrain --data YOUR_FOLDER --minutes 30 --out runs/mine\n"
        f"  tensorboard --logdir {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return result


def continue_documents(
    model: q.Qwen3Next, tokenizer: Tokenizer, held_out: ValidationBatches, *, count: int, context: int = 160
) -> list[Sample]:
    """Continue `count` held-out documents from their middle by 64 tokens, greedily and at temperature 0.8.

    Args:
        context: most tokens of the prompt, which is cut at the end of a line.
    """
    lengths = [int(held_out.starts[d + 1] - held_out.starts[d]) for d in held_out.documents]
    long_enough = [d for d in held_out.documents if lengths[d] > 2 * context + 128] or list(held_out.documents)
    chosen = [long_enough[i * len(long_enough) // count] for i in range(min(count, len(long_enough)))]
    samples = []
    for document in chosen:
        start, end = held_out.starts[document : document + 2].tolist()
        ids = held_out.tokens[start : end - 1].astype("int64").tolist()  # without <|endoftext|>
        middle = min(len(ids) // 2, max(len(ids) - 64, 1))
        prompt = ids[max(0, middle - context) : middle]
        while len(prompt) > context // 2 and "\n" not in tokenizer.decode(prompt[-1:]):
            prompt = prompt[:-1]
        rest = ids[max(0, middle - context) + len(prompt) :][:64]
        given = torch.tensor([prompt])
        greedy = q.generate(model, given, max_new_tokens=64)
        drawn = q.generate(model, given, max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0)
        texts = [tokenizer.decode(x) for x in (prompt, rest, _new(greedy, prompt), _new(drawn, prompt))]
        samples.append(Sample(held_out.meta.val_names[document], *texts))
    return samples


def _new(ids: Tensor, prompt: list[int]) -> list[int]:
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def expert_load(model: q.Qwen3Next, held_out: ValidationBatches) -> Tensor:
    """Expert load on part of the held-out text, (layers, e), as a multiple of the even share; MTP's layer is last."""
    shares, targets = [], []
    for batch in held_out.part(4096):
        losses = model.loss(batch.input_ids, segments=Segments.from_document_ids(batch.document_ids))
        assert losses.load is not None
        shares.append(losses.load * losses.targets)
        targets.append(losses.targets)
    return torch.stack(shares).sum(0) / sum(targets) * model.config.num_experts


def passed(rows: list[Row], bar: float) -> str:
    """The time of training after which the held-out bits per byte were below `bar`, in words."""
    below = [r["elapsed"] for r in rows if r.get("val_bits_per_byte", bar) < bar]
    return f"after {below[0] / 60:.1f} minutes" if below else "not within this run"


def machine() -> str:
    """Processor, cores, memory, versions and commit, as far as they can be read."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    commit = git.stdout.strip() or "unknown"
    return (
        f"{name}, {os.cpu_count()} CPUs ({torch.get_num_threads()} threads used){gpu}; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"
    )


def write_samples(samples: list[Sample]) -> str:
    """samples.md."""
    lines = ["# Continuations of held-out documents", ""]
    for sample in samples:
        lines += [f"## {sample.document}", ""]
        for title, text in (
            ("prompt", sample.prompt),
            ("what follows in truth", sample.truth),
            ("greedy", sample.greedy),
            ("drawn (temperature 0.8, top-p 0.95)", sample.drawn),
        ):
            lines += [f"{title[0].upper()}{title[1:]}:", "", "~~~~text", text.strip("\n"), "~~~~", ""]
    return "\n".join(lines)


def write_report(
    settings: Settings,
    result: Result,
    rows: list[Row],
    baselines: list[Baseline],
    bars: tuple[float, float],
    load: Tensor,
) -> str:
    """report.md.

    Args:
        bars: bits per byte of gzip and xz on the part of the held-out text that is measured during training.
        load: result of `expert_load`, (layers, e).
    """
    gzip, xz = bars
    lines = [
        "# Report",
        "",
        f"- Machine: {machine()}",
        f"- Model: preset {settings.preset}, {result.parameters:,} parameters, {result.precision}",
        f"- Settings: {', '.join(f'{name} {value}' for name, value in sorted(comparable(settings).items()))}",
        f"- Trained: {result.steps:,} steps, {result.tokens:,} tokens in {clock(result.seconds)} "
        f"({result.tokens_per_second:,.0f} tokens/s, validation included)",
        f"- Peak memory of the process: {result.peak_memory / 2**20:,.0f} MiB",
        f"- Passed gzip -9 {passed(rows, gzip)} ({gzip:.3f} on the part of the held-out text that is measured during "
        f"training), xz -9 {passed(rows, xz)} ({xz:.3f})",
        "",
        "## Held-out documents, in bits per byte",
        "",
        "Each document by itself: whole code lengths, the end mark included. Smaller is better.",
        "",
        "| document | bytes | model | gzip -9 | xz -9 |",
        "|---|--:|--:|--:|--:|",
    ]
    for d in result.documents:
        lines.append(f"| {d['name']} | {d['utf8_bytes']:,} | {d['model']:.3f} | {d['gzip']:.3f} | {d['xz']:.3f} |")
    size = sum(b.utf8_bytes for b in baselines)
    lines += [
        f"| **all** | **{size:,}** | **{result.bits_per_byte:.3f}** | **{result.gzip:.3f}** | **{result.xz:.3f}** |",
        "",
        "## Expert load",
        "",
        "Share of the choices that went to each expert, as a multiple of the even share.",
        "",
        "| layer | " + " | ".join(str(e) for e in range(load.shape[1])) + " |",
        "|---|" + "--:|" * load.shape[1],
    ]
    names = [*range(len(load) - 1), "MTP"]
    for name, shares in zip(names, load.tolist(), strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return "\n".join([*lines, ""])


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        try:
            run(tyro.cli(Demo, args=args, prog="python -m recipes.demo"))
        except Stopped as stopped:
            sentence = f"{stopped.args[0].split(' Go on')[0]} Run the demo again to go on."
            raise Stopped(stopped.signal, sentence) from None

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
