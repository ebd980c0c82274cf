"""How many steps fit into a run's minutes: planned from its first steps, and anew where its pace changes."""

from bisect import bisect_right

from recipes.training.settings import Settings
from recipes.training.steps import FLAT

CHECK = 0.1  # of the time that is left, from one comparison of plan and clock to the next
WINDOW = 0.05  # of the minutes, at least: steps so far back tell the pace, or a burst of other work would
TOLERANCE = 0.01  # of the minutes: a plan that ends nearer to them than that stands


class Pace:
    """What steps, looks at held-out text and saving take of late, in seconds.

    Args:
        elapsed: seconds of the run so far.
        looks_after: what the run measures after its last step, as a multiple of one look.
    """

    def __init__(self, settings: Settings, elapsed: float, looks_after: float) -> None:
        assert settings.minutes is not None
        self.settings, self.budget = settings, 60 * settings.minutes
        self.looks_after = looks_after
        self.saving = 0.0
        self.steps: list[float] = []
        self.looks: list[float] = []  # in steps, because other work slows both
        self.compared = elapsed

    def looked(self, seconds: float) -> None:
        """Note what a look took, after a step at least."""
        last = self.steps[-10:]
        self.looks.append(seconds * len(last) / sum(last))

    def first(self, step: int, elapsed: float) -> int:
        """The first plan. The first steps are slower, as kernels are chosen and memory is fetched: hence the median."""
        return self._fitting(step, elapsed, sorted(self.steps)[len(self.steps) // 2])

    def again(self, step: int, total: int, elapsed: float) -> int:
        """The number of steps in all, which is `total` where that still fits or the time for a comparison has not come.

        Nothing is added once the learning rate falls: it would rise again.
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
        """The mean of the last steps that took so long."""
        count, taken = 0, 0.0
        while count < len(self.steps) and taken < seconds:
            count += 1
            taken += self.steps[-count]
        return taken / count

    def _fitting(self, step: int, elapsed: float, usual: float) -> int:
        """The most steps in all that end in time, and one more at least."""
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
    """How often something happens after `step` that is done at multiples of `every` and at the end."""
    return total // every - step // every + (total % every != 0)
