"""What runs, and why."""

import torch

from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import Explanation, explain_operation
from layers.experts.disk import OffloadedExperts
from layers.experts.int8 import Int8Experts
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.kernels.experts import backend_of_experts
from layers.linear import Linear
from layers.moe import Experts
from layers.norm import RMSNorm
from qwen3next.api import Qwen3Next
from qwen3next.decoding.observers import named_backend, watched
from qwen3next.decoding.protocol import decoding_modules, like
from qwen3next.decoding.why_not import why_not
from qwen3next.inputs import as_device, as_dtype

LOOKS = "somebody looks inside: hooks, model.expose, a forward put in a module's place, or a mode of torch"


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
    """One row an operation: the implementation that runs, why, and what would be faster.

    Args:
        device, dtype: answer as if the model were there and so; None means where and what it is. A model made
            under `torch.device("meta")`, too large to be allocated, can be asked about in this way.
    Raises: ValueError for a dtype or device that torch does not know; RuntimeError where a backend that was
        chosen with `model.set_backend` cannot run.
    """
    weight = like(model)
    where = model.device if device is None else as_device(device)
    kind = weight.dtype if dtype is None else as_dtype(dtype)
    rows = {"decode": explain_operation("decode", model.decode_backend, where, kind)}
    runs = rows["decode"].runs
    reason = None if runs == "torch" else why_not(model, runs, where, kind)
    if reason is None and runs != "torch" and watched(model):
        named = any(map(named_backend, decoding_modules(model)))
        reason = "it is one piece, and a backend of another operation was chosen by name" if named else LOOKS
    if reason is not None:
        rows["decode"] = Explanation("decode", "torch", "the modules, one operation after another", f"{runs}: {reason}")
    rows["cross_entropy"] = explain_operation("cross_entropy", model.cross_entropy_backend, where, kind)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            rows["elementwise"] = explain_operation("elementwise", module.backend, where, kind)
        elif isinstance(module, Linear):
            rows["linear"] = explain_operation("linear", module.backend, where, kind)
        elif isinstance(module, GatedDeltaNet):
            name = "delta_rule" if module.rule is gated_delta_rule else "linear_rule"
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
            faster = "load with experts='memory', or 'int8', where it fits; a larger expert_cache"
            rows["experts"] = Explanation("experts", "mmap", "read from the files as tokens route to them", faster)
        elif isinstance(module, Int8Experts):
            faster = "for many tokens at once: load with experts='memory'"
            rows["experts"] = Explanation("experts", "int8", "a byte a weight and a scale an output row", faster)
    return Table(rows.values())
