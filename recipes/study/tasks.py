"""The runs of an experiment, and the check that they fit into memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

import qwen3next as q
from qwen3next.study import count
from recipes.study.arms import arm_config, arms_of
from recipes.study.run import Task
from recipes.study.sizes import Size
from recipes.training.settings import Settings, pick_device

BYTES_A_PARAMETER = 16  # weights, gradients and AdamW's two moments, in fp32


@dataclass(frozen=True)
class Which:
    """The selected runs of an experiment; empty tuples select those of the preset.

    Attributes:
        data: source of the text; None without text.
        text: folder with the tokenizer and shards.
    """

    preset: str
    kind: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    precisions: tuple[str, ...]
    out: Path
    device: str
    data: str | None
    text: Path | None
    compiled: bool = False


def tasks_of(which: Which, size: Size, *, vocabulary: int) -> list[Task]:
    """The selected runs, seed by seed, so that an interrupted experiment has complete seeds of all arms.

    Raises: ValueError for an unknown arm, rate or precision, or an arm for which the baseline is too small; "all" skips
        such arms.
    """
    configs = _configs(which.arms or size.arms, size, size.baseline(vocabulary))
    ladder = which.kind == "ladder"
    rates = which.rates or (size.rates if ladder else (1.0,))
    precisions = which.precisions or (size.precisions if ladder else size.precisions[:1])
    wrong = [repr(p) for p in precisions if p not in ("fp32", "bf16")] + [f"{r:g}" for r in rates if not r > 0]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a precision or rate: choose fp32 or bf16, and rates above 0.")
    found = []
    for seed, (arm, config) in product(which.seeds or size.seeds, configs.items()):
        for precision, rate in product(precisions, rates):
            name = f"{arm}-{seed}" + (f"-{precision}-x{rate:g}" if ladder else "")
            settings = Settings(
                data=(which.data or "bigram-backcopy",),
                tokenizer=size.tokens if which.text else "none",
                preset=f"{which.preset} {which.kind} {arm}" + " compiled" * which.compiled,
                steps=size.steps,
                batch_size=size.batch_size,
                window=size.window,
                accumulate=size.accumulate,
                balance="micro",
                lr=size.lr * rate,
                warmup=size.warmup,
                schedule="cosine" if size.schedule == "cosine" else "wsd",
                clip=size.clip,
                seed=seed,
                out=which.out / which.kind / name,
                device=which.device,
                precision="bf16" if precision == "bf16" else "fp32",
                tensorboard=False,
            )
            found.append(
                Task(
                    which.kind,
                    arm,
                    seed,
                    config.to_dict(),
                    settings,
                    which.text,
                    rate,
                    size.looks,
                    compiled=which.compiled,
                )
            )
    return found


def _configs(arms: tuple[str, ...], size: Size, baseline: q.ModelConfig) -> dict[str, q.ModelConfig]:
    named, found = arms not in ((), ("all",)), {}
    for arm in arms if named else arms_of(baseline):
        try:
            found[arm] = arm_config(arm, baseline, equal=size.equal, multiple_of=size.multiple_of)
        except ValueError as error:
            if named:
                raise ValueError(f"{arm}: {error}") from None
    return found


def plan_line(tasks: Sequence[Task], jobs: int) -> str:
    """A summary of the runs."""
    sizes = [count(q.ModelConfig.from_dict(task.config)) for task in tasks]
    s = tasks[0].settings
    tokens = (s.steps or 0) * s.batch_size * s.accumulate * s.window
    arms = ", ".join(dict.fromkeys(task.arm for task in tasks))
    return (
        f"{tasks[0].kind}: {len(tasks)} runs ({arms}), {min(sizes) / 1e6:.3f}M to {max(sizes) / 1e6:.3f}M parameters, "
        f"up to {s.steps:,} steps or {tokens / 1e6:.1f}M tokens each, {jobs} at a time."
    )


def refuse_what_does_not_fit(tasks: Sequence[Task], jobs: int, device: str) -> None:
    """Raises: ValueError if weights, gradients and optimizer moments exceed the memory."""
    need = jobs * BYTES_A_PARAMETER * max(count(q.ModelConfig.from_dict(task.config)) for task in tasks)
    if pick_device(device).type == "cuda":
        have = torch.cuda.get_device_properties(0).total_memory
    else:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise ValueError(
            f"Training needs {need / 2**30:.0f} GiB for weights, gradients and moments, and there are "
            f"{have / 2**30:.0f}: choose a smaller --preset or fewer --jobs; --dry-run shows what would run."
        )
