"""Draw the study's pictures: metrics over training, bars with the spread of seeds, the ladder, losses by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.study.arms import ARMS
from recipes.study.claims import CLAIMS

Runs = Sequence[Mapping[str, Any]]

NAMES = {
    "val_nats": "held-out loss (nats per token)",
    "copy_nats": "loss after triggers (nats)",
    "first_token_attention": "attention on the first token",
    "sink_rate": "sink rate (over 0.3)",
    "massive_activation": "largest activation",
    "massive_ratio": "largest / median activation",
    "residual_norm_ratio": "norm of the first token / others",
    "value_norm_ratio": "norm of the first value / others",
    "gate_mean": "mean gate",
    "gate_closed": "share of gates below 0.1",
    "gradient_norm": "gradient norm",
}
CURVES = (
    *("first_token_attention", "sink_rate", "value_norm_ratio", "residual_norm_ratio"),
    *("massive_ratio", "gate_mean", "gate_closed", "gradient_norm"),
)
BARS = ("first_token_attention", "massive_ratio", "value_norm_ratio")
COLOURS = {
    "baseline": "#111111",
    "g1_elementwise": "#1f4e9c",
    "g1_headwise": "#3f8fd2",
    "g1_head_shared": "#c2410c",
    "g2_elementwise": "#15803d",
    "g1_constant": "#b45309",
    "g1_ns_sigmoid": "#9333ea",
    "sandwich_norm": "#6b7280",
}
OTHER_COLOURS = ("#0f766e", "#be185d", "#4d7c0f", "#7c2d12", "#1e3a8a", "#a16207", "#581c87", "#334155")
PAPER = {
    metric: {c.arm: c.paper[0] for c in CLAIMS if c.metric == metric and isinstance(c.paper, tuple)}
    | {c.against: c.paper[1] for c in CLAIMS if c.metric == metric and isinstance(c.paper, tuple)}
    for metric in ("first_token_attention",)
}


def arms_in(runs: Runs) -> list[str]:
    """In the order of the paper's rows."""
    return [name for name in ARMS if any(run["arm"] == name for run in runs)]


def even_attention(runs: Runs) -> float:
    """The first token's share, averaged as in `measure`, if every token attended equally to all visible tokens."""
    window = runs[0]["settings"]["window"]
    return sum(1 / (t + 1) for t in range(1, window)) / (window - 1)


def _figure(columns: int, rows: int, width: float, height: float, title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The study's pictures need matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")  # no pyplot: no window, no global state
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _log_if_wide(axes: Any, axis: str, values: Sequence[float]) -> None:
    """Use a logarithmic scale if all values are positive and span two powers of ten or more."""
    if values and min(values) > 0 and max(values) > 100 * min(values):
        getattr(axes, f"set_{axis}scale")("log")


def _colour(arm: str, drawn: Sequence[str]) -> str:
    others = [name for name in drawn if name not in COLOURS]
    return COLOURS.get(arm) or OTHER_COLOURS[others.index(arm) % len(OTHER_COLOURS)]


def draw_curves(runs: Runs, path: Path, *, title: str) -> None:
    """Draw each metric over training steps: the mean over seeds, and a band from minimum to maximum.

    With more than eight arms, arms without an assigned colour are thin and grey.
    """
    arms = arms_in(runs)
    crowded = len(arms) > len(COLOURS)
    losses = [name for name in ("val_nats", "copy_nats") if any(name in run["curve"] for run in runs)]
    panels = [*losses[:1], *(name for name in CURVES if any(name in run["curve"] for run in runs))]
    figure, grid = _figure(3, -(-len(panels) // 3), 13.5, 3.3 * -(-len(panels) // 3) + 0.4, title)
    for axes, name in zip(grid.flat, panels, strict=False):
        for arm in arms:
            mine = [run["curve"] for run in runs if run["arm"] == arm and name in run["curve"]]
            if not mine:
                continue
            steps = min((curve["step"] for curve in mine), key=len)
            values = np.array([[np.nan if x is None else x for x in curve[name][: len(steps)]] for curve in mine])
            grey = crowded and arm not in COLOURS
            style = {"color": "#c9c9c9", "linewidth": 0.8, "zorder": 1} if grey else {"color": _colour(arm, arms)}
            axes.plot(steps, values.mean(0), label=None if grey else arm, **style)
            if not grey and len(values) > 1:
                axes.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
        axes.set_title(NAMES[name], fontsize=10)
        if name == "first_token_attention":
            axes.axhline(even_attention(runs), color="#999999", linewidth=1, linestyle=":")
        _log_if_wide(axes, "y", [x for run in runs for x in run["curve"].get(name, ()) if x])
        axes.locator_params(axis="x", nbins=5)
        _tidy(axes)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=9)
    figure.savefig(path)


def draw_bars(runs: Runs, path: Path, *, title: str) -> None:
    """Draw the final metrics of every arm: the mean over seeds, whiskers from minimum to maximum, a dot for each seed.

    A diamond is the paper's figure for a model of 15B parameters, if it prints one.
    """
    arms = [arm for arm in arms_in(runs) if any(run["arm"] == arm and run["final"] for run in runs)]
    loss = next(name for name in ("val_nats", "copy_nats") if any(name in run["final"] for run in runs))
    panels = [*BARS, loss]
    figure, grid = _figure(len(panels), 1, 14.0, 1.4 + 0.27 * len(arms), title)
    for axes, name in zip(grid[0], panels, strict=True):
        for y, arm in enumerate(arms):
            mine = [run["final"][name] for run in runs if run["arm"] == arm and name in run["final"]]
            if not mine:
                continue
            mean = sum(mine) / len(mine)
            spread = [[mean - min(mine)], [max(mine) - mean]]
            axes.barh(y, mean, color="#b9cbe4" if arm != "baseline" else "#8b8b8b", height=0.7)
            axes.errorbar(mean, y, xerr=spread, color="#1f4e9c", capsize=2.5, linewidth=1.2)
            axes.plot(mine, [y] * len(mine), ".", color="#1f4e9c", markersize=4)
            if arm in PAPER.get(name, {}):
                axes.plot(PAPER[name][arm], y, "D", color="#c2410c", markersize=5)
        axes.set_title(NAMES[name], fontsize=10)
        if name == "first_token_attention":
            axes.axvline(even_attention(runs), color="#666666", linewidth=1, linestyle=":")
            axes.set_xlabel("dotted: if attention were even; diamonds: paper, 15B", fontsize=8)
        axes.set_yticks(range(len(arms)), arms if axes is grid[0][0] else [], fontsize=8)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        if name == "massive_ratio":
            _log_if_wide(axes, "x", [run["final"][name] for run in runs if name in run["final"]])
        elif name == "val_nats":  # bars from zero would hide differences of a hundredth
            shown = [run["final"][name] for run in runs if name in run["final"]]
            margin = max(max(shown) - min(shown), 0.01)
            axes.set_xlim(min(shown) - margin, max(shown) + 0.3 * margin)
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=4)
        _tidy(axes)
    figure.savefig(path)


def draw_ladder(runs: Runs, path: Path, *, title: str) -> None:
    """Draw the loss of the last tenth of training over the learning rate; a cross is a diverged run."""
    precisions = list(dict.fromkeys(run["precision"] for run in runs))
    figure, grid = _figure(len(precisions), 1, 5.4 * len(precisions) + 0.6, 4.2, title)
    for axes, precision in zip(grid[0], precisions, strict=True):
        mine = [run for run in runs if run["precision"] == precision]
        for arm in arms_in(mine):
            rates = sorted({run["rate"] for run in mine if run["arm"] == arm})
            colour = _colour(arm, arms_in(mine))
            ended = [r for r in mine if r["arm"] == arm and not r["diverged"]]
            groups = {rate: [r["training"]["loss"] for r in ended if r["rate"] == rate] for rate in rates}
            there = [rate for rate in rates if groups[rate]]
            means = [sum(groups[rate]) / len(groups[rate]) for rate in there]
            axes.plot(there, means, marker="o", color=colour, label=arm)
            for rate in there:
                axes.vlines(rate, min(groups[rate]), max(groups[rate]), color=colour, linewidth=1)
            for run in mine:
                if run["arm"] == arm and run["diverged"]:
                    axes.plot(run["rate"], max(means, default=0.0), "x", color=colour, markersize=9)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="multiple of the learning rate", ylabel="training loss (nats)", title=precision)
        _tidy(axes)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def draw_lengths(runs: Runs, path: Path, *, title: str) -> None:
    """Draw the loss by position after a short extension: solid with YaRN, dashed without."""
    figure, grid = _figure(1, 1, 7.2, 4.4, title)
    axes = grid[0][0]
    for arm in arms_in(runs):
        mine = [run["lengths"] for run in runs if run["arm"] == arm and "lengths" in run]
        for kind, line in (("yarn", "-"), ("plain", "--")):
            values = np.array([lengths[kind] for lengths in mine])
            if len(values):
                ends, colour = mine[0]["edges"][1:], _colour(arm, arms_in(runs))
                label = f"{arm}, {'YaRN x' + str(mine[0]['yarn_factor']) if kind == 'yarn' else 'without'}"
                axes.plot(ends, values.mean(0), line, marker=".", color=colour, label=label)
                axes.fill_between(ends, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    trained = next(run["lengths"]["trained"] for run in runs if "lengths" in run)
    axes.axvline(trained, color="#999999", linewidth=1)
    axes.text(trained, axes.get_ylim()[1], " longest in training", fontsize=8, va="top", color="#666666")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the window, up to", ylabel="loss (nats per token)")
    _tidy(axes)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
