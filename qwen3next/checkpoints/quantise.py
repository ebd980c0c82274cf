"""Write a checkpoint as a folder of 4- or 8-bit weights."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3next.checkpoints.calibration import Rounded, round_model
from qwen3next.checkpoints.load import load_as
from qwen3next.checkpoints.save_groups import groups_of, save_groups

BITS = ("int8", "int4")


def quantise_folder(
    kind: Callable[..., Any],
    source: str | Path,
    target: str | Path,
    weights: str,
    *,
    ids: Sequence[Tensor] = (),
    group_size: int | None = None,
    progress: bool = False,
    done: Callable[[Rounded], None] = lambda _: None,
    compare: Callable[[str, Any], None] = lambda _name, _model: None,
) -> list[Rounded]:
    """Round the checkpoint in `source`, a folder or a GGUF file, and write it as the folder `target`.

    Linear maps and experts are rounded; embedding, head, router, gates, norms and convolution stay as stored. What the
    folder already stores in groups of 4 or 8 bits stays too, if nothing is calibrated. The format is
    compressed-tensors' pack-quantized.

    Args:
        kind: the class of the model.
        weights: "int8" or "int4".
        ids: rows of tokens (1, t) to calibrate with: then the whole model is in memory, in the dtype it is stored in.
            None rounds to the nearest while reading, with the rounded model in memory.
        group_size: as `round_model`; needs a whole model too, unless None.
        done: called with the result of each parameter.
        compare: called with "stored" and the model before rounding, if that is in memory, then with "rounded".
    Raises: ValueError for an invalid source or choice, before anything is written.
    """
    if weights not in BITS:
        raise ValueError(f"weights must be int8 or int4, got {weights!r}.")
    options: dict[str, Any] = {
        "dtype": "auto",
        "device": "cpu",
        "progress": progress,
        "experts": "memory",
        "expert_cache": 0,
    }
    whole = bool(ids) or group_size is not None
    model = load_as(kind, source, weights="dequantised" if whole else weights, head=False, **options)
    if whole:
        compare("stored", model)
        found = round_model(model, weights, ids=ids, group_size=group_size, done=done)
    else:
        groups = dict(groups_of(model))
        found = [Rounded(n, groups[n].bits, groups[n].nbytes, x.error) for n, x in model.rounding.items()]
        for one in found:
            done(one)
    compare("rounded", model)
    save_groups(model, target, progress=progress)
    return found


def rows_of(ids: Tensor, length: int, most: int) -> list[Tensor]:
    """At most `most` rows (1, length) of the tokens of a text (n), spread over it evenly; a short text is one row."""
    count = len(ids) // length
    if count == 0:
        return [ids[None]] if len(ids) > 1 else []
    chosen = sorted({round(i * (count - 1) / max(min(most, count) - 1, 1)) for i in range(min(most, count))})
    return [ids[None, i * length : (i + 1) * length] for i in chosen]


@torch.no_grad()
def bits_per_byte(model: Any, ids: Tensor, nbytes: int) -> float:
    """The model's loss on the tokens (n) of a text of so many bytes, as bits a byte; the first token is given."""
    total = sum(float(losses.double().sum()) for _, losses in model.token_losses(ids[None]))
    return total / math.log(2) / nbytes
