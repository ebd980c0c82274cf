"""`qwen3next quantize`: write a checkpoint with weights of 4 or 8 bits."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from qwen3next.api import Qwen3Next
from qwen3next.checkpoints.calibration import Rounded
from qwen3next.checkpoints.quantise import bits_per_byte, quantise_folder, rows_of
from qwen3next.checkpoints.reader import local_folder
from qwen3next.commands.common import Folder, Quiet, Verbose, open_tokenizer, print_json, show
from qwen3next.files.sizes import binary

Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def quantize(
    source: Folder,
    target: Out,
    weights: Literal["int8", "int4"] = "int4",
    calibrate: Path | None = None,
    evaluate: Path | None = None,
    rows: int = 32,
    length: int = 512,
    group_size: int | None = None,
    quiet: Quiet = False,
    json: bool = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint with weights of 4 or 8 bits, as compressed-tensors that transformers and vLLM read.

    Linear maps and experts are rounded. Embedding, head, router, gates, norms and convolution stay as stored. With
    --calibrate, the rounding takes into account what each matrix multiplies on that text, block by block; the whole
    model is in memory for it. Without, weights are rounded to the nearest code while they are read.

    $ qwen3next quantize DIR OUT --weights int4 --calibrate book.txt --evaluate other.txt
    $ qwen3next quantize DIR OUT --weights int8

    Args:
        source: checkpoint folder with config.json and *.safetensors, or a GGUF file.
        target: folder to write or replace.
        weights: int8 (a scale a row) or int4 (a scale for 32 inputs).
        calibrate: text file whose tokens the rounding is calibrated with.
        evaluate: text file on which the loss, in bits a byte, is printed before and after.
        rows: how many pieces of the text are used, spread over it.
        length: tokens of a piece.
        group_size: inputs that share a scale, such as 64 or 128; 0 is a whole row.
        quiet: print nothing.
        json: print one JSON object: every matrix with its error, and the losses of --evaluate.
        verbose: name every file on stderr, and print the traceback of an error.
    """
    if rows < 1 or length < 2:
        raise ValueError("--rows must be at least 1 and --length at least 2.")
    folder = local_folder(source)
    ids = rows_of(_tokens(folder, calibrate)[0], length, rows) if calibrate is not None else []
    if calibrate is not None and not ids:
        raise ValueError(f"{calibrate} has fewer than two tokens: give a longer text.")
    text = None if evaluate is None else _tokens(folder, evaluate)
    if text is not None and len(text[0]) < 2:
        raise ValueError(f"{evaluate} has fewer than two tokens: give a longer text.")
    losses: dict[str, float] = {}

    def compare(name: str, model: Qwen3Next) -> None:
        if text is not None:
            losses[name] = bits_per_byte(model, *text)

    def done(one: Rounded) -> None:
        if not quiet and sys.stderr.isatty():
            print(f"\r\x1b[K{one.name}", end="", file=sys.stderr, flush=True)

    progress = not quiet and sys.stderr.isatty()
    found = quantise_folder(
        Qwen3Next,
        source,
        target,
        weights,
        ids=ids,
        group_size=group_size,
        progress=progress,
        done=done,
        compare=compare,
    )
    files = {str(file): file.stat().st_size for file in sorted(target.glob("*.safetensors"))}
    if progress:
        print("\r\x1b[K", end="", file=sys.stderr)
    if verbose:
        for name, size in files.items():
            print(f"{name}: {binary(size)}", file=sys.stderr)
    if json:
        print_json(
            {
                "written": str(target),
                "files": files,
                "matrices": [asdict(one) for one in found],
                "bits_per_byte": losses,
            }
        )
        return
    if quiet:
        return
    show(report(found))
    for name, loss in losses.items():
        print(f"{name}: {loss:.4f} bits a byte on {evaluate}")
    print(f"{target}: {binary(sum(files.values()))}", file=sys.stderr)


def _tokens(folder: Path, text: Path) -> tuple[Tensor, int]:
    """The tokens (n) of a text file, and its bytes. Raises: ValueError for a file that is no text."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{text} cannot be read as text ({error}).") from error
    return torch.tensor(open_tokenizer(folder).encode(content).ids, dtype=torch.long), len(content.encode())


def report(found: list[Rounded]) -> Table:
    """The errors by kind of matrix: the mean over the layers, and the largest."""
    kinds: dict[str, list[Rounded]] = {}
    for one in found:
        kinds.setdefault(".".join(p for p in one.name.split(".") if not p.isdigit()), []).append(one)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("weights", "matrices", "bits", "size", "error", "largest", "of outputs", "rounded to the nearest"):
        table.add_column(header, justify="left" if header == "weights" else "right")
    for kind, ones in kinds.items():
        errors = [one.error for one in ones]
        seen: list[Any] = [one for one in ones if one.output_error is not None]
        outputs = [sum(getattr(one, name) for one in seen) / len(seen) for name in ("output_error", "nearest") if seen]
        told = [f"{x:.2%}" for x in outputs] or ["-", "-"]
        size = binary(sum(one.nbytes for one in ones))
        mean = sum(errors) / len(errors)
        table.add_row(kind, str(len(ones)), str(ones[0].bits), size, f"{mean:.2%}", f"{max(errors):.2%}", *told)
    return table
