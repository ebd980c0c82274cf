"""Plan how many steps fit into a run's minutes, from its first steps, and again when the pace changes."""

from bisect import bisect_right

from recipes.training.settings import Settings
from recipes.training.steps import FLAT

CHECK = 0.1  # share of the remaining time between two checks of the plan
WINDOW = 0.05  # least share of the minutes over which the pace is averaged, to smooth bursts of other work
TOLERANCE = 0.01  # share of the minutes by which a plan may deviate before it is changed


class Pace:
    """Recent times of steps, validations and saving, in seconds.

    Args:
        elapsed: seconds of the run so far.
        looks_after: cost of the measurement after the last step, in validations.
    """

    def __init__(self, settings: Settings, elapsed: float, looks_after: float) -> None:
        assert settings.minutes is not None
        self.settings, self.budget = settings, 60 * settings.minutes
        self.looks_after = looks_after
        self.saving = 0.0
        self.steps: list[float] = []
        self.looks: list[float] = []  # in steps, because other work on the machine slows both equally
        self.compared = elapsed

    def looked(self, seconds: float) -> None:
        """Record the seconds of a validation; at least one step must have been recorded."""
        last = self.steps[-10:]
        self.looks.append(seconds * len(last) / sum(last))

    def first(self, step: int, elapsed: float) -> int:
        """The first plan. It uses the median, because the first steps are slower (kernel choice, allocation)."""
        return self._fitting(step, elapsed, sorted(self.steps)[len(self.steps) // 2])

    def again(self, step: int, total: int, elapsed: float) -> int:
        """The planned number of steps: `total` if that still fits or the next check is not due.

        No steps are added after the learning rate starts to fall, because it would rise again.
        """
        left = max(self.budget - elapsed, 0.0)
        if elapsed - self.compared < max(CHECK * left, TOLERANCE * self.budget):
            return total
        usual = self._recent(max(elapsed - self.compared, WINDOW * self.budget))
        fitting = self._fitting(step, elapsed, usual)
        off = abs(fitting - total) * usual
        if off <= max(TOLERANCE * self.budget, self.saving) or (fitting > total and step >= FLAT * total):
            return total
        return fitting

    def _recent(self, seconds: float) -> float:
        """Mean seconds of the last steps that together took at least the given time."""
        count, taken = 0, 0.0
        while count < len(self.steps) and taken < seconds:
            count += 1
            taken += self.steps[-count]
        return taken / count

    def _fitting(self, step: int, elapsed: float, usual: float) -> int:
        """The largest number of steps that end in time, but at least one more than now."""
        looking = usual * sorted(self.looks)[(len(self.looks) - 1) // 2] if self.looks else 0.0
        left = self.budget - elapsed - self.looks_after * looking
        self.compared = elapsed

        def takes(total: int) -> float:
            looks, saves = (
                _times(every, step, total) for every in (self.settings.eval_every, self.settings.save_every)
            )
            return (total - step) * usual + looks * looking + saves * self.saving

        possible = range(step + 1, step + 2 + max(int(left / usual), 0))
        return max(step + 1, step + bisect_right(possible, left, key=takes))


def _times(every: int, step: int, total: int) -> int:
    """How often an action at multiples of `every` and at the end occurs after `step`."""
    return total // every - step // every + (total % every != 0)
