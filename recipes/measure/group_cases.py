"""Cases of `recipes.benchmark` for weights in groups: the same work with int8 or int4 weights and with plain ones."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import qwen3next as q
from layers.quantised.held import HoldsGroups
from recipes.measure.benchmark_cases import Case, Job, Models, Run

BITS = ("int8", "int4")


def jobs(models: Models, folder: Path, dtype: str, *, after: int, steps: int, length: int) -> Iterator[Job]:
    """Decoding steps and a prefill for each kind of weights, on the CPU, whose kernels they are for."""
    if models.device.type != "cpu":
        return
    for weights in BITS:
        yield Job(
            f"{weights} weights, decode after {after}", partial(decode, models, folder, dtype, weights, after, steps)
        )
    for weights in BITS:
        yield Job(f"{weights} weights, prefill of {length}", partial(prefill, models, folder, dtype, weights, length))


def _loaded(models: Models, folder: Path, dtype: str, weights: str) -> tuple[q.Qwen3Next, str]:
    model = q.load(folder, dtype=dtype, device=models.device, weights=weights)
    held = [w for module in model.modules() if isinstance(module, HoldsGroups) for w in module.all_held()]
    size = sum(x.nbytes for x in {*model.parameters(), *model.buffers()})
    plain = sum(x.nbytes for x in models.ours.parameters())
    return model, f"{len(held)} weights in groups; {size / 2**20:.0f} MiB in place of {plain / 2**20:.0f}"


def decode(models: Models, folder: Path, dtype: str, weights: str, after: int, steps: int) -> Case:
    """Steps of one token after a context."""
    small, runs = _loaded(models, folder, dtype, weights)
    ids, new = models.draw(1, after), models.draw(1, steps)
    found = []
    for model in (small, models.ours):
        cache = model.new_cache(1, max_len=after + 100 * steps)
        with torch.no_grad():
            model(ids, cache=cache, logits_to_keep=1)
        found.append(partial(_steps, model, cache, new))
    sides: dict[str, Run] = {"qwen3next": found[0], f"qwen3next, {dtype}": found[1]}
    return Case(f"{weights} weights, decode after {after}", steps, sides=sides, runs=runs)


def _steps(model: q.Qwen3Next, cache: q.HybridCache, new: torch.Tensor) -> None:
    for token in new.split(1, dim=1):
        model.step(token, cache)


def prefill(models: Models, folder: Path, dtype: str, weights: str, length: int) -> Case:
    """A prompt, with logits of its last token."""
    small, runs = _loaded(models, folder, dtype, weights)
    ids = models.draw(1, length)

    @torch.no_grad()
    def run(model: q.Qwen3Next) -> None:
        model(ids, cache=model.new_cache(1, max_len=length), logits_to_keep=1)

    sides: dict[str, Run] = {"qwen3next": partial(run, small), f"qwen3next, {dtype}": partial(run, models.ours)}
    return Case(f"{weights} weights, prefill of {length}", length, sides=sides, runs=runs)
