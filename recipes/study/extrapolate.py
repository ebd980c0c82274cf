"""Extrapolate to longer windows: a short extension with a larger RoPE base, then YaRN, and the loss by position.

This follows the study at a small scale. The study goes from 4k to 32k with a base 100 times as large, then to 128k with
YaRN, and measures RULER. Here the measure is the loss of a token, in nats, by its position in the window.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qwen3next as q
from recipes.study.run import RESULT, Task, write_json
from recipes.study.text import HeldOut

LENGTHS = "lengths.json"
WINDOWS = 32  # held-out windows of the longest length


def extension_task(base: Task, *, folder: Path, longer: int, share: float, theta: float) -> Task:
    """The task that continues a finished run with windows `longer` times as long and a RoPE base times `theta`.

    Args:
        share: share of the finished run's steps.
    Raises: ValueError if that run is not finished or has diverged.
    """
    result = base.settings.out / RESULT
    found = json.loads(result.read_bytes()) if result.is_file() else None
    if found is None or found["diverged"] is not None:
        reason = "is not finished" if found is None else "diverged"
        raise ValueError(f"{base.name} {reason}, so there is nothing to extend: run the lm experiment for it first.")
    s = base.settings
    window = s.window * longer
    config = q.ModelConfig.from_dict(found["config"])
    config = config.replace(rope_theta=config.rope_theta * theta, max_position_embeddings=window)
    settings = replace(
        s,
        window=window,
        batch_size=max(s.batch_size // longer, 1),
        steps=max(int(found["steps"] * share), 2),
        warmup=10,
        lr=s.lr / 4,
        out=folder / s.out.name,
    )
    return replace(
        base, kind="extension", config=config.to_dict(), settings=settings, begin=base.settings.out / "model", looks=16
    )


@torch.no_grad()
def losses_by_position(model: q.Qwen3Next, windows: Tensor, edges: Sequence[int]) -> list[float]:
    """Mean loss of the tokens at positions edges[i] to edges[i + 1] − 1; the first token of a window has none."""
    sums = torch.zeros(windows.shape[1], dtype=torch.float64)
    device = model.embed_tokens.weight.device
    for ids in windows.split(4):
        losses = torch.cat([chunk for _, chunk in model.token_losses(ids.to(device))], dim=1)
        sums[1:] += losses.double().sum(0).cpu()
    return [float(sums[a:b].sum() / (len(windows) * (b - a))) for a, b in pairwise(edges)]


def measure_lengths(task: Task, bos: int, *, yarn: int) -> dict[str, Any]:
    """Losses by position up to `yarn` times the extended length, with YaRN of that factor and without; saved in a file.

    Positions beyond the extended length are measured without YaRN too, to show the loss that YaRN avoids.
    """
    path = task.settings.out / LENGTHS
    if path.is_file():
        return json.loads(path.read_bytes())
    assert task.text is not None
    model = q.load(task.settings.out / "model")
    trained = task.settings.window
    longest = trained * yarn
    held_out = HeldOut(task.text / "data", longest, bos, looks=WINDOWS)
    edges = [1, trained // 4, trained // 2, trained]
    while edges[-1] < longest:
        edges.append(min(edges[-1] * 2, longest))
    found: dict[str, Any] = {"edges": edges, "trained": trained, "yarn_factor": yarn}
    model.config = model.config.replace(max_position_embeddings=longest)  # avoids the warning: it is intended
    found["plain"] = losses_by_position(model, held_out.some, edges)
    model.config = model.config.replace(max_position_embeddings=trained)
    model.extend_context(float(yarn))
    found["yarn"] = losses_by_position(model, held_out.some, edges)
    write_json(path, found)
    return found


def yarn_cost(lengths: dict[str, Any]) -> float:
    """Increase of the loss by YaRN just below the extended length, in nats per token."""
    place = lengths["edges"][1:].index(lengths["trained"])
    return lengths["yarn"][place] - lengths["plain"][place]


def rise(lengths: dict[str, Any]) -> float:
    """Loss beyond the extended length with YaRN minus the loss just below it without YaRN, in nats per token."""
    ends = lengths["edges"][1:]
    below = lengths["plain"][ends.index(lengths["trained"])]
    beyond = [x for end, x in zip(ends, lengths["yarn"], strict=True) if end > lengths["trained"]]
    return sum(beyond) / len(beyond) - below
