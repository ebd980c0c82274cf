"""The gated delta rule with hook points inside its token loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from layers.delta_rule import Rule, apply_rule, gated_delta_rule, recurrent
from layers.dispatch.backends import choose
from layers.hook_point import HookPoint
from layers.segments import Segments


@dataclass(frozen=True)
class Watch:
    """Points that see each token's update before the next token runs, so that a patch acts on all that follow.

    Attributes:
        recalled: gets what the decayed state recalls for the key, e^g Sᵀk, (b 1 h v); the share β of it is erased.
        written: gets u, (b 1 h v).
        positions: of each token of the call, for the points' ctx.
    """

    recalled: HookPoint
    written: HookPoint
    positions: Sequence[int | tuple[int, ...]]

    def write(self, rows: int, t: int, recalled: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """What token t of so many rows writes, β (v − recalled), after hooks have seen both."""
        recalled = self._show(self.recalled, recalled, rows, t)
        return self._show(self.written, beta * (v - recalled), rows, t)

    def _show(self, point: HookPoint, x: Tensor, rows: int, t: int) -> Tensor:  # x (b · h, 1, v)
        x = point(x.unflatten(0, (rows, -1)).transpose(1, 2), position=self.positions[t])
        return x.transpose(1, 2).flatten(0, 1)


def watched(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
    backend: str,
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:
    """`rule`, with the points of `watch` where the token loop of the gated delta rule runs.

    Raises: beside those of `rule`, RuntimeError where a hook waits at a point of `watch` and another loop or no loop
        runs.
    """
    inputs = (q, k, v, log_decay, beta)
    if watch is not None:
        if rule is gated_delta_rule and _loops(backend, v):
            loop = partial(recurrent, write=partial(watch.write, len(v)))
            return apply_rule(loop, *inputs, state=state, segments=segments)
        watch.recalled.refuse()
        watch.written.refuse()
    return rule(*inputs, state=state, segments=segments, backend=backend)


def _loops(backend: str, v: Tensor) -> bool:
    """Whether the token loop runs: a token by itself takes it on every backend but "fla"."""
    choice = choose("delta_rule", backend, v)
    return choice == "recurrent" or (choice != "fla" and v.shape[1] == 1)
