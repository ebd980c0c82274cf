"""Write the last checkpoint of a run of `recipes.titan` as a model folder in the released layout.

    python -m recipes.titan_export runs/big --to exported/big --dtype bfloat16

One process reads one tensor at a time, so memory need not hold the model. The run may go on meanwhile.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from recipes.pretrain import exit_status
from recipes.scaling.checkpoints import export, newest
from recipes.training.tokenizer import load_tokenizer, save_tokenizer


@dataclass(frozen=True)
class Options:
    """Export a run.

    Attributes:
        run: the run's folder.
        to: the folder to write; default RUN/model, or RUN/model-ema with --average.
        dtype: of linear maps and embeddings; norms, A_log and dt_bias keep fp32, as all tensors do with "stored".
        average: write the average of the weights, of a run with --ema.
    """

    run: Annotated[Path, tyro.conf.Positional]
    to: Path | None = None
    average: bool = False
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        options = tyro.cli(Options, args=args, prog="python -m recipes.titan_export")
        step = newest(options.run).name
        folder = options.to or options.run / ("model-ema" if options.average else "model")
        dtype = None if options.dtype == "stored" else getattr(torch, options.dtype)
        export(options.run, folder, dtype=dtype, average=options.average)
        save_tokenizer(load_tokenizer(options.run / "tokenizer"), folder)
        print(f"{step} is in {folder}.")

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
