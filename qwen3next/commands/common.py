"""Helpers of the commands: argument types, opening a checkpoint, printing tables."""

import json as json_text
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from tokenizers import Tokenizer

from qwen3next import presets
from qwen3next.api import Qwen3Next, load
from qwen3next.checkpoints.gguf.header import read_files
from qwen3next.checkpoints.gguf.tokenizer import read_tokenizer
from qwen3next.checkpoints.reader import GGUF, CheckpointReader
from qwen3next.config import ModelConfig
from qwen3next.explain import explain
from qwen3next.files.sizes import binary
from qwen3next.inputs import as_device

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ExpertPlace = Literal["memory", "disk", "int8"]
KeptWeights = Literal["dequantised", "stored", "int8", "int4"]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Quiet = Annotated[bool, tyro.conf.arg(aliases=["-q"])]
Verbose = Annotated[bool, tyro.conf.arg(aliases=["-v"])]
Target = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR|PRESET")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        device: auto (CUDA if available), cpu, cuda, cuda:1, ...
        dtype: auto keeps the stored dtype of each tensor.
        experts: memory; int8 (one byte per weight); disk (read from the files when tokens need them).
        weights: dequantised; stored (in the groups of 4 or 8 bits of the folder, if any); int8; int4.
        expert_cache: memory for experts read from the files.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    experts: ExpertPlace = "memory"
    weights: KeptWeights = "dequantised"
    expert_cache: str = "2GiB"


LOADING = Loading()
LoadingOptions = Annotated[Loading, tyro.conf.arg(name="")]  # its fields are options of the command


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder or GGUF file, without truncation and padding.

    Raises: ValueError if it is missing or invalid.
    """
    if folder.suffix == GGUF and folder.is_file():
        try:
            found = read_tokenizer(read_files(folder).metadata)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if found is None:
            raise ValueError(f"{folder} holds no tokenizer: convert the model again, with its tokenizer.")
        return found
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with config.json, safetensors and tokenizer.json.")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: copy the model's tokenizer.json there.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}).") from error
    # Some files still have the truncation and padding of training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def open_model(folder: Path, loading: Loading, *, quiet: bool, verbose: bool) -> Qwen3Next:
    """The folder's model, loaded with a progress bar on a terminal; `verbose` tells on stderr what it will run.

    Raises: ValueError for an unavailable device.
    """
    target = as_device(loading.device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device: choose --device cpu.")
    progress = not quiet and sys.stderr.isatty()
    began = time.perf_counter()
    model = load(
        folder,
        dtype=loading.dtype,
        device=target,
        progress=progress,
        experts=loading.experts,
        weights=loading.weights,
        expert_cache=loading.expert_cache,
    )
    if verbose:
        size = binary(sum(p.nbytes for p in model.parameters()))
        print(f"{folder}: {size} of weights loaded in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for row in explain(model):
            print(f"{row.operation}: {row.runs} ({row.why})", file=sys.stderr)
    return model


def say_reads(model: Qwen3Next) -> None:
    """Print to stderr how much was read from the files so far, if experts are on disk."""
    if model.expert_cache is not None:
        report = model.expert_cache.report
        print(
            f"experts: {report.hit_rate:.0%} found in the cache, {binary(int(report.bytes_per_token))} read "
            f"per token, {binary(model.expert_cache.nbytes)} of cache in use",
            file=sys.stderr,
        )


def config_of(target: str) -> ModelConfig:
    """The configuration of a folder, a config.json, a GGUF file or a preset. Raises: ValueError for anything else."""
    if Path(target).exists() and target not in presets.ALL:
        gguf = target.endswith(GGUF) and Path(target).is_file()
        return CheckpointReader(target).config if gguf else ModelConfig.load(target)
    try:
        return presets.named(target)()
    except ValueError as error:
        raise ValueError(f"{target!r} is neither a folder nor a config.json. {error}") from None


def show(renderable: object) -> None:
    """Print with rich through plain stdout, so that a closed pipe raises here and not inside rich."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with console.capture() as capture:
        console.print(renderable)
    print(capture.get(), end="", flush=True)


def print_json(value: Any) -> None:
    """Print one JSON object on a line; numbers that JSON has not (NaN, infinity) become null."""
    print(json_text.dumps(_finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
