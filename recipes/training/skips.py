"""Which steps are skipped: those that predict nothing, whose gradient is not finite, or that are spikes."""

import math
import statistics
from dataclasses import dataclass, field

REMEMBERED = 128  # steps that a spike is compared with; half of them must be there
IN_A_ROW = 10  # consecutive steps with a non-finite gradient after which training stops


@dataclass
class Skips:
    """The decision for each step; on many processes, each must be asked about the same numbers.

    Attributes:
        deviations: how many standard deviations above the last steps make a spike; 0: nothing is one.
        recent: loss and gradient norm of the last steps, for a run's saved state. It is changed in place.
        in_a_row: consecutive gradients that were not finite.
    """

    deviations: float
    recent: list[list[float]] = field(default_factory=list)
    in_a_row: int = 0

    def why(self, step: int, *, loss: float, norm: float, targets: int) -> str:
        """A sentence that says why this step is skipped, or "". Remembers the step for the next ones.

        Raises: FloatingPointError for the last of `IN_A_ROW` gradients that are not finite.
        """
        if not targets:
            return (
                f"Step {step} is skipped, because no token has a next token in its document: "
                "use a longer --window or a larger --batch-size."
            )
        if not math.isfinite(norm):
            self.in_a_row += 1
            if self.in_a_row == IN_A_ROW:
                raise FloatingPointError(f"{IN_A_ROW} consecutive gradients were not finite")
            return f"Step {step}: the gradient is not finite; the step is skipped."
        if self._spike(loss, norm):
            return f"Step {step}: loss {loss:.3f}, gradient norm {norm:.3f}: a spike, skipped."
        self.in_a_row = 0
        return ""

    def _spike(self, loss: float, norm: float) -> bool:
        if not self.deviations:
            return False
        columns = [[row[i] for row in self.recent] for i in range(2)]
        found = any(is_spike(x, column, self.deviations) for x, column in zip((loss, norm), columns, strict=True))
        self.recent.append([loss, norm])
        del self.recent[:-REMEMBERED]
        return found


def is_spike(value: float, recent: list[float], deviations: float) -> bool:
    """Whether a loss or gradient norm lies more than so many standard deviations above those of recent steps.

    Source: SkipStep of OLMo-core. False while fewer than half of `REMEMBERED` are known.
    """
    if not deviations or len(recent) < REMEMBERED // 2:
        return False
    return value > statistics.fmean(recent) + deviations * statistics.stdev(recent)
