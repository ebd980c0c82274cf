"""Pictures of one forward: attention maps, a memory's ledger, a logit lens. matplotlib is imported when one is drawn.

Each function returns a matplotlib Figure: `figure.savefig("map.png")`, or the last line of a notebook's cell.
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

MOST_LABELS = 40  # along an axis; more are thinned out
GRID = {"alpha": 0.25, "linewidth": 0.6}


def draw_attention(
    maps: Mapping[str, Float[Tensor, "t s"]], *, tokens: Sequence[str] | None = None, columns: int | None = None
) -> "Figure":
    """Attention maps by title, side by side or in so many columns: one head's each, a Gated DeltaNet head's as
    `implicit_attention` gives it.

    A map with negative entries gets diverging colours around zero, others run from white; each its own scale. The
    scale ends at the 99.5th percentile of the entries below the diagonal or on it, so that one peak hides nothing.
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
    """Four series over the tokens of one row, a line a head: half-life, write strength, what is erased and written."""
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
    figure.suptitle(f"memory of block {ledger.layer}")
    return figure


def draw_lens(
    lens: Lens, *, decode: Callable[[int], str] = str, row: int = 0, tokens: Sequence[str] | None = None
) -> "Figure":
    """The likeliest next token at each depth (up) and place (right), coloured by its probability."""
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
    axes.set(xlabel="token read", ylabel="residual stream", title="likeliest next token, by depth")
    _name_tokens(axes.xaxis, places, tokens, rotation=90)
    return figure


def _figure(*, width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install matplotlib.") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")  # no pyplot: no window, no global state


def _name_tokens(axis: Any, count: int, tokens: Sequence[str] | None, *, rotation: float = 0) -> None:
    """Tokens as tick labels, every n-th where there are many; numbers without them."""
    if tokens is None:
        return
    places = range(0, count, -(-count // MOST_LABELS))
    labels = [_shown(tokens[i]) for i in places]
    axis.set_ticks(list(places), labels, fontsize=6.5, rotation=rotation, family="monospace", parse_math=False)


def _shown(text: str) -> str:
    """White space that can be seen; an indentation as its length."""
    text = text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return re.sub("·{4,}", lambda run: f"·×{len(run[0])}", text) or "∅"
