"""The bookkeeping of a Gated DeltaNet layer's memory, as numbers a token and a head."""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

Series = Float[Tensor, "b t h"]


@dataclass(frozen=True)
class Ledger:
    """One layer's memory over one forward. Keys have length 1, so the norm of a value is that of the memory's change.

    Attributes:
        layer: which block.
        log_decay: g_t = ln α_t, of the share of memory kept before anything is read.
        beta: β_t, the strength of the write.
        recalled: ‖α_t S_{t−1}ᵀ k_t‖, what the memory held for this key (hook_erased).
        erased: β_t times that, what is taken out.
        written: ‖u_t‖, the new value less what was erased: how far the memory moves.
        mask: (b, t) True for real tokens.
    """

    layer: int
    log_decay: Series
    beta: Series
    recalled: Series
    erased: Series
    written: Series
    mask: Bool[Tensor, "b t"]

    @property
    def decay(self) -> Series:
        """α_t, the share of memory kept."""
        return self.log_decay.exp()

    @property
    def half_life(self) -> Series:
        """ln 2 / −g: tokens after which half of the memory would be left if every decay were this one."""
        return -math.log(2) / self.log_decay

    def summary(self) -> dict[str, Float[Tensor, "h"]]:
        """Means over real tokens, a head; of the half-life the one that belongs to the mean log decay."""

        def mean(x: Tensor) -> Tensor:
            return x[self.mask].mean(0)

        means = {name: mean(getattr(self, name)) for name in ("decay", "beta", "recalled", "erased", "written")}
        return {**means, "half_life": -math.log(2) / mean(self.log_decay)}

    def __rich__(self) -> Table:
        """`rich.print(ledger)` shows the summary, a head a row."""
        table = Table(
            title=f"memory of block {self.layer}, means over {int(self.mask.sum())} tokens",
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        columns = ("head", "kept α", "half-life, tokens", "strength β", "‖recalled‖", "‖erased‖", "‖written‖")
        for column in columns:
            table.add_column(column, justify="right")
        s = self.summary()
        for h in range(len(s["beta"])):
            row = [s[name][h].item() for name in ("decay", "half_life", "beta", "recalled", "erased", "written")]
            table.add_row(str(h), *(f"{x:.3g}" for x in row))
        return table
