"""`qwen3next verify`: is a checkpoint folder in order?"""

import sys

from qwen3next.checkpoints.verify import verify as verify_folder
from qwen3next.commands.common import Folder
from qwen3next.files.sizes import binary


def verify(folder: Folder, values: bool = False, quiet: bool = False) -> int:
    """Check a checkpoint folder against its config.json without loading it; say everything that is wrong.

    Ends with status 0 where it is in order, 1 where it is not.

    $ qwen3next verify DIR
    $ qwen3next verify DIR --values      # also reads all weights: NaN, infinity, zeros

    Args:
        folder: checkpoint: config.json, *.safetensors, tokenizer.json.
        values: read every tensor too and name those that hold NaN or infinity, or nothing but zeros.
        quiet: print problems only, and no bar.
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
            print(f"in order: {report.config.model_type}, {mtp}, {size}", flush=True)
    return 1 if report.problems else 0
