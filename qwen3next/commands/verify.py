"""`qwen3next verify`: check a checkpoint folder."""

import sys

from qwen3next.checkpoints.verify import verify as verify_folder
from qwen3next.commands.common import Folder, Quiet, Verbose, print_json
from qwen3next.files.sizes import binary


def verify(
    folder: Folder, values: bool = False, quiet: Quiet = False, json: bool = False, verbose: Verbose = False
) -> int:
    """Check a checkpoint folder against its config.json without loading it; print all problems.

    Exit status: 0 if it is valid, 1 if not.

    $ qwen3next verify DIR
    $ qwen3next verify DIR --values      # also reads all weights: NaN, infinity, zeros

    Args:
        folder: checkpoint folder with config.json, *.safetensors and tokenizer.json, or a GGUF file.
        values: also read every tensor and report NaN, infinity and tensors that are all zero.
        quiet: print problems only, and no progress bar.
        json: print one JSON object.
        verbose: name every file on stderr, and print the traceback of an error.
    """
    report = verify_folder(folder, values=values, progress=values and not quiet and sys.stderr.isatty())
    if verbose:
        for file in sorted(report.folder.glob("*.safetensors")) if report.folder.is_dir() else [report.folder]:
            print(f"{file}: {binary(file.stat().st_size)}", file=sys.stderr)
    if json:
        config = report.config
        print_json(
            {
                "valid": not report.problems,
                "problems": report.problems,
                "notes": report.notices,
                "model_type": None if config is None else config.model_type,
                "mtp": None if config is None else bool(config.mtp_num_hidden_layers),
                "tensors": report.tensors,
                "bytes": report.nbytes,
                "formats": report.formats,
            }
        )
        return 1 if report.problems else 0
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
