"""`qwen3next convert`: rewrite a checkpoint in another layout or dtype."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen3next.checkpoints.convert import convert as convert_folder
from qwen3next.commands.common import Dtype, Folder
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
    quiet: bool = False,
) -> None:
    """Rewrite a checkpoint: experts fused or single, another dtype, FP8 to bf16, with or without MTP and vision tower.

    One tensor is in memory at a time. OUT is written atomically and may be DIR itself. Sidecar files, such as the
    tokenizer and the chat template, are copied.

    $ qwen3next convert Qwen3.5-35B-A3B-FP8 Qwen3.5-35B-A3B-bf16
    $ qwen3next convert DIR OUT --experts single --dtype bfloat16
    $ qwen3next convert DIR OUT --drop-mtp --drop-vision

    Args:
        source: checkpoint folder with config.json and *.safetensors.
        target: folder to write or replace.
        experts: fused (two tensors per layer), single (three tensors per expert) or keep.
        dtype: auto keeps the dtype of each tensor and dequantises FP8; A_log, dt_bias and norms always keep theirs.
        drop_mtp: leave out the MTP layer.
        drop_vision: leave out the vision tower, so that a text model remains.
        shard_gb: largest size of a file, in 10^9 bytes.
        quiet: show no progress bar.
    """
    config = convert_folder(
        source,
        target,
        experts=None if experts == "keep" else experts,
        dtype=dtype,
        mtp=not drop_mtp,
        vision=not drop_vision,
        max_shard_bytes=int(shard_gb * 10**9),
        progress=not quiet and sys.stderr.isatty(),
    )
    if not quiet:
        files = sorted(target.glob("*.safetensors"))
        size = binary(sum(file.stat().st_size for file in files))
        kind = config.wrapper_config.get("model_type", config.model_type)
        print(f"{target}: {kind}, {size} in {len(files)} file{'s' * (len(files) > 1)}", file=sys.stderr)
