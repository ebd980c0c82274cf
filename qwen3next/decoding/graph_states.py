"""Recurrent states in a graph's own memory, lent to the cache without a copy.

The memory has two sides. A step reads one side and writes the other, so the state before a step is still there if the
step fails. Steps one after another copy nothing. A state is copied out when it is read, or when it is still held and
its side is about to be written again.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from layers.gated_deltanet import DeltaNetState


class Loan:
    """The states of all layers after one step: in the graph's memory until they are taken.

    Attributes:
        conv, recurrent: (layers, b, ...), a side of that memory, or once taken a copy.
    """

    def __init__(self, conv: Tensor, recurrent: Tensor):
        self.conv, self.recurrent, self._taken = conv, recurrent, False

    def take(self) -> None:
        """Copy the states out of the graph's memory, unless that was done."""
        if not self._taken:
            self.conv, self.recurrent, self._taken = self.conv.clone(), self.recurrent.clone(), True


class LentState(DeltaNetState):
    """One layer's state of a loan. Reading `conv` or `recurrent` copies all layers' states out, once."""

    def __init__(self, loan: Loan, layer: int):
        self.loan: Loan | None = loan  # None once the state was replaced
        self.layer, self.update_log, self.cut = layer, None, 0

    @property
    def nbytes(self) -> int:
        if self.loan is None:
            return super().nbytes
        return self.loan.conv[self.layer].nbytes + self.loan.recurrent[self.layer].nbytes

    def share(self) -> DeltaNetState:
        return DeltaNetState(self.conv, self.recurrent) if self.loan is None else LentState(self.loan, self.layer)

    def _read(self) -> tuple[Tensor, Tensor]:
        if self.loan is None:
            return self._own
        self.loan.take()
        return self.loan.conv[self.layer], self.loan.recurrent[self.layer]

    def _replace(self, conv: Tensor, recurrent: Tensor) -> None:
        self._own, self.loan = (conv, recurrent), None

    @property
    def conv(self) -> Tensor:
        return self._read()[0]

    @conv.setter
    def conv(self, x: Tensor) -> None:
        self._replace(x, self._read()[1])

    @property
    def recurrent(self) -> Tensor:
        return self._read()[1]

    @recurrent.setter
    def recurrent(self, x: Tensor) -> None:
        self._replace(self._read()[0], x)

    def __reduce__(self) -> tuple:
        """Copies and pickles own their memory."""
        return DeltaNetState, (self.conv, self.recurrent)


class GraphStates:
    """The memory of a graph's recurrent states, all layers' in two tensors.

    Attributes:
        conv, recurrent: (2, layers, b, ...).
        side: (1,) on the device, which side holds the present states; the step that a graph repeats turns it.
    """

    @torch.inference_mode(False)  # memory made inside that mode could not be written to outside it
    def __init__(self, states: Sequence[DeltaNetState]):
        def memory(like: Tensor) -> Tensor:
            return like.new_empty(2, len(states), *like.shape)

        self.conv, self.recurrent = memory(states[0].conv), memory(states[0].recurrent)
        self.side = torch.zeros(1, dtype=torch.long, device=self.conv.device)
        self._now = 0  # the side of the present states,
        self._known = True  # and whether `side` holds that: not where a step failed
        self._loans: list[weakref.ref[Loan] | None] = [None, None]  # of each side

    def hold(self, states: Sequence[DeltaNetState]) -> None:
        """Make these the present states; free where they are the loan of the last step."""
        loan = self._loan(self._now)
        same = loan is not None and all(
            isinstance(s, LentState) and s.loan is loan and s.layer == i for i, s in enumerate(states)
        )
        if not same:
            self._release(self._now)
            torch.stack([s.conv for s in states], out=self.conv[self._now])
            torch.stack([s.recurrent for s in states], out=self.recurrent[self._now])
        if not self._known:
            self.side.fill_(self._now)
        self._known = True
        self._release(1 - self._now)

    def present(self, layer: int) -> DeltaNetState:
        """A copy of a layer's present state, for a step that makes new tensors."""
        conv, recurrent = (x[:, layer].index_select(0, self.side)[0] for x in (self.conv, self.recurrent))
        return DeltaNetState(conv, recurrent)

    def put(self, layer: int, state: DeltaNetState) -> None:
        """Write a layer's next state to the other side."""
        other = 1 - self.side
        self.conv[:, layer].index_copy_(0, other, state.conv[None])
        self.recurrent[:, layer].index_copy_(0, other, state.recurrent[None])

    def begin(self) -> None:
        """Before a step, which turns `side`."""
        self._known = False

    def lend(self) -> list[DeltaNetState]:
        """After a step: its states, for the cache."""
        self._now, self._known = 1 - self._now, True
        loan = Loan(self.conv[self._now], self.recurrent[self._now])
        self._loans[self._now] = weakref.ref(loan)
        return [LentState(loan, i) for i in range(self.conv.shape[1])]

    def _loan(self, side: int) -> Loan | None:
        found = self._loans[side]
        return None if found is None else found()

    def _release(self, side: int) -> None:
        """Before a side is written: who still holds its states gets a copy."""
        if (loan := self._loan(side)) is not None:
            loan.take()
        self._loans[side] = None
