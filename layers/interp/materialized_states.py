"""The gated delta rule with hook points: recurrent states at chosen tokens, its matrix, what tokens recall and write.

The sequence is cut after each chosen token, and the parts run one after another on any backend. The state between two
parts passes a hook point, so a patched state acts on every later token and gradients pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.delta_rule import Gates, Keys, Rule, State, Values, gated_delta_rule
from layers.dispatch.backward_autocast import backward_without_autocast
from layers.dispatch.registry import implements
from layers.hook_point import HookPoint
from layers.interp.implicit_attention import carried, implicit_attention
from layers.interp.watched_rule import Watch, watched
from layers.kernels.isolation import GradientsApart, wild
from layers.norm import at_least_fp32
from layers.segments import Segments


@dataclass(frozen=True)
class Materialized:
    """What passes which hook point.

    Attributes:
        positions: absolute positions, rising, after which the recurrent state passes `state`, (b h k v).
        matrix: whether the output is made as A v + R S₀, with A (b h t s) passing `pattern`.
        recalled, written: as in `Watch`; None for rules without the delta.
    """

    positions: Sequence[int]
    matrix: bool
    state: HookPoint
    pattern: HookPoint
    recalled: HookPoint | None = None
    written: HookPoint | None = None


@implements("delta_rule_with_hooks", "torch", definition=True)
def layer_rule_with_hooks(
    layer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The rule of a `GatedDeltaNet`, which passes the points inside it.

    Raises: beside those of `materialized_delta_rule`, RuntimeError where a hook waits and packed sequences go on from a
        state each.
    """
    inputs = (q, k, v, log_decay, beta)
    if state is not None and segments is not None and segments.has_state_each(state):
        for point in layer.inside:
            point.refuse()
        return layer.rule(*inputs, state=state, segments=segments, backend=backend)
    points = (getattr(layer, name, None) for name in ("hook_recalled", "hook_written"))
    materialized = Materialized(
        layer.materialized_positions, layer.materialized_pattern, layer.hook_state, layer.hook_pattern, *points
    )
    return materialized_delta_rule(
        *inputs, materialized=materialized, state=state, segments=segments, backend=backend, rule=layer.rule
    )


def materialized_delta_rule(
    q: Keys,
    k: Keys,
    v: Values,
    log_decay: Gates,
    beta: Gates,
    *,
    materialized: Materialized,
    state: State | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
    rule: Rule = gated_delta_rule,
) -> tuple[Values, State]:
    """`gated_delta_rule`, or another `rule`, with hook points.

    Edits of A act on this layer's outputs, not on the state. Edits of the state and of what is written act on both.
    Raises: beside `gated_delta_rule`'s, RuntimeError for a hook on a tensor that is not materialized; ValueError where
        the rows of a batch reach a position in different columns.
    """
    inputs = (q, k, v, log_decay, beta)
    segments = Segments.full(q) if segments is None else segments
    cuts: list[tuple[int, int]] = []
    if materialized.positions and materialized.state.active:
        cuts = _columns(materialized.positions, segments)
    elif not materialized.positions:
        materialized.state.refuse()
    watch = None
    if (
        materialized.recalled is not None
        and materialized.written is not None
        and (materialized.recalled.active or materialized.written.active)
    ):
        watch = Watch(materialized.recalled, materialized.written, _positions(segments))
    o, final = _through(rule, inputs, cuts, materialized.state, state, segments, backend, watch)
    if materialized.matrix and materialized.pattern.active:
        through_a = _through_matrix(rule, inputs, materialized.pattern, state, segments)
        if cuts or watch:  # A does not include patches there; by linearity, their effect can be added
            through_a = through_a + (o - rule(*inputs, state=state, segments=segments, backend=backend)[0])
        o = through_a
    elif not materialized.matrix:
        materialized.pattern.refuse()
    return o, final


def _columns(positions: Sequence[int], segments: Segments) -> list[tuple[int, int]]:
    """(column, position) of those that lie in this call."""
    if segments.uniform_offset:
        past = segments.offsets[0]
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
    if segments.uniform_offset:
        return [segments.offsets[0] + i for i in range(segments.length)]
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
    """The delta rule in parts, with the state passing `hook` between them."""
    if not cuts:
        return watched(rule, *inputs, state=state, segments=segments, backend=backend, watch=watch)
    outputs, begin, end = [], 0, segments.length
    for column, position in [*cuts, (end - 1, None)]:
        part = slice(begin, column + 1)
        if part.start < part.stop:
            state, within = _enter(state, segments, part)
            seen = None if watch is None else Watch(watch.recalled, watch.written, watch.positions[part])
            pieces = (x[:, part] for x in inputs)
            o, state = watched(rule, *pieces, state=state, segments=within, backend=backend, watch=seen)
            outputs.append(o)
        if position is not None:
            assert state is not None
            state = hook(state, position=position)
        begin = column + 1
    assert state is not None
    return torch.cat(outputs, dim=1), state


def _enter(state: Tensor | None, segments: Segments, part: slice) -> tuple[Tensor | None, Segments | None]:
    """The state before a part's first tokens, cleared where a sequence begins there; and the part's segments."""
    if segments.document_ids is None:
        return state, None
    within = Segments.from_document_ids(segments.document_ids[:, part])
    begins = segments.resets[:, part].gather(1, within.first[:, None])
    return None if state is None else state.masked_fill(begins[..., None, None], 0.0), within


def _through_matrix(
    rule: Rule, inputs: tuple[Tensor, ...], hook: HookPoint, state: Tensor | None, segments: Segments
) -> Tensor:
    """A v + R S₀, with A passing `hook`."""
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
