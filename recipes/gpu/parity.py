"""Every fast implementation against its definition, every registered check, and a whole model against the CPU."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qwen3next as q
from layers.dispatch.registry import checked_implementations
from layers.dispatch.self_check import checked
from layers.segments import Segments
from recipes.gpu.bench import Bench, Job, Row, build
from recipes.measure.gpu_parity import LENGTHS, comparisons

# Of a whole model's logits and gradients, which add up the rounding of eight layers; fp32 may have products in tf32.
BOUND = {torch.float32: 1e-2, torch.bfloat16: 0.1}


def jobs(bench: Bench) -> Iterator[Job]:
    lengths = (65,) if bench.quick else LENGTHS
    for dtype in BOUND:
        yield Job(f"model, {dtype}", partial(_model, bench, dtype))
    for operation, name in checked_implementations():
        yield Job(f"self-check: {operation} by {name}", partial(_self_check, bench, operation, name))
    for comparison in comparisons():
        yield Job(comparison.name, partial(comparison.rows, bench.device, lengths, quick=bench.quick))


def _self_check(bench: Bench, operation: str, name: str) -> Iterator[Row]:
    """The case that a kernel is registered with, as at its first use; without gradients."""
    for dtype in (torch.bfloat16, torch.float32):
        row = {"what": f"self-check: {operation} by {name}, {str(dtype).removeprefix('torch.')}"}
        if bench.device.type != "cuda":
            yield row | {"not run": "it is for CUDA"}
            continue
        wrong = checked(operation, name, bench.device, dtype, False)
        yield row | ({"within": True} if wrong is None else {"failed": wrong})


def _model(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    """Eight layers in the released order against fp64 on the CPU: logits, packed logits, a continuation, gradients.

    In bf16 every expert is chosen: else rounding would change the experts of some tokens, which hides smaller errors.
    """
    changes: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 4} if dtype == torch.bfloat16 else {}
    config = q.presets.small(mtp_num_hidden_layers=0, initializer_range=0.06, vocab_size=1000, **changes)
    there = build(config, torch.device("cpu"), bench.settings.seed, dtype)
    here = copy.deepcopy(there).to(bench.device)
    there = there.double()
    t = 70 if bench.quick else 300
    ids = torch.randint(1000, (2, t), generator=torch.Generator().manual_seed(bench.settings.seed))
    documents = (torch.arange(t) > t // 3).long().expand(2, t)
    what = f"model of 8 layers against fp64 on the CPU, {str(dtype).removeprefix('torch.')}"
    found, expected = (_results(model, ids, documents) for model in (here, there))
    for name, value in found.items():
        error = ((value - expected[name]).norm() / expected[name].norm()).item()
        yield {"what": f"{what}: {name}", "error": error, "within": error <= BOUND[dtype]}
    explained = ", ".join(f"{row.operation} {row.runs}" for row in q.explain(here))
    yield {"what": f"{what}: ran", "runs": explained}


def _results(model: q.Qwen3Next, ids: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """By name, in fp64 on the CPU."""
    ids, documents = ids.to(model.device), documents.to(model.device)
    cache, half = model.new_cache(len(ids), max_len=ids.shape[1]), ids.shape[1] // 2
    with torch.no_grad():
        found = {
            "logits": model(ids).logits,
            "packed logits": model(ids, segments=Segments.from_document_ids(documents)).logits,
        }
        model(ids[:, :half], cache=cache)
        found["logits behind a cache"] = model(ids[:, half:], cache=cache).logits
    model.zero_grad()
    model.loss(ids).total.backward()
    grads = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return {name: x.double().cpu() for name, x in found.items()} | {"gradients": torch.cat(grads)}
