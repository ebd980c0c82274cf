"""Keep NaN and infinity of one packed sequence away from the others of its row.

Algorithms over whole rows separate sequences by factors of zero, and zero times NaN or infinity is NaN. If a packed row
holds such numbers, or numbers large enough to become infinite, its sequences run one at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
    real = segments.mask.flatten().nonzero().flatten()  # of rows one after another, as runs are
    flat = last.new_zeros(segments.batch * segments.length, *last.shape[1:]).index_copy(0, real, torch.cat(outputs))
    known = [x for x in states if x is not None]
    if not known:
        return flat.unflatten(0, (segments.batch, -1)), None
    states = [torch.zeros_like(known[0]) if x is None else x for x in states]
    return flat.unflatten(0, (segments.batch, -1)), torch.cat([x for x in states if x is not None])
