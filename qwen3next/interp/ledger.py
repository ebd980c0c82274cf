"""Per-token, per-head statistics of the updates to a Gated DeltaNet layer's recurrent state."""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

Series = Float[Tensor, "b t h"]


@dataclass(frozen=True)
class Ledger:
    """The updates to one layer's recurrent state S in one forward.

    Keys have norm 1, so the norm of a written value equals the norm of the change of S.

    Attributes:
        layer: index of the block.
        log_decay: g_t = ln α_t, natural log of the decay, which is applied before the read.
        beta: β_t, the write strength.
        recalled: ‖α_t S_{t−1}ᵀ k_t‖, norm of the value that the state holds for this key (hook_recalled).
        erased: β_t times that, the part that is removed.
        written: ‖u_t‖, norm of the new value minus the erased one: the size of the change of S.
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
        """α_t, the fraction of the state that is kept."""
        return self.log_decay.exp()

    @property
    def half_life(self) -> Series:
        """ln 2 / −g: tokens after which half of the state would be left if every decay were equal to this one."""
        return -math.log(2) / self.log_decay

    def summary(self) -> dict[str, Float[Tensor, "h"]]:
        """Means per head over real tokens. The half-life is computed from the mean log decay."""

        def mean(x: Tensor) -> Tensor:
            return x[self.mask].mean(0)

        means = {name: mean(getattr(self, name)) for name in ("decay", "beta", "recalled", "erased", "written")}
        return {**means, "half_life": -math.log(2) / mean(self.log_decay)}

    def __rich__(self) -> Table:
        """The summary as a table for `rich.print(ledger)`, one row per head."""
        table = Table(
            title=f"recurrent state of block {self.layer}, means over {int(self.mask.sum())} tokens",
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
