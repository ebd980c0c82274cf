"""What runs, and why."""

from layers.backends import Explanation, explain_operation
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.moe import Experts
from qwen3next.model import Qwen3Next


class Table(list[Explanation]):
    """Explanations that print as a table."""

    def __str__(self) -> str:
        rows = [("operation", "runs", "why", "what would be faster")]
        rows += [(e.operation, e.runs, e.why, e.faster) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)


def explain(model: Qwen3Next) -> Table:
    """One row an operation: the implementation that runs for this model's dtype and device, why, and what would be faster."""
    like = model.embed_tokens.weight
    rows: dict[str, Explanation] = {}
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            rows["delta_rule"] = explain_operation("delta_rule", module.backend, like)
            rows["causal_conv"] = explain_operation("causal_conv", module.conv_backend, like)
        elif isinstance(module, GatedAttention):
            rows["attention"] = explain_operation("attention", module.backend, like)
        elif isinstance(module, Experts):
            rows["experts"] = explain_operation("experts", module.backend, like)
    return Table(rows.values())
