"""Figures of one forward: attention maps, the ledger of a recurrent state, a logit lens.

Each function returns a matplotlib Figure: save it with `figure.savefig("map.png")`, or show it in a notebook.
matplotlib is imported when a figure is drawn.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3next.interp.ledger import Ledger
from qwen3next.interp.residual import Lens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 40  # per axis; of more, only every n-th is shown
GRID = {"alpha": 0.25, "linewidth": 0.6}


def draw_attention(
    maps: Mapping[str, Float[Tensor, "t s"]], *, tokens: Sequence[str] | None = None, columns: int | None = None
) -> "Figure":
    """Draw attention maps with their titles, one head each; for a Gated DeltaNet head, from `implicit_attention`.

    Each map has its own scale. A map with negative entries gets diverging colours around zero, others start at white.
    The scale ends at the 99.5th percentile of the entries on or below the diagonal, so that one large entry does not
    hide the rest.

    Args:
        maps: (t, s) matrices by title.
        tokens: texts for the axes.
        columns: number of columns; None puts all maps in one row.
    """
    columns = min(columns or len(maps), len(maps))
    rows = -(-len(maps) // columns)
    figure = _figure(width=0.6 + 5.4 * columns, height=5.0 * rows)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(maps) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(places, maps.items(), strict=False):
        values = matrix.detach().float().cpu()
        seen = values.tril().abs()
        limit = float(seen[seen > 0].quantile(0.995)) if bool((seen > 0).any()) else 1.0
        signed = bool((values < 0).any())
        image = axes.imshow(
            values.masked_fill(torch.ones_like(values).triu(1).bool(), float("nan")).numpy(),
            cmap="RdBu_r" if signed else "Blues",
            vmin=-limit if signed else 0.0,
            vmax=limit,
            interpolation="nearest",
        )
        figure.colorbar(image, ax=axes, shrink=0.8, extend="both" if signed else "max")
        axes.set(title=title, xlabel="token that is read", ylabel="token that reads")
        axes.set_facecolor("#f1f1f1")  # the future
        _name_tokens(axes.xaxis, values.shape[1], tokens, rotation=90)
        _name_tokens(axes.yaxis, values.shape[0], tokens)
    return figure


def draw_ledger(
    ledger: Ledger, *, row: int = 0, heads: Sequence[int] | None = None, tokens: Sequence[str] | None = None
) -> "Figure":
    """Draw four series over the tokens of one row: half-life, write strength, norms erased and written.

    Args:
        row: row of the batch.
        heads: heads to draw, one line each; None draws all.
        tokens: texts for the axis.
    """
    figure = _figure(width=9.0, height=7.2)
    real = ledger.mask[row].cpu()
    count = int(real.sum())
    panels = figure.subplots(4, 1, sharex=True)
    series = {
        "half-life\n(tokens)": ledger.half_life,
        "write\nstrength β": ledger.beta,
        "norm\nerased": ledger.erased,
        "norm\nwritten": ledger.written,
    }
    for axes, (label, values) in zip(panels, series.items(), strict=True):
        for h in range(values.shape[2]) if heads is None else heads:
            line = values[row, :, h].detach().float().cpu()[real]
            axes.plot(line, marker=".", markersize=3, linewidth=1, label=f"head {h}", color=f"C{h % 10}")
        axes.set_ylabel(label)
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1)
    panels[2].set_ylim(bottom=0)
    panels[3].set_ylim(0, panels[3].get_ylim()[1])
    panels[0].legend(ncols=8, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    panels[3].set_xlabel("token")
    _name_tokens(panels[3].xaxis, count, tokens, rotation=90)
    figure.suptitle(f"recurrent state of block {ledger.layer}")
    return figure


def draw_lens(
    lens: Lens, *, decode: Callable[[int], str] = str, row: int = 0, tokens: Sequence[str] | None = None
) -> "Figure":
    """Draw the most likely next token at each depth (upward) and position (rightward), coloured by its probability.

    Args:
        decode: text of a token id.
        row: row of the batch.
        tokens: texts for the axis.
    """
    ids, probability = lens.ids[:, row, :, 0].cpu(), lens.log_probs[:, row, :, 0].detach().float().exp().cpu()
    depth, places = ids.shape
    figure = _figure(width=1.8 + 0.55 * places, height=1.6 + 0.32 * depth)
    axes = figure.subplots()
    image = axes.imshow(probability.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    figure.colorbar(image, ax=axes, label="probability", pad=0.02)
    for y in range(depth):
        for x in range(places):
            colour = "white" if probability[y, x] > 0.55 else "black"
            text = _shown(decode(int(ids[y, x])))
            axes.text(x, y, text[:8], ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    axes.set_yticks(range(depth), lens.labels, fontsize=8)
    axes.set(xlabel="token read", ylabel="residual stream", title="most likely next token, by depth")
    _name_tokens(axes.xaxis, places, tokens, rotation=90)
    return figure


def _figure(*, width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install matplotlib.") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")  # no pyplot: no window, no global state


def _name_tokens(axis: Any, count: int, tokens: Sequence[str] | None, *, rotation: float = 0) -> None:
    """Set tokens as tick labels, only every n-th if there are many; without tokens, leave the numbers."""
    if tokens is None:
        return
    places = range(0, count, -(-count // MOST_LABELS))
    labels = [_shown(tokens[i]) for i in places]
    axis.set_ticks(list(places), labels, fontsize=6.5, rotation=rotation, family="monospace", parse_math=False)


def _shown(text: str) -> str:
    """Text with visible white space; an indentation is shown by its length."""
    text = text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return re.sub("·{4,}", lambda run: f"·×{len(run[0])}", text) or "∅"
