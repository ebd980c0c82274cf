"""`qwen3next convert`: rewrite a checkpoint in another layout or dtype."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen3next.api import Qwen3Next
from qwen3next.checkpoints.convert import convert as convert_folder
from qwen3next.checkpoints.gguf.write import to_gguf
from qwen3next.checkpoints.quantise import quantise_folder
from qwen3next.commands.common import Dtype, Folder, Quiet, Verbose, print_json
from qwen3next.files.sizes import binary

Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def convert(
    source: Folder,
    target: Out,
    experts: Literal["keep", "fused", "single"] = "keep",
    dtype: Dtype = "auto",
    drop_mtp: bool = False,
    drop_vision: bool = False,
    shard_gb: float = 5.0,
    to: Literal["folder", "gguf", "bf16", "int8", "int4"] = "folder",
    gguf_type: Literal["bf16", "f16", "f32", "q8_0"] = "bf16",
    quiet: Quiet = False,
    json: bool = False,
    verbose: Verbose = False,
) -> None:
    """Rewrite a checkpoint: experts fused or single, another dtype, dequantised, with or without MTP and vision tower.

    One tensor is in memory at a time. OUT is written atomically and may be DIR itself. Sidecar files, such as the
    tokenizer and the chat template, are copied.

    $ qwen3next convert Qwen3.5-35B-A3B-FP8 Qwen3.5-35B-A3B-bf16
    $ qwen3next convert DIR OUT --experts single --dtype bfloat16
    $ qwen3next convert DIR OUT --drop-mtp --drop-vision
    $ qwen3next convert model-Q4_K_M.gguf OUT
    $ qwen3next convert DIR model.gguf --to gguf --gguf-type q8_0
    $ qwen3next convert DIR OUT --to int4

    Args:
        source: checkpoint folder with config.json and *.safetensors, or a GGUF file.
        target: folder, or GGUF file, to write or replace.
        experts: fused (two tensors per layer), single (three tensors per expert) or keep.
        dtype: auto keeps the dtype of each tensor and dequantises; A_log, dt_bias and norms always keep theirs.
        drop_mtp: leave out the MTP layer.
        drop_vision: leave out the vision tower, so that a text model remains.
        shard_gb: largest size of a file, in 10^9 bytes.
        to: folder; gguf for one file that llama.cpp opens, to which of the options only --drop-mtp applies; bf16 for a
            folder with --dtype bfloat16; int8 or int4 for a folder of such weights, rounded to the nearest, to which no
            other option applies (`qwen3next quantize` has more).
        gguf_type: type of the matrices in a GGUF file.
        quiet: show no progress bar.
        json: print one JSON object about what was written.
        verbose: name every file on stderr, and print the traceback of an error.
    """
    progress = not quiet and sys.stderr.isatty()
    if to == "gguf":
        config = to_gguf(source, target, kind=gguf_type, mtp=not drop_mtp, progress=progress)
        _report(target, config.model_type, [target], quiet=quiet, json=json, verbose=verbose)
        return
    if to in ("int8", "int4"):
        if experts != "keep" or dtype != "auto" or drop_mtp or drop_vision or shard_gb != 5.0:
            raise ValueError(f"--to {to} takes no other option: convert first, then quantise the result.")
        quantise_folder(Qwen3Next, source, target, to, progress=progress)
        _report(target, f"{to} weights", sorted(target.glob("*.safetensors")), quiet=quiet, json=json, verbose=verbose)
        return
    if to == "bf16":
        if dtype not in ("auto", "bfloat16"):
            raise ValueError(f"--to bf16 and --dtype {dtype} contradict each other: leave one out.")
        dtype = "bfloat16"
    config = convert_folder(
        source,
        target,
        experts=None if experts == "keep" else experts,
        dtype=dtype,
        mtp=not drop_mtp,
        vision=not drop_vision,
        max_shard_bytes=int(shard_gb * 10**9),
        progress=progress,
    )
    kind = str(config.wrapper_config.get("model_type", config.model_type))
    _report(target, kind, sorted(target.glob("*.safetensors")), quiet=quiet, json=json, verbose=verbose)


def _report(target: Path, kind: str, files: list[Path], *, quiet: bool, json: bool, verbose: bool) -> None:
    """Say what was written."""
    sizes: dict[str, int] = {str(file): file.stat().st_size for file in files}
    if verbose:
        for name, nbytes in sizes.items():
            print(f"{name}: {binary(nbytes)}", file=sys.stderr)
    if json:
        print_json({"written": str(target), "model_type": kind, "files": sizes})
    elif not quiet:
        size, number = binary(sum(sizes.values())), f"{len(files)} file{'s' * (len(files) > 1)}"
        print(f"{target}: {kind}, {size} in {number}", file=sys.stderr)
