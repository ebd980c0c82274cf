"""Which implementation of each operation runs, and why."""

import math
from dataclasses import replace

import torch

from layers.cpp.build import missing
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import Explanation, explain_operation
from layers.experts.disk import OffloadedExperts
from layers.experts.int8 import Int8Experts
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.kernels.experts import backend_of_experts
from layers.kernels.one_token import MOST_ROWS
from layers.linear import Linear
from layers.moe import Experts
from layers.norm import RMSNorm
from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import HoldsGroups
from layers.quantised.products import FAST
from qwen3next.api import Qwen3Next
from qwen3next.decoding.observers import hooked, named_backend
from qwen3next.decoding.protocol import decoding_modules
from qwen3next.decoding.token_step import why_not_kernels
from qwen3next.decoding.why_not import why_not
from qwen3next.files.sizes import binary
from qwen3next.inputs import as_device, as_dtype, like

LOOKS = "it is blocked by hooks, model.materialize, a replaced forward of a module, or a torch mode"


def _with_kernels(row: Explanation, reason: str | None) -> Explanation:
    """The row of a graph, and whether it is of Triton kernels or, for a reason, of the modules."""
    if reason is None:
        words = f"; of Triton kernels, a few a layer, for up to {MOST_ROWS} rows"
        return replace(row, why=row.why + words)
    faster = f"Triton kernels in it: {reason}"
    faster = faster if row.faster == "-" else f"{row.faster}; {faster}"
    return replace(row, why=row.why + "; of the modules' own kernels", faster=faster)


class Table(list[Explanation]):
    """Explanations that print as a table."""

    def __str__(self) -> str:
        rows = [("operation", "runs", "why", "what would be faster")]
        rows += [(e.operation, e.runs, e.why, e.faster) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows)


def explain(
    model: Qwen3Next, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Table:
    """One row per operation: the implementation that runs, why, and what would be faster.

    Args:
        device, dtype: explain the model as if it had this device and dtype; None means its own. With them, a model
            on the meta device can be explained.
    Raises: ValueError for an unknown dtype or device; RuntimeError if a backend chosen with `model.set_backend`
        cannot run.
    """
    weight = like(model)
    where = model.device if device is None else as_device(device)
    kind = weight.dtype if dtype is None else as_dtype(dtype)
    rows = {"decode": explain_operation("decode", model.decode_backend, where, kind)}
    runs = rows["decode"].runs
    reason = None if runs == "torch" else why_not(model, runs, where, kind)
    if reason is None and runs != "torch" and hooked(model):
        named = any(map(named_backend, decoding_modules(model)))
        reason = "it fuses all operations, and a backend of another operation was chosen by name" if named else LOOKS
    if reason is not None:
        rows["decode"] = Explanation("decode", "torch", "the modules, one operation after another", f"{runs}: {reason}")
    elif runs == "graph":
        with torch.no_grad():
            rows["decode"] = _with_kernels(rows["decode"], why_not_kernels(model, where, kind))
    rows["cross_entropy"] = explain_operation("cross_entropy", model.cross_entropy_backend, where, kind)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            rows["elementwise"] = explain_operation("elementwise", module.backend, where, kind)
        elif isinstance(module, Linear):
            rows["linear"] = explain_operation("linear", module.backend, where, kind)
        elif isinstance(module, GatedDeltaNet):
            name = "delta_rule" if module.rule is gated_delta_rule else "simple_gla"
            rows[name] = explain_operation(name, module.backend, where, kind)
            if hasattr(module, "conv_weight"):
                rows["causal_conv"] = explain_operation("causal_conv", module.conv_backend, where, kind)
        elif isinstance(module, GatedAttention):
            rows["attention"] = explain_operation("attention", module.backend, where, kind, head_dim=module.head_dim)
        elif isinstance(module, Experts):
            rows["experts"] = explain_operation(
                "experts", backend_of_experts(module.backend, module.down_proj), where, kind
            )
        elif isinstance(module, OffloadedExperts):
            faster = "load with experts='memory' or 'int8' if they fit in memory; a larger expert_cache"
            rows["experts"] = Explanation("experts", "disk", "read from files when a token is routed to them", faster)
        elif isinstance(module, Int8Experts):
            faster = "for many tokens at once: load with experts='memory'"
            rows["experts"] = Explanation("experts", "int8", "one byte per weight and one scale per output row", faster)
    if held := [w for module in model.modules() if isinstance(module, HoldsGroups) for w in module.all_held()]:
        rows["weights in groups"] = _groups(held, kind)
    return Table(rows.values())


def _groups(held: list[GroupWeight], dtype: torch.dtype) -> Explanation:
    """What is kept in groups, in bytes, and how it is multiplied."""
    bits = " and ".join(str(n) for n in sorted({w.bits for w in held}))
    size, plain = sum(w.nbytes for w in held), sum(math.prod(w.shape) for w in held) * dtype.itemsize
    compiled = held[0].codes.device.type == "cpu" and dtype in FAST and missing() is None
    why = f"{bits} bits a weight: {binary(size)} in place of {binary(plain)}; "
    why += "codes are multiplied for a few rows, dequantised in tiles for many" if compiled else "dequantised in tiles"
    return Explanation(
        "weights in groups", "cpp" if compiled else "torch", why, "-" if compiled else "the CPU's kernels"
    )
