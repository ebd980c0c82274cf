"""Every fast implementation against its definition, every registered check, and a whole model against the CPU."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import qwen3next as q
from layers.dispatch.registry import checked_implementations
from layers.dispatch.self_check import failed
from layers.segments import Segments
from recipes.gpu.bench import Bench, Job, Row, build
from recipes.measure.gpu_parity import LENGTHS, comparisons, unavailable

# Of a whole model's logits and gradients, which add up the rounding of four layers; fp32 may have products in tf32.
BOUND = {torch.float32: 2e-2, torch.bfloat16: 0.1}


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
        if reason := unavailable(operation, name, bench.device, dtype):
            yield row | {"not run": reason}
            continue
        with torch.no_grad():
            wrong = failed(operation, name, bench.device, dtype)
        yield row | ({"within": True} if wrong is None else {"failed": wrong})


def _model(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    """Four layers in the released order against fp64 on the CPU: logits, packed logits, a continuation, gradients.

    Every expert is chosen: else rounding would change the experts of some tokens, which hides smaller errors.
    """
    sizes = {"num_hidden_layers": 4, "mtp_num_hidden_layers": 0, "vocab_size": 1000}
    config = q.presets.small(**sizes, num_experts=4, num_experts_per_tok=4)
    there = build(config, torch.device("cpu"), bench.settings.seed, dtype)
    here = copy.deepcopy(there).to(bench.device)
    there = there.double()
    t = 70 if bench.quick else 300
    ids = torch.randint(1000, (2, t), generator=torch.Generator().manual_seed(bench.settings.seed))
    documents = (torch.arange(t) > t // 3).long().expand(2, t)
    what = f"model of 4 layers against fp64 on the CPU, {str(dtype).removeprefix('torch.')}"
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
