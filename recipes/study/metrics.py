"""The metrics of the gated-attention study, measured through hook points in constant memory.

    measure(model, batches)["first_token_attention"]

docs/gated_attention.md has the definitions. The metrics are computed in fp32 from the hook points of softmax layers.
Attention uses the "eager" backend during the measurement, which makes the pattern.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qwen3next as q
from layers.hook_point import HookPoint

SINK_WINDOW, SINK_LEVEL = 64, 0.3  # T and the attention threshold of the sink rate (arXiv:2410.10781)
CLOSED = 0.1  # a gate below this value counts as closed
SPIKE, SPIKE_WINDOW = 0.1, 201  # nats above the running median over this many steps
OUTLIER = 6.0  # standard deviations above the median; with small batches the noise alone exceeds 0.1 nats

STATISTICS = (
    *("loss", "loss_range", "best_loss", "spikes", "outliers", "worst_spike"),
    *("gradient_norm_median", "gradient_norm_p999", "gradient_norm_max"),
)

Queries = Callable[[Tensor], dict[str, Tensor]]


class Tally:
    """Sums with their counts, and maxima, by name and layer."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, list[float]]] = {}
        self.most: dict[str, dict[int, float]] = {}

    def add(self, name: str, layer: int, values: Tensor) -> None:
        """Add values to a mean."""
        total = self.sums.setdefault(name, {}).setdefault(layer, [0.0, 0])
        total[0] += values.double().sum().item()
        total[1] += values.numel()

    def top(self, name: str, layer: int, value: Tensor) -> None:
        """Add values to a maximum."""
        before = self.most.setdefault(name, {}).get(layer, -math.inf)
        self.most[name][layer] = max(before, value.item())

    def by_layer(self) -> dict[str, list[float]]:
        means = {name: [s / n for _, (s, n) in sorted(found.items()) if n] for name, found in self.sums.items()}
        return means | {name: [x for _, x in sorted(found.items())] for name, found in self.most.items()}


@torch.no_grad()
def measure(model: q.Qwen3Next, batches: Iterable[Tensor], *, queries: Queries | None = None) -> dict[str, Any]:
    """Measure a model: means over layers, and under "layers" a list of every metric by softmax layer, in order.

    Args:
        batches: token ids (b, t); each row is one sequence, whose first token is the candidate for a sink.
        queries: returns masks (b, t) by name from ids; attention to the first token is also reported for each mask.
    Raises: ValueError for a model without softmax attention.
    """
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    if not layers:
        raise ValueError("This model has no softmax layer, whose attention could sink: choose another.")
    tally, masks = Tally(), dict[str, Tensor]()
    device = model.embed_tokens.weight.device

    def pattern(a: Tensor, hook: HookPoint) -> None:  # (b, h, t, s)
        to_first, layer = a[..., 0].float(), hook.ctx["layer"]
        tally.add("first_token_attention", layer, to_first[:, :, 1:])
        tally.add("first_token_attention_with_t0", layer, to_first)
        tally.add("sink_rate", layer, (to_first[:, :, :SINK_WINDOW].mean(-1) > SINK_LEVEL).float())
        for name, mask in masks.items():
            chosen = mask[:, None, 1:].expand(-1, to_first.shape[1], -1)
            tally.add(f"first_token_attention_{name}", layer, to_first[:, :, 1:][chosen])

    def stream(x: Tensor, hook: HookPoint) -> None:  # (b, t, width)
        x, layer = x.float(), hook.ctx["layer"]
        size, norms = x.abs(), x.norm(dim=-1)
        tally.top("massive_activation", layer, size.max())
        tally.add("median_activation", layer, size.flatten().median()[None])
        tally.add("residual_norm_ratio", layer, norms[:, 0] / norms[:, 1:].mean(1))

    def value(v: Tensor, hook: HookPoint) -> None:  # (b, t, kv heads, d)
        norms = v.float().norm(dim=-1)
        tally.add("value_norm_ratio", hook.ctx["layer"], norms[:, 0] / norms[:, 1:].mean(1).clamp(min=1e-12))

    def gate(g: Tensor, hook: HookPoint) -> None:  # (b, t, …)
        g, layer = g.float(), hook.ctx["layer"]
        tally.add("gate_mean", layer, g)
        tally.add("gate_closed", layer, (g < CLOSED).float())
        tally.add("gate_first_token", layer, g[:, 0])
        tally.add("gate_rest", layer, g[:, 1:])

    wanted = [("self_attn.hook_pattern", pattern), ("hook_resid_post", stream), ("self_attn.hook_v", value)]
    wanted += [(f"self_attn.{point}", gate) for point in ("hook_gate", "hook_switch")]
    hooks = [(f"blocks.{i}.{point}", fn) for point, fn in wanted for i in layers]
    hooks = [(name, fn) for name, fn in hooks if name in model.hook_dict]
    with model.materialize(pattern=layers), model.hooks(hooks):
        for ids in batches:
            ids = ids.to(device)
            masks = {} if queries is None else queries(ids)
            model(ids, logits_to_keep=1)
    found = tally.by_layer()
    found["massive_ratio"] = [
        most / max(median, 1e-12)
        for most, median in zip(found["massive_activation"], found["median_activation"], strict=True)
    ]
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {**means, "layers": found}


def training_statistics(rows: list[dict[str, Any]], *, warmup: int) -> dict[str, float | int | None]:
    """Measures of stability from the losses and gradient norms of a run; None where undefined.

    `loss` is the mean over the last tenth of the steps, `loss_range` the standard deviation there. `spikes` counts the
    steps after warm-up more than 0.1 nats above the median of the 201 steps around them. `outliers` counts those more
    than 6 standard deviations above it; the deviation is 1.48 times the run's median distance from the running median.
    `worst_spike` is the largest distance above it, in nats.
    """
    losses = np.array([row["lm"] for row in rows if row["step"] > warmup])
    norms = np.array([row["gradient_norm"] for row in rows if row.get("gradient_norm") is not None])
    if not len(losses):
        return dict.fromkeys(STATISTICS)
    above = losses - running_median(losses, SPIKE_WINDOW)
    last = losses[-max(len(losses) // 10, 1) :]
    return {
        "loss": float(last.mean()),
        "loss_range": float(last.std()),
        "best_loss": float(running_mean(losses, max(len(losses) // 10, 1)).min()),
        "spikes": int((above > SPIKE).sum()),
        "outliers": int((above > OUTLIER * 1.4826 * np.median(np.abs(above))).sum()),
        "worst_spike": float(above.max()),
        "gradient_norm_median": float(np.median(norms)) if len(norms) else None,
        "gradient_norm_p999": float(np.quantile(norms, 0.999)) if len(norms) else None,
        "gradient_norm_max": float(norms.max()) if len(norms) else None,
    }


def running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of the `window` values around each value; near the ends of fewer, with equal numbers on both sides.

    A one-sided window at the start would be below a fast-falling loss, and count the start of every run as a spike.
    """
    n = len(values)
    halves = [min(window // 2, i, n - 1 - i) for i in range(n)]
    return np.array([np.median(values[i - half : i + half + 1]) for i, half in enumerate(halves)])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over each full window of `window` consecutive values."""
    sums = np.concatenate(([0.0], values.cumsum()))
    return (sums[window:] - sums[:-window]) / window
