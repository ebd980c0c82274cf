"""The gated delta rule laid open: its memory at chosen tokens, its matrix, what each token erases and writes.

The memory is shown by cutting the sequence after the chosen tokens and chaining the parts by their states, on whatever
kernel runs; so a patched memory acts on every later token, and gradients pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.autocast import backward_without_autocast
from layers.delta_rule import Gates, Keys, State, Values, Watch, gated_delta_rule
from layers.hook_point import HookPoint
from layers.implicit_attention import carried, implicit_attention
from layers.linear_rule import Rule
from layers.norm import at_least_fp32
from layers.segments import Segments
from layers.wild import GradientsApart, wild


@dataclass(frozen=True)
class Exposed:
    """What is to be shown and where it passes.

    Attributes:
        positions: absolute positions, rising, after whose tokens the memory passes `state`, (b h k v).
        matrix: whether the output is made as A v + C S₀, with A (b h t s) passing `pattern`.
        erased, written: as in `Watch`.
    """

    positions: Sequence[int]
    matrix: bool
    state: HookPoint
    pattern: HookPoint
    erased: HookPoint
    written: HookPoint


def exposed_delta_rule(
    q: Keys,
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    *,
    exposed: Exposed,
    state: State | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
    rule: Rule = gated_delta_rule,
) -> tuple[Values, State]:
    """`gated_delta_rule`, or another `rule`, with points on its way.

    Edits of A act on this layer's outputs, not on the memory; edits of the memory and of what is written act on both.
    Raises: beside `gated_delta_rule`'s, RuntimeError where a hook waits for what is not exposed; ValueError where the
        rows of a batch reach a position in different columns.
    """
    inputs = (q, k, v, log_decay, beta)
    segments = Segments.full(q) if segments is None else segments
    cuts: list[tuple[int, int]] = []
    if exposed.positions and exposed.state.active:
        cuts = _columns(exposed.positions, segments)
    elif not exposed.positions:
        exposed.state.refuse()
    watch = None
    if exposed.erased.active or exposed.written.active:
        watch = Watch(exposed.erased, exposed.written, _positions(segments))
    o, final = _through(rule, inputs, cuts, exposed.state, state, segments, backend, watch)
    if exposed.matrix and exposed.pattern.active:
        through_a = _through_matrix(rule, inputs, exposed.pattern, state, segments)
        if cuts or watch:  # A knows nothing of patches there; by linearity, what they change can be added
            through_a = through_a + (o - rule(*inputs, state=state, segments=segments, backend=backend)[0])
        o = through_a
    elif not exposed.matrix:
        exposed.pattern.refuse()
    return o, final


def _columns(positions: Sequence[int], segments: Segments) -> list[tuple[int, int]]:
    """(column, position) of those that lie in this call."""
    if segments.aligned:
        past = segments.past[0]
        return [(p - past, p) for p in positions if 0 <= p - past < segments.length]
    columns = []
    for p in positions:
        here = (segments.positions == p) & segments.mask
        if bool(here.any()):
            column = int(here.any(0).int().argmax())
            if not bool(here[:, column].all()) or int(here.sum()) != segments.batch:
                raise ValueError(
                    f"The rows of this batch do not reach position {p} in one and the same column, so there is no one "
                    "state to show: run them one at a time, or padded to the right with position inside every row."
                )
            columns.append((column, p))
    return sorted(columns)


def _positions(segments: Segments) -> list[int | tuple[int, ...]]:
    """Absolute position of every column; a tuple where rows differ."""
    if segments.aligned:
        return [segments.past[0] + i for i in range(segments.length)]
    rows = segments.positions.T.tolist()
    return [row[0] if len(set(row)) == 1 else tuple(row) for row in rows]


def _through(
    rule: Rule,
    inputs: tuple[Tensor, ...],
    cuts: list[tuple[int, int]],
    hook: HookPoint,
    state: Tensor | None,
    segments: Segments,
    backend: str,
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:
    """The delta rule in parts, the memory passing `hook` between them."""
    if not cuts:
        return rule(*inputs, state=state, segments=segments, backend=backend, watch=watch)
    outputs, begin, end = [], 0, segments.length
    for column, position in [*cuts, (end - 1, None)]:
        part = slice(begin, column + 1)
        if part.start < part.stop:
            state, within = _enter(state, segments, part)
            seen = None if watch is None else Watch(watch.erased, watch.written, watch.positions[part])
            pieces = (x[:, part] for x in inputs)
            o, state = rule(*pieces, state=state, segments=within, backend=backend, watch=seen)
            outputs.append(o)
        if position is not None:
            assert state is not None
            state = hook(state, position=position)
        begin = column + 1
    assert state is not None
    return torch.cat(outputs, dim=1), state


def _enter(state: Tensor | None, segments: Segments, part: slice) -> tuple[Tensor | None, Segments | None]:
    """The memory that a part's first tokens find, cleared where a sequence begins there; and the part's segments."""
    if segments.document_ids is None:
        return state, None
    within = Segments.from_document_ids(segments.document_ids[:, part])
    begins = segments.starts[:, part].gather(1, within.first[:, None])
    return None if state is None else state.masked_fill(begins[..., None, None], 0.0), within


def _through_matrix(
    rule: Rule, inputs: tuple[Tensor, ...], hook: HookPoint, state: Tensor | None, segments: Segments
) -> Tensor:
    """A v + C S₀, with A passing `hook`."""
    apart = GradientsApart(segments)
    q, k, v, log_decay, beta = inputs = apart.inputs(*inputs)
    dtype = v.dtype
    with torch.autocast(v.device.type, enabled=False):
        a = hook(implicit_attention(q, k, log_decay, beta, segments=segments, rule=rule))
        v = segments.real(at_least_fp32(v)).transpose(1, 2)
        if wild(segments, v):
            o = torch.zeros_like(v)
            for row, own in ((run.row, slice(run.begin, run.end)) for run in segments.runs):
                o[row, :, own] = a[row, :, own, own] @ v[row, :, own]
        else:
            o = a @ v
        if state is not None:
            o = o + carried(q, k, log_decay, beta, segments=segments, rule=rule) @ state
    backward_without_autocast((o,), (*inputs, state))
    return apart.output(o.transpose(1, 2).to(dtype))
