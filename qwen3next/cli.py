"""The `qwen3next` command: generate text, describe a model, ask which implementations run."""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from qwen3next import inspect, presets
from qwen3next.checkpoint import load
from qwen3next.config import ModelConfig
from qwen3next.explain import explain as explain_model
from qwen3next.generate import stream
from qwen3next.model import as_device, as_dtype
from qwen3next.text import TextStream

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Target = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR|PRESET")]

DESCRIPTION = f"""The Qwen3-Next architecture at the command line.

A checkpoint (DIR) is a folder with config.json, *.safetensors and tokenizer.json in the released layout.
A preset is a size without weights: {", ".join(presets.ALL)}.
`qwen3next COMMAND --help` explains a command's options."""


def generate(
    folder: Folder,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    stop_tokens: tuple[int, ...] = (),
    device: str = "auto",
    dtype: Dtype = "auto",
    quiet: bool = False,
) -> None:
    """Continue a prompt; the text appears as it is made, and the speed on stderr at the end.

    The prompt is continued as it stands: for a chat model, write its chat markup into it.

    $ qwen3next generate DIR --prompt "def fibonacci(n):"
    $ qwen3next generate DIR --file story.txt --temperature 0.8
    $ cat story.txt | qwen3next generate DIR --quiet > more.txt

    Args:
        folder: checkpoint: config.json, *.safetensors, tokenizer.json.
        prompt: text to continue. Without it and --file, stdin is read to its end.
        file: UTF-8 file whose text is continued.
        max_new_tokens: tokens to make at most.
        temperature: 0 takes the most likely token each time; larger is more varied.
        top_k: draw among so many most likely tokens; 0 means all.
        top_p: draw among the most likely tokens that together have this probability.
        seed: for a temperature above 0; the same seed gives the same text on one machine.
        stop: end before this string; may be repeated.
        stop_tokens: end after this token id, beside the model's end-of-text; may be repeated.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, ...
        dtype: auto keeps each tensor as stored.
        quiet: write nothing to stderr but errors.
    """
    text = _read_prompt(prompt, file)
    tokenizer = _tokenizer(folder)
    target = as_device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here: choose --device cpu.")
    model = load(folder, dtype=dtype, device=target, progress=not quiet and sys.stderr.isatty())
    ids = tokenizer.encode(text).ids
    began, first, made = time.perf_counter(), 0.0, 0
    output = TextStream(lambda tokens: tokenizer.decode(tokens), stop=stop)
    for token in stream(
        model,
        torch.tensor([ids], dtype=torch.long, device=target),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=(*model.stop_tokens, *stop_tokens),
        seed=seed,
    ):
        first, made = first or time.perf_counter(), made + 1
        print(output.push(int(token)), end="", flush=True)
        if output.stopped:
            break
    now = time.perf_counter()
    print(output.finish(), flush=True)
    if not quiet:
        # The first token belongs to the prompt's forward; the speed is that of the steps after it.
        rate = f", {(made - 1) / (now - first):.1f} tok/s" if made > 1 else ""
        weights = str(model.lm_head.weight.dtype).removeprefix("torch.")
        print(
            f"{len(ids)} prompt tokens in {first - began:.2f} s, {made} new in {now - began:.2f} s{rate} "
            f"({target}, {weights})",
            file=sys.stderr,
        )


def inspect_(target: Target, hooks: bool = False) -> None:
    """Describe a model: parameters, layers, shapes, bytes of context. Reads config.json only; takes seconds.

    The configuration of a released checkpoint does not say whether it has an MTP layer; one is counted.

    $ qwen3next inspect qwen3_next_80b_a3b
    $ qwen3next inspect DIR
    $ qwen3next inspect tiny --hooks | grep blocks.0

    Args:
        target: checkpoint folder, config.json, or name of a preset.
        hooks: print the names of the model's hook points instead, one a line.
    """
    config = _config(target)
    if hooks:
        print("\n".join(inspect.on_meta(config).hook_dict), flush=True)
    else:
        _show(inspect.describe(config))


def explain(target: Target, device: str = "auto", dtype: Dtype = "auto") -> None:
    """Say for each operation which implementation would run, why, and what would be faster.

    The answer is about this installation; the model is not loaded and needs no memory.

    $ qwen3next explain DIR
    $ qwen3next explain qwen3_next_80b_a3b --device cuda

    Args:
        target: checkpoint folder, config.json, or name of a preset.
        device: auto (CUDA where there is one), cpu, cuda, ...
        dtype: auto is what config.json names, else float32.
    """
    config = _config(target)
    named = config.extra.get("dtype") or config.extra.get("torch_dtype") or "float32"
    kind = as_dtype(str(named) if dtype == "auto" else dtype)
    where = as_device(device)
    rows = explain_model(inspect.on_meta(config), device=where, dtype=kind)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("operation", "runs", "why", "what would be faster"):
        table.add_column(header)
    for row in rows:
        table.add_row(row.operation, row.runs, row.why, row.faster)
    print(f"on {where}, in {str(kind).removeprefix('torch.')}:")
    _show(table)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or the program's. Returns the exit status.

    0 done, 2 for what the user can mend (a sentence on stderr), 130 after Ctrl-C, 141 after a closed pipe.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"qwen3next: {message}", file=sys.stderr)
            tyro.extras.subcommand_cli_from_dict(
                {"generate": generate, "inspect": inspect_, "explain": explain},
                prog="qwen3next",
                description=DESCRIPTION,
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.UseAppendAction),
            )
        return 0
    except BrokenPipeError:
        # Python flushes stdout once more at exit; without this it would complain about the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        # torch appends pages of native frames to some of its messages; the first line says what happened.
        sentence = (str(error) or repr(error)).splitlines()[0]
        print(f"qwen3next: {sentence}", file=sys.stderr)
        return 2


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("Both --prompt and --file are given: choose one.")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ValueError("There is no prompt: give --prompt or --file, or pipe text in.")
    try:
        text = prompt if prompt is not None else sys.stdin.read() if file is None else file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file or 'stdin'} is not UTF-8 text.") from None
    if not text:
        raise ValueError("The prompt is empty: there is nothing to continue.")
    return text


def _tokenizer(folder: Path) -> Tokenizer:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one that holds config.json, safetensors and tokenizer.json.")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: copy the tokenizer.json that the model was trained with there.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}).") from error


def _config(target: str) -> ModelConfig:
    if target in presets.ALL:
        return presets.ALL[target]()
    if not Path(target).exists():
        names = ", ".join(presets.ALL)
        raise ValueError(f"{target!r} is neither a folder or config.json here nor a preset ({names}).")
    return ModelConfig.load(target)


def _show(renderable: object) -> None:
    """Print through plain stdout, so that a closed pipe is met here and not inside rich."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with console.capture() as capture:
        console.print(renderable)
    print(capture.get(), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
