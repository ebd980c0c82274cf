"""`qwen3next diff`: compare two checkpoints tensor by tensor."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qwen3next.checkpoints.diff import diff as diff_folders
from qwen3next.checkpoints.diff import diff_config
from qwen3next.checkpoints.reader import open_checkpoint
from qwen3next.commands.common import Folder, Quiet, Verbose, print_json, show

Second = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR2")]
# Keys that describe how the files were written, not the model.
ABOUT_FILES = ("torch_dtype", "dtype", "quantization_config", "transformers_version", "architectures")


def diff(
    a: Folder, b: Second, limit: int = 40, quiet: Quiet = False, json: bool = False, verbose: Verbose = False
) -> int:
    """Compare two checkpoints tensor by tensor, in any layout: fused or single experts, FP8, name prefixes.

    Exit status: 0 if all tensors are equal, 1 if not.

    $ qwen3next diff DIR DIR2
    $ qwen3next diff base finetuned --limit 0      # all of them

    Args:
        a: checkpoint A.
        b: checkpoint B.
        limit: most differences to show, largest first; 0 shows all.
        quiet: show no progress bar.
        json: print one JSON object, with every difference.
        verbose: describe both checkpoints on stderr, and print the traceback of an error.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    if verbose:
        for name, reader in (("A", left), ("B", right)):
            formats = ", ".join(f"{count} {kind}" for kind, count in reader.formats.items()) or "none quantised"
            print(f"{name}: {reader.folder}, {len(reader.wanted)} tensors, {formats}", file=sys.stderr)
    changed = {key: pair for key, pair in diff_config(left, right).items() if key not in ABOUT_FILES}
    if not json:
        for key, (x, y) in changed.items():
            print(f"config.json: {key} is {x} in A, {y} in B", flush=True)
    found = list(diff_folders(left, right, progress=not quiet and sys.stderr.isatty()))
    found.sort(key=lambda d: -d.relative)
    if json:
        print_json(
            {"equal": not found, "tensors": len(left.wanted), "config": changed, "differences": [*map(asdict, found)]}
        )
        return 1 if found else 0
    if not found:
        print(f"equal: {len(left.wanted)} tensors", flush=True)
        return 0
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("tensor, as named in A", "differs in", "largest |A - B|", "|A - B| / |A|", ""):
        table.add_column(header, justify="right" if "|" in header else "left")
    for d in found[: limit or None]:
        numbers = (f"{d.largest:.3g}", f"{d.relative:.3g}") if d.what == "values" else ("", "")
        table.add_row(d.name, d.what, *numbers, d.detail)
    show(table)
    left_out = f", {len(found) - limit} not shown" if limit and len(found) > limit else ""
    print(f"{len(found)} tensors differ (A has {len(left.wanted)}){left_out}", flush=True)
    return 1
