"""`qwen3next verify`: check a checkpoint folder."""

import sys

from qwen3next.checkpoints.verify import verify as verify_folder
from qwen3next.commands.common import Folder
from qwen3next.files.sizes import binary


def verify(folder: Folder, values: bool = False, quiet: bool = False) -> int:
    """Check a checkpoint folder against its config.json without loading it; print all problems.

    Exit status: 0 if it is valid, 1 if not.

    $ qwen3next verify DIR
    $ qwen3next verify DIR --values      # also reads all weights: NaN, infinity, zeros

    Args:
        folder: checkpoint folder with config.json, *.safetensors and tokenizer.json, or a GGUF file.
        values: also read every tensor and report NaN, infinity and tensors that are all zero.
        quiet: print problems only, and no progress bar.
    """
    report = verify_folder(folder, values=values, progress=values and not quiet and sys.stderr.isatty())
    for problem in report.problems:
        print(f"problem: {problem}", flush=True)
    if not quiet:
        for notice in report.notices:
            print(f"note: {notice}", flush=True)
        if report.config is not None and not report.problems:
            mtp = "with MTP" if report.config.mtp_num_hidden_layers else "without MTP"
            size = f"{report.tensors} tensors, {binary(report.nbytes)}"
            kinds = "".join(f", {count} of them {name}" for name, count in report.formats.items())
            print(f"valid: {report.config.model_type}, {mtp}, {size}{kinds}", flush=True)
    return 1 if report.problems else 0
