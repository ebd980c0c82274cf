"""Compare every fast backend with its definition in fp64: values and gradients.

Lengths are around the boundaries of chunks. Rows are whole, packed (several sequences in a row, padding at both ends),
padded, or continue a state; heads have the sizes of small models and those of the released one.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from layers.causal_conv import causal_conv
from layers.cross_entropy import linear_cross_entropy, whole
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import OPERATIONS, choose, run, why_not
from layers.dispatch.registry import function_of
from layers.dispatch.self_check import BOUND
from layers.gated_attention import attend
from layers.kernels.flash_attention import NAMES as FUSED
from layers.kernels.flash_attention import fused_attention
from layers.norm import GatedRMSNorm, l2_normalise
from layers.segments import Segments

LENGTHS = (1, 63, 64, 65, 500)
DEFINITIONS = {
    "delta_rule": "recurrent",
    "causal_conv": "torch",
    "attention": "eager",
    "elementwise": "torch",
    "experts": "loop",
    "cross_entropy": "whole",
}
Results = tuple[Tensor, ...]
Shapes = list[tuple[int, ...]]
Call = Callable[[str, list[Tensor], Segments | None], Results]


@dataclass(frozen=True)
class Variant:
    """One kind of input.

    Attributes:
        name: of the kind.
        shapes: of the tensors, for a number of tokens.
        rows: how the two rows are filled: "whole", "packed" or "padded".
        lengths: numbers of tokens; () are those that are asked for.
        gradients: whether these are compared too; without them, other kernels may run.
    """

    name: str
    shapes: Callable[[int], Shapes]
    rows: str = "whole"
    lengths: tuple[int, ...] = ()
    gradients: bool = True


@dataclass(frozen=True)
class Operation:
    """How an operation is called, and on what. `names`: backends beside those in the list of backends."""

    call: Call
    variants: tuple[Variant, ...]
    names: tuple[str, ...] = field(default=())


def _packed(t: int) -> Tensor:
    """Two rows of three sequences each, with padding at both ends if the rows are long enough."""
    a, b = t // 3, t // 2
    number = torch.arange(t)
    ids = torch.stack([(number >= a).long() + (number >= b), (number >= t - b).long() + (number >= t - a)])
    if t > 8:
        ids[0, :3], ids[1, -2:] = -1, -1
    return ids


def _padded(t: int) -> Tensor:
    """Two rows of one sequence each, the first padded on the left, the second on the right."""
    ids = torch.zeros(2, t, dtype=torch.long)
    if t > 8:
        ids[0, : t // 3], ids[1, -(t // 4) :] = -1, -1
    return ids


def segments_of(rows: str, t: int, device: torch.device) -> Segments | None:
    """Where the sequences are; None for whole rows."""
    if rows == "whole":
        return None
    return Segments.from_document_ids({"packed": _packed, "padded": _padded}[rows](t).to(device))


def _delta_rule(backend: str, x: list[Tensor], segments: Segments | None) -> Results:
    q, k = (l2_normalise(y, backend="torch") for y in x[:2])
    gates = -0.1 * x[3].abs(), x[4].sigmoid()
    exact = torch.promote_types(x[0].dtype, torch.float32)
    gates = gates[0].to(exact), gates[1].to(exact)
    before = x[5].to(exact) if len(x) > 5 else None
    o, state = gated_delta_rule(
        q * q.shape[-1] ** -0.5, k, x[2], *gates, state=before, segments=segments, backend=backend
    )
    return _real(o, segments), state


def _causal_conv(backend: str, x: list[Tensor], segments: Segments | None) -> Results:
    y, state = causal_conv(x[0], x[1], state=x[2] if len(x) > 2 else None, segments=segments, backend=backend)
    return _real(y, segments), state


def _attention(backend: str, x: list[Tensor], segments: Segments | None) -> Results:
    if segments is None:
        return (attend(x[0], x[1], x[2], backend=backend),)
    if backend in FUSED:
        return (_real(fused_attention(backend, x[0], x[1], x[2], segments=segments), segments),)
    return (_real(attend(x[0], x[1], x[2], mask=segments.attention_mask, backend=backend), segments),)


def _elementwise(backend: str, x: list[Tensor], _segments: Segments | None) -> Results:
    norm = GatedRMSNorm(x[0].shape[-1]).to(x[0])
    norm.backend = backend
    del norm.weight
    norm.weight = x[2]  # type: ignore[assignment]
    return (norm(x[0], x[1]),)


def _experts(backend: str, x: list[Tensor], _segments: Segments | None) -> Results:
    """Choices that do not depend on rounding: rows 0, 1, … take experts 0 and 1, 3 and 4, …"""
    n, e = len(x[0]), len(x[2])
    first = 3 * torch.arange(n, device=x[0].device)
    indices = torch.stack((first % e, (first + 1) % e), dim=1)
    if backend == "auto":  # without gradients and for few tokens, what decoding runs
        return (run("experts", "auto", x[0], x[0], x[1].sigmoid(), indices, x[2], x[3]),)
    return (function_of("experts", backend)(x[0], x[1].sigmoid(), indices, x[2], x[3]),)


def _cross_entropy(backend: str, x: list[Tensor], _segments: Segments | None) -> Results:
    target = torch.arange(x[0].shape[0], device=x[0].device) * 7 % len(x[1])
    if backend == "whole":
        return (whole(x[0], x[1], target),)
    return (linear_cross_entropy(x[0], x[1], target, backend=backend),)


def _real(y: Tensor, segments: Segments | None) -> Tensor:
    return y if segments is None else y.masked_fill(~segments.mask.unflatten(1, (-1, *[1] * (y.ndim - 2))), 0.0)


def _rule_shapes(key_heads: int, heads: int, d: int, *, b: int = 2, state: bool = False) -> Callable[[int], Shapes]:
    def shapes(t: int) -> Shapes:
        keys, values, gates = (b, t, key_heads, d), (b, t, heads, d), (b, t, heads)
        return [keys, keys, values, gates, gates, *([(b, heads, d, d)] if state else [])]

    return shapes


def _conv_shapes(channels: int, *, state: bool = False) -> Callable[[int], Shapes]:
    return lambda t: [(2, t, channels), (channels, 4), *([(2, 3, channels)] if state else [])]


def _attention_shapes(heads: int, kv_heads: int, d: int, *, before: int = 0) -> Callable[[int], Shapes]:
    return lambda t: [(2, t, heads, d), *[(2, before + t, kv_heads, d)] * 2]


def _expert_shapes(t: int) -> Shapes:
    return [(t, 64), (t, 2), (8, 96, 64), (8, 64, 48)]


_SMALL, _RELEASED = (2, 4, 64), (16, 32, 128)  # key heads, value heads, their size
CASES: dict[str, Operation] = {
    "delta_rule": Operation(
        _delta_rule,
        (
            Variant("whole", _rule_shapes(*_SMALL)),
            Variant("packed", _rule_shapes(*_SMALL), rows="packed"),
            Variant("padded", _rule_shapes(*_SMALL), rows="padded"),
            Variant("continued", _rule_shapes(*_SMALL, state=True)),
            Variant("heads 16:32 x 128", _rule_shapes(*_RELEASED, b=1, state=True), lengths=(65, 200)),
            Variant("decoding", _rule_shapes(*_SMALL, state=True), lengths=(1,), gradients=False),
            Variant("decoding, heads 16:32 x 128", _rule_shapes(*_RELEASED, state=True), lengths=(1,), gradients=False),
        ),
    ),
    "causal_conv": Operation(
        _causal_conv,
        (
            Variant("whole", _conv_shapes(64)),
            Variant("packed", _conv_shapes(64), rows="packed"),
            Variant("padded", _conv_shapes(64), rows="padded"),
            Variant("continued", _conv_shapes(64, state=True)),
            Variant("8192 channels", _conv_shapes(8192, state=True), lengths=(65,)),
            Variant("decoding", _conv_shapes(8192, state=True), lengths=(1,), gradients=False),
        ),
    ),
    "attention": Operation(
        _attention,
        (
            Variant("whole", _attention_shapes(4, 2, 64)),
            Variant("packed", _attention_shapes(4, 2, 64), rows="packed"),
            Variant("padded", _attention_shapes(4, 2, 64), rows="padded"),
            Variant("continued", _attention_shapes(4, 2, 64, before=37)),
            Variant("heads 16:2 x 256", _attention_shapes(16, 2, 256), lengths=(64, 65, 500)),
            Variant("heads 16:2 x 256, continued", _attention_shapes(16, 2, 256, before=70), lengths=(1, 65)),
            Variant(
                "decoding, heads 16:2 x 256", _attention_shapes(16, 2, 256, before=500), lengths=(1,), gradients=False
            ),
        ),
    ),
    "elementwise": Operation(
        _elementwise,
        (
            Variant("gated norm", lambda t: [(2, t, 4, 64), (2, t, 4, 64), (64,)]),
            Variant("gated norm, 32 heads x 128", lambda t: [(1, t, 32, 128), (1, t, 32, 128), (128,)], lengths=(65,)),
        ),
    ),
    "experts": Operation(
        _experts,
        (
            Variant("routed", _expert_shapes, lengths=(1, 8, 65)),
            Variant("decoding", _expert_shapes, lengths=(1, 3), gradients=False),
        ),
        names=("auto",),
    ),
    "cross_entropy": Operation(
        _cross_entropy, (Variant("rows", lambda t: [(2 * t, 64), (1009, 64)]),), names=("torch",)
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A backend, a dtype and a kind of input; `rows` makes the comparisons."""

    operation: str
    backend: str
    dtype: torch.dtype
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.operation}: {self.backend}, {str(self.dtype).removeprefix('torch.')}, {self.variant.name}"

    def rows(
        self, device: torch.device, lengths: tuple[int, ...] = LENGTHS, *, quick: bool = False
    ) -> Iterator[dict[str, Any]]:
        """A row for each length: relative errors of values and gradients.

        A backend that cannot run here, or raises, gets a row with the reason.

        Args:
            lengths: for inputs without lengths of their own, of which `quick` takes the first.
        """
        what = {"what": self.name}
        with torch.set_grad_enabled(self.variant.gradients):
            reason = unavailable(self.operation, self.backend, device, self.dtype)
        if reason is not None:
            yield what | {"not run": reason}
            return
        for t in self.variant.lengths[: 1 if quick else None] or lengths:
            row = what | {"tokens": t}
            try:
                yield row | self._compared(t, device)
            except Exception as error:  # reported as a row, so that the other lengths are still checked
                first = (str(error).splitlines() or [""])[0]
                yield row | {"failed": f"{type(error).__name__}: {first[:200]}"}

    def _compared(self, t: int, device: torch.device) -> dict[str, Any]:
        shapes, call, gradients = self.variant.shapes(t), CASES[self.operation].call, self.variant.gradients
        x = [
            torch.randn(*s, generator=torch.Generator().manual_seed(i)).to(device, self.dtype)
            for i, s in enumerate(shapes)
        ]
        segments = segments_of(self.variant.rows, t, device)
        with torch.set_grad_enabled(gradients):
            with patch.dict(os.environ, QWEN3NEXT_SELF_CHECK="0"):  # else a wrong kernel would refuse to run
                found = _run(call, self.backend, x, segments)
            exact = _run(call, DEFINITIONS[self.operation], [y.double() for y in x], segments)
        # Gradients of q and k are zero for a single token.
        floor = 0.3 if t == 1 else 0.0
        row: dict[str, Any] = {"values": _apart(found[0], exact[0], floor)}
        if gradients:
            row["gradients"] = _apart(found[1], exact[1], floor)
        if self.backend == "auto":
            row["runs"] = choose(self.operation, "auto", x[0])
        return row | {"within": max(row["values"], row.get("gradients", 0.0)) <= BOUND[self.dtype]}


def unavailable(operation: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run here, or None; that its own check at first use failed is no such reason."""
    listed = OPERATIONS.get(operation.partition(".")[0], ())
    if all(name != i.name for i in listed):
        return None
    with patch.dict(os.environ, QWEN3NEXT_SELF_CHECK="0"):
        reason = why_not(operation.partition(".")[0], name, device, dtype)
    return None if reason is not None and reason.startswith("checked here") else reason


def comparisons() -> Iterator[Comparison]:
    """All of them, the released model's operations and dtype first."""
    for dtype in (torch.bfloat16, torch.float32):
        for operation, case in CASES.items():
            listed = [i.name for i in OPERATIONS[operation] if i.name != DEFINITIONS[operation]]
            if operation == "attention":
                listed.remove("cpp")  # for CPUs, and not a function of this signature
            for backend in dict.fromkeys((*listed, *case.names)):
                for variant in case.variants:
                    if backend != "auto" or not variant.gradients:
                        yield Comparison(operation, backend, dtype, variant)


def parity(
    device: torch.device, lengths: tuple[int, ...] = LENGTHS, *, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of all comparisons."""
    for comparison in comparisons():
        yield from comparison.rows(device, lengths, quick=quick)


def _run(call: Call, backend: str, x: list[Tensor], segments: Segments | None) -> tuple[Results, Results]:
    """Results and the gradients of their mean squares; none where gradients are off."""
    wanted = torch.is_grad_enabled()
    leaves = [y.detach().requires_grad_(wanted) for y in x]
    found = call(backend, leaves, segments)
    if not wanted:
        return found, ()
    total = torch.stack([y.double().square().mean() for y in found]).sum()
    return found, torch.autograd.grad(total, leaves)


def _apart(found: Results, expected: Results, floor: float) -> float:
    """The largest ‖found − expected‖ / ‖expected‖; the divisor is at least `floor` times the largest of those norms.

    Infinite where anything is not a number.
    """
    norms = [b.double().norm().item() for b in expected]
    least = max(floor * max(norms), 1e-12)
    errors = [
        (a.double() - b.double()).norm().item() / max(n, least) for a, b, n in zip(found, expected, norms, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)
