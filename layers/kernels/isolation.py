"""Keep NaN and infinity of one packed sequence away from the others of its row.

Algorithms over whole rows separate sequences by factors of zero, and zero times NaN or infinity is NaN. If a packed row
holds such numbers, or numbers large enough to become infinite, its sequences run one at a time.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from layers.delta_rule import Rule
from layers.dispatch.registry import definition_of, function_of
from layers.segments import Segments

LARGEST = 1e9  # in fp32 a product of four such is finite


def wild(segments: Segments | None, *tensors: Tensor, largest: float = LARGEST) -> bool:
    """Whether sequences share a row and some number is NaN or beyond `largest`; False in traced graphs."""
    if segments is None or not segments.packed or torch.compiler.is_compiling():
        return False
    return not all(-largest < low and high < largest for low, high in (x.detach().aminmax() for x in tensors))


def one_by_one(
    segments: Segments, state: Tensor | None, run: Callable[..., tuple[Tensor, Tensor | None]], *tensors: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`run(state, *parts)` for each sequence by itself; its outputs (b t …), zero at padding, and last states.

    A row's first sequence gets the row's `state`, others None. Rows without tokens keep theirs.
    """
    outputs: list[Tensor] = []
    states: list[Tensor | None] = [None if state is None else state[row : row + 1] for row in range(segments.batch)]
    begun: set[int] = set()
    for sequence in segments.runs:
        row = slice(sequence.row, sequence.row + 1)
        before = None if sequence.row in begun else states[sequence.row]
        begun.add(sequence.row)
        y, states[sequence.row] = run(before, *(x[row, sequence.begin : sequence.end] for x in tensors))
        outputs.append(y[0])
    last = tensors[-1] if not outputs else outputs[0]
    real = segments.real_tokens  # of rows one after another, as runs are
    flat = last.new_zeros(segments.batch * segments.length, *last.shape[1:]).index_copy(0, real, torch.cat(outputs))
    known = [x for x in states if x is not None]
    if not known:
        return flat.unflatten(0, (segments.batch, -1)), None
    states = [torch.zeros_like(known[0]) if x is None else x for x in states]
    return flat.unflatten(0, (segments.batch, -1)), torch.cat([x for x in states if x is not None])


class GradientsApart:
    """Keeps NaN and infinity in the gradients of one packed sequence from those of the others in its row.

    For an algorithm over whole rows: pass what it reads through `inputs` and its output through `output`. Where the
    output's gradient is not finite at some token, all of that sequence gets NaN as gradient of the inputs, and the
    others get what they would have if it were zero there. Does nothing in traced graphs or where no row is packed.
    """

    def __init__(self, segments: Segments | None):
        here = not torch.compiler.is_compiling() and torch.is_grad_enabled()
        self._segments = segments if here and segments is not None and segments.packed else None
        self._spoilt: Tensor | None = None  # (b, t) the sequences of the backward pass under way

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same (b t …), with NaN in the backward pass where it belongs."""
        return tuple(self._hooked(x, self._spoil) for x in tensors)

    def output(self, y: Tensor) -> Tensor:
        """The same (b t …), whose gradient reaches the algorithm without what is not finite."""
        return self._hooked(y, self._clean)

    def _hooked(self, x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
        if self._segments is None or not x.requires_grad:
            return x
        own = x.view_as(x)  # x itself may have other readers
        own.register_hook(hook)
        return own.view_as(own)  # a hook on the result sees the unchanged gradient

    def _clean(self, grad: Tensor) -> Tensor | None:
        assert self._segments is not None
        self._spoilt = None
        if all(bool(x.isfinite()) for x in grad.detach().aminmax()):
            return None
        bad = ~grad.detach().isfinite().flatten(2).all(-1)
        number = self._segments.segment_ids + 1  # 0 for absent tokens
        of_sequence = torch.zeros_like(number).scatter_add(1, number, bad.long())
        self._spoilt = of_sequence.gather(1, number) > 0
        return grad.masked_fill(self._where(grad), 0.0)

    def _spoil(self, grad: Tensor) -> Tensor | None:
        return None if self._spoilt is None else grad.masked_fill(self._where(grad), torch.nan)

    def _where(self, grad: Tensor) -> Tensor:
        assert self._spoilt is not None
        return self._spoilt.view(*grad.shape[:2], *(1,) * (grad.ndim - 2))


def over_chunks(operation: str, mixes: Callable[..., bool]) -> Callable[[Rule], Rule]:
    """A decorator that makes a rule over chunks take any input.

    One token takes the token loop, to whose definition a chunk would only add work. Packed rows whose numbers a shared
    chunk would mix run one sequence at a time, and gradients that are not finite stay in their sequence.

    Args:
        operation: of the rule; its definition is the token loop.
        mixes: (q, k, v, log_decay, beta, segments) → whether shared chunks would mix the sequences.
    """

    def decorate(rule: Rule) -> Rule:
        @wraps(rule)
        def any_input(
            *inputs: Tensor, state: Tensor | None, segments: Segments | None
        ) -> tuple[Tensor, Tensor]:  # inputs: q, k, v, log_decay, beta
            if inputs[0].shape[1] == 1:
                return function_of(operation, definition_of(operation))(*inputs, state=state, segments=segments)
            if segments is not None and mixes(*inputs, segments):

                def alone(before: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
                    return any_input(*parts, state=before, segments=None)

                return one_by_one(segments, state, alone, *inputs)  # type: ignore[return-value]
            apart = GradientsApart(segments)
            o, after = rule(*apart.inputs(*inputs), state=state, segments=segments)
            return apart.output(o), after

        return any_input

    return decorate
