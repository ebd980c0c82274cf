"""Draw the figures of docs/architecture.md from the configuration of Qwen3-Next-80B-A3B.

    python docs/figures/draw.py

Every number in a figure is read from the configuration, so that a figure cannot contradict the code.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from qwen3next import ModelConfig, presets
from qwen3next.inspect import CONTEXTS

HERE = Path(__file__).parent
LINEAR, SOFTMAX, FEED, PLAIN = "#cfe3f5", "#fbdcc0", "#d5ecd0", "#eeeeee"
EDGE = "#555555"


class Flow:
    """Boxes and arrows on a panel of 10 x 12 units, from the top down."""

    def __init__(self, ax: Axes, title: str, color: str):
        self.ax, self.color = ax, color
        ax.set(xlim=(0, 10), ylim=(0, 12.4))
        ax.axis("off")
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=8)

    def box(self, x: float, y: float, w: float, text: str, *, h: float = 0.8, plain: bool = False) -> None:
        """A box whose top is at y; its text may have several lines."""
        face = PLAIN if plain else self.color
        self.ax.add_patch(
            FancyBboxPatch((x, y - h), w, h, boxstyle="round,pad=0,rounding_size=0.15", fc=face, ec=EDGE, lw=0.8)
        )
        self.ax.text(x + w / 2, y - h / 2, text, ha="center", va="center", fontsize=7.4, linespacing=1.35)

    def line(self, *points: tuple[float, float]) -> None:
        """An arrow through points."""
        xs, ys = zip(*points, strict=True)
        self.ax.plot(xs, ys, color=EDGE, lw=0.9, solid_capstyle="round", zorder=0)
        style = {
            "arrowstyle": "-|>",
            "color": EDGE,
            "lw": 0.9,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 8,
        }
        self.ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style, zorder=0)

    def down(self, x: float, top: float, bottom: float) -> None:
        self.line((x, top), (x, bottom))

    def residual(self, bottom: float) -> None:
        """The stream beside the boxes, from x at the top to the sum at the bottom."""
        self.ax.text(0.45, 12.15, "x", fontsize=9, style="italic", ha="center", va="center")
        self.line((0.45, 11.9), (0.45, bottom + 0.27))
        self.ax.text(0.45, bottom, "+", fontsize=10, ha="center", va="center")
        self.ax.add_patch(Circle((0.45, bottom), 0.25, fill=False, ec=EDGE, lw=0.9))
        self.line((0.45, bottom - 0.27), (0.45, bottom - 0.75))


def linear_panel(ax: Axes, c: ModelConfig) -> None:
    key, value = c.linear_num_key_heads, c.linear_num_value_heads
    dk, dv, width = c.linear_key_head_dim, c.linear_value_head_dim, c.hidden_size
    count = c.layer_types.count("linear_attention")
    f = Flow(ax, f"Gated DeltaNet: {count} of {c.num_hidden_layers} layers", LINEAR)
    f.residual(0.95)
    f.line((0.45, 11.6), (1.2, 11.6))
    f.box(1.2, 12.0, 8.6, f"input_layernorm   ({width})", plain=True)
    for x in (2.7, 5.25, 6.85, 8.75):
        f.down(x, 11.2, 10.6)
    f.box(1.2, 10.6, 3.0, f"in_proj_qkv\n→ {2 * key * dk + value * dv}")
    f.box(4.5, 10.6, 1.5, f"in_proj_z\n→ {value * dv}")
    f.box(6.2, 10.6, 1.3, f"in_proj_b\n→ {value}")
    f.box(7.62, 10.6, 2.23, f"in_proj_a\n→ {value}")
    f.down(2.7, 9.8, 9.3)
    f.box(1.2, 9.3, 3.0, f"causal_conv, {c.linear_conv_kernel_dim} taps,\nthen SiLU")
    f.down(2.7, 8.5, 8.0)
    f.box(1.2, 8.0, 3.0, f"q, k {key} x {dk}, v {value} x {dv};\nq, k to length 1, q / √{dk}", h=0.9)
    f.down(6.85, 9.8, 8.0)
    f.box(6.2, 8.0, 1.3, "β = σ(b)", h=0.9)
    f.down(8.75, 9.8, 8.0)
    f.box(7.62, 8.0, 2.23, "g = −exp(A_log) ·\nsoftplus(a+dt_bias)", h=0.9)
    for x in (2.7, 6.85, 8.75):
        f.down(x, 7.1, 6.5)
    f.box(
        2.0,
        6.5,
        7.8,
        f"gated_delta_rule, state S {value} x {dk} x {dv} in fp32\n"
        "S ← eᵍ S      u = β (v − Sᵀk)      S ← S + k uᵀ      o = Sᵀq",
        h=1.1,
    )
    f.line((5.25, 9.8), (5.25, 6.82), (1.6, 6.82), (1.6, 4.4), (2.0, 4.4))
    f.ax.text(1.48, 5.6, "z", fontsize=8, style="italic", ha="right", va="center")
    f.down(5.9, 5.4, 4.8)
    f.box(2.0, 4.8, 7.8, "norm: weight · o / RMS(o) · silu(z), a head at a time")
    f.down(5.9, 4.0, 3.4)
    f.box(2.0, 3.4, 7.8, f"out_proj   {value * dv} → {width}")
    f.line((5.9, 2.6), (5.9, 0.95), (0.72, 0.95))


def softmax_panel(ax: Axes, c: ModelConfig) -> None:
    heads, kv, d, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    f = Flow(
        ax,
        f"Gated attention: {c.layer_types.count('full_attention')} of {c.num_hidden_layers} layers",
        SOFTMAX,
    )
    f.residual(0.95)
    f.line((0.45, 11.6), (1.2, 11.6))
    f.box(1.2, 12.0, 8.6, f"input_layernorm   ({width})", plain=True)
    places = ((1.2, "q_proj", heads), (3.4, "k_proj", kv), (5.6, "v_proj", kv), (7.8, "gate_proj", heads))
    for x, name, n in places:
        f.down(x + 1, 11.2, 10.6)
        f.box(x, 10.6, 2.0, f"{name}\n→ {n} x {d}")
    for x, name in ((1.2, "q_norm"), (3.4, "k_norm")):
        f.down(x + 1, 9.8, 9.3)
        f.box(x, 9.3, 2.0, name)
        f.down(x + 1, 8.5, 8.0)
        f.box(x, 8.0, 2.0, f"RoPE on the\nfirst {c.rotary_dim} of {d}", h=0.9)
        f.down(x + 1, 7.1, 6.5)
    f.down(6.6, 9.8, 6.5)
    f.box(1.2, 6.5, 6.4, f"attend: softmax(q kᵀ / √{d}) v\n{heads // kv} query heads share a key head", h=1.1)
    f.down(8.8, 9.8, 8.0)
    f.box(7.8, 8.0, 2.0, "σ", h=0.9)
    f.line((8.8, 7.1), (8.8, 4.8))
    f.down(4.4, 5.4, 4.8)
    f.box(1.2, 4.8, 8.6, "multiply: each head's answer, element by element")
    f.down(5.5, 4.0, 3.4)
    f.box(1.2, 3.4, 8.6, f"o_proj   {heads * d} → {width}")
    f.line((5.5, 2.6), (5.5, 0.95), (0.72, 0.95))


def feed_forward_panel(ax: Axes, c: ModelConfig) -> None:
    sparse = sum(c.is_sparse(i) for i in range(c.num_hidden_layers))
    width = c.hidden_size
    f = Flow(ax, f"Sparse mixture of experts: {sparse} of {c.num_hidden_layers} layers", FEED)
    f.residual(0.95)
    f.line((0.45, 11.6), (1.2, 11.6))
    f.box(1.2, 12.0, 8.6, f"post_attention_layernorm   ({width})", plain=True)
    for x, bottom in ((2.45, 10.6), (4.4, 6.5), (6.3, 9.3), (8.65, 9.3)):
        f.down(x, 11.2, bottom)
    f.box(1.2, 10.6, 2.5, f"router\n→ {c.num_experts} logits")
    f.down(2.45, 9.8, 9.3)
    f.box(1.2, 9.3, 2.5, "softmax over all\nin fp32")
    f.down(2.45, 8.5, 8.0)
    f.box(1.2, 8.0, 2.5, f"the {c.num_experts_per_tok} largest,\nscaled to sum 1", h=0.9)
    f.down(2.45, 7.1, 6.5)
    inner = c.moe_intermediate_size
    f.box(
        1.2,
        6.5,
        3.8,
        f"{c.num_experts_per_tok} of {c.num_experts} experts,\nSwiGLU {width} → {inner} → {width}",
        h=1.1,
    )
    f.box(5.3, 9.3, 2.0, f"shared_expert\nSwiGLU → {c.shared_expert_intermediate_size}")
    f.box(7.5, 9.3, 2.3, "shared_expert_gate\n→ 1")
    f.down(8.65, 8.5, 8.0)
    f.box(7.5, 8.0, 2.3, "σ", h=0.9)
    f.line((6.3, 8.5), (6.3, 4.8))
    f.line((8.65, 7.1), (8.65, 4.8))
    f.box(5.3, 4.8, 4.5, "multiply")
    f.line((3.1, 5.4), (3.1, 3.4))
    f.down(7.55, 4.0, 3.4)
    f.box(1.2, 3.4, 8.6, "sum")
    f.line((5.5, 2.6), (5.5, 0.95), (0.72, 0.95))


def draw_block(c: ModelConfig) -> Figure:
    """The two token mixers and the feed-forward: a block is one of the first two, then the third."""
    figure, axes = plt.subplots(1, 3, figsize=(15.5, 6.6))
    for panel, ax in zip((linear_panel, softmax_panel, feed_forward_panel), axes, strict=True):
        panel(ax, c)
    figure.tight_layout(w_pad=2.0)
    return figure


def draw_layers(c: ModelConfig) -> Figure:
    """Which layer is of which kind, and what a context costs."""
    figure, (strip, plot) = plt.subplots(2, 1, figsize=(10, 5.6), height_ratios=(1, 4.4))
    for i, kind in enumerate(c.layer_types):
        softmax = kind == "full_attention"
        strip.add_patch(Rectangle((i, 0), 0.9, 1, fc=SOFTMAX if softmax else LINEAR, ec=EDGE, lw=0.7))
        if softmax or i == 0:
            strip.text(i + 0.45, 0.5, str(i), ha="center", va="center", fontsize=7.5)
    for x, color, text in ((0, LINEAR, "Gated DeltaNet"), (9, SOFTMAX, "gated attention")):
        strip.add_patch(Rectangle((x, -1.1), 0.9, 0.6, fc=color, ec=EDGE, lw=0.7))
        strip.text(x + 1.2, -0.8, text, fontsize=8.5, va="center")
    strip.set(xlim=(-0.3, c.num_hidden_layers + 0.2), ylim=(-1.3, 1.2))
    strip.axis("off")
    strip.set_title(f"{c.num_hidden_layers} layers", fontsize=10, loc="left")

    gib, tokens = 2**30, [2**n for n in range(9, 21)]
    softmax_all = c.replace(layer_types=("full_attention",) * c.num_hidden_layers)
    state = c.bytes_per_sequence()
    plot.loglog(
        tokens,
        [t * softmax_all.bytes_per_token() / gib for t in tokens],
        "--",
        color="#888888",
        base=2,
        label=f"softmax in all layers: {softmax_all.bytes_per_token() // 1024} KiB a token",
    )
    plot.loglog(
        tokens,
        [(t * c.bytes_per_token() + state) / gib for t in tokens],
        color="#333333",
        lw=2,
        base=2,
        label="hybrid, together",
    )
    plot.loglog(
        tokens,
        [t * c.bytes_per_token() / gib for t in tokens],
        color="#e08a3c",
        base=2,
        label=f"keys and values, bf16: {c.bytes_per_token() // 1024} KiB a token",
    )
    plot.loglog(
        tokens,
        [state / gib for _ in tokens],
        color="#3c82c0",
        base=2,
        label=f"recurrent state, fp32: {state / 2**20:.1f} MiB a sequence",
    )
    plot.set_xticks(CONTEXTS, [f"{t // 1024}k" if t < 2**20 else "1M" for t in CONTEXTS])
    plot.set_yticks(
        [2.0**n for n in (-6, -4, -2, 0, 2, 4, 6)],
        ["16 MiB", "64 MiB", "256 MiB", "1 GiB", "4 GiB", "16 GiB", "64 GiB"],
    )
    plot.minorticks_off()
    plot.set(xlabel="tokens of context", xlim=(tokens[0], tokens[-1]))
    plot.set_title("memory of one sequence's context", fontsize=10, loc="left")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8.5, frameon=False)
    plot.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    plt.rcParams["font.family"] = "DejaVu Sans"
    config = presets.qwen3_next_80b_a3b()
    for name, draw in (("block", draw_block), ("layers", draw_layers)):
        # Without the date and version that matplotlib writes by default, equal figures are equal files.
        draw(config).savefig(HERE / f"{name}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
