"""Steps of several caches at once, each with as many new tokens as it brings."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from layers.dispatch.attached import attached
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.plan import MOST_TOKENS, Plan, available_plan
from qwen3next.decoding.states import CacheStep
from qwen3next.inputs import as_ids, check_vocabulary
from qwen3next.model import Qwen3Next as Reference

Rows = list[tuple[Tensor, HybridCache]]  # ids (b, t), and the cache that takes them


def step_many(model: Any, tokens: Sequence[Tensor], caches: Sequence[HybridCache], *, all_logits: bool) -> Tensor:
    """`model.step_many`: one compiled call for the rows that it can run, then the others one after the other."""
    rows = checked_rows(model, tokens, caches)
    plan = None if looked_at(model) else available_plan(model)
    compiled = [
        n for n, (ids, cache) in enumerate(rows) if plan and ids.shape[1] <= MOST_TOKENS and plan.supports(cache)
    ]
    if plan and len(compiled) == len(rows):
        return together(model, plan, rows, all_logits=all_logits)
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for _, cache in rows:
            stack.enter_context(cache.unchanged_on_failure())
        if plan and compiled:
            logits = together(model, plan, [rows[n] for n in compiled], all_logits=all_logits)
            counts = [rows[n][0].shape[1] if all_logits else 1 for n in compiled]
            found |= zip(compiled, logits.split(counts), strict=True)
        for n, (ids, cache) in enumerate(rows):
            if n not in found:
                found[n] = _by_itself(model, ids, cache, all_logits=all_logits)
    return torch.cat([found[n] for n in range(len(rows))])


def checked_rows(model: Any, tokens: Sequence[Tensor], caches: Sequence[HybridCache]) -> Rows:
    """Each row's ids (1, t) in int64, with its cache. Changes nothing.

    Raises: ValueError, which names the row, for anything that `model.step_many` refuses.
    """
    if len(tokens) != len(caches) or not caches:
        raise ValueError(f"{len(tokens)} rows of tokens and {len(caches)} caches are given: give each row its cache.")
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError("One cache is given for two rows: fork it, so that each row has its own.")
    found = []
    for number, (row, cache) in enumerate(zip(tokens, caches, strict=True)):
        try:
            ids = as_ids(row, "tokens", ndim=1)[None]
            check_vocabulary(ids, model.vocab_size)
            if cache.batch != 1:
                raise ValueError(f"The cache has {cache.batch} rows, but one is wanted: take it with cache.select.")
            cache.check_fits(ids, None, model)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from None
        found.append((ids, cache))
    return found


def looked_at(model: Any) -> bool:
    """Whether the model's own forward must be called: a subclass replaced it, or a hook is attached to the model."""
    return type(model).forward is not Reference.forward or attached(model)


def together(model: Any, plan: Plan, rows: Rows, *, all_logits: bool) -> Tensor:
    """Logits (n, vocab) of one compiled call."""
    with ExitStack() as stack:
        calls = [stack.enter_context(cache.extend(ids, None, model)) for ids, cache in rows]
        steps = [CacheStep(cache, call.segments, ids) for (ids, cache), call in zip(rows, calls, strict=True)]
        for step in steps:
            model._warn_of_length(step.segments)
        hidden, logits = plan.run(model, steps, all_logits=all_logits)
        for call, step, own in zip(calls, steps, hidden, strict=True):
            model._complete(call, step.ids, own, compiled=True)
    return logits


def _by_itself(model: Any, ids: Tensor, cache: HybridCache, *, all_logits: bool) -> Tensor:
    """Logits (n, vocab) of one row. On the CPU a few tokens run one by one, so that their number leaves no trace."""
    t = ids.shape[1]
    if t == 1 or (t <= MOST_TOKENS and ids.device.type == "cpu"):
        logits = torch.cat([model.step(token, cache) for token in ids.split(1, dim=1)])
        return logits if all_logits else logits[-1:]
    return model(ids, cache=cache, logits_to_keep=0 if all_logits else 1).logits[0]
