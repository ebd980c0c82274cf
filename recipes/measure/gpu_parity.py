"""Compare every fast backend with its definition: values and gradients, packed, at lengths around chunk boundaries."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from layers.causal_conv import causal_conv
from layers.cross_entropy import linear_cross_entropy
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import OPERATIONS, why_not
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
    "cross_entropy": "torch",
}
Results = tuple[Tensor, ...]


def _packed(t: int, device: torch.device) -> Segments:
    """Two rows of three sequences each, with padding at both ends if the rows are long enough."""
    a, b = t // 3, t // 2
    number = torch.arange(t)
    ids = torch.stack([(number >= a).long() + (number >= b), (number >= t - b).long() + (number >= t - a)])
    if t > 8:
        ids[0, :3], ids[1, -2:] = -1, -1
    return Segments.from_document_ids(ids.to(device))


def _delta_rule(backend: str, x: list[Tensor], segments: Segments | None) -> Results:
    q, k = (l2_normalise(y, backend="torch") for y in x[:2])
    gates = -0.1 * x[3].abs(), x[4].sigmoid()
    exact = torch.promote_types(x[0].dtype, torch.float32)
    gates = gates[0].to(exact), gates[1].to(exact)
    o, state = gated_delta_rule(q * q.shape[-1] ** -0.5, k, x[2], *gates, segments=segments, backend=backend)
    return _real(o, segments), state


def _causal_conv(backend: str, x: list[Tensor], segments: Segments | None) -> Results:
    y, state = causal_conv(x[0], x[1], segments=segments, backend=backend)
    return _real(y, segments), state


def _attention(backend: str, x: list[Tensor], segments: Segments | None) -> Results:
    if backend in FUSED:
        segments = Segments.full(x[0]) if segments is None else segments
        return (_real(fused_attention(backend, x[0], x[1], x[2], segments=segments), segments),)
    mask = None if segments is None else segments.attention_mask
    return (_real(attend(x[0], x[1], x[2], mask=mask, backend=backend), segments),)


def _elementwise(backend: str, x: list[Tensor], _segments: Segments | None) -> Results:
    norm = GatedRMSNorm(x[0].shape[-1]).to(x[0])
    norm.backend = backend
    del norm.weight
    norm.weight = x[2]  # type: ignore[assignment]
    return (norm(x[0], x[1]),)


def _cross_entropy(backend: str, x: list[Tensor], _segments: Segments | None) -> Results:
    target = torch.arange(x[0].shape[0], device=x[0].device) * 7 % len(x[1])
    return (linear_cross_entropy(x[0], x[1], target, backend=backend),)


def _real(y: Tensor, segments: Segments | None) -> Tensor:
    return y if segments is None else y.masked_fill(~segments.mask.unflatten(1, (-1, *[1] * (y.ndim - 2))), 0.0)


CASES: dict[str, tuple[Callable[[str, list[Tensor], Segments | None], Results], Callable[[int], list[tuple]]]] = {
    "delta_rule": (
        _delta_rule,
        lambda t: [(2, t, 2, 64), (2, t, 2, 64), (2, t, 4, 64), (2, t, 4), (2, t, 4)],
    ),
    "causal_conv": (_causal_conv, lambda t: [(2, t, 64), (64, 4)]),
    "attention": (_attention, lambda t: [(2, t, 4, 64), (2, t, 2, 64), (2, t, 2, 64)]),
    "elementwise": (_elementwise, lambda t: [(2, t, 4, 64), (2, t, 4, 64), (64,)]),
    "cross_entropy": (_cross_entropy, lambda t: [(2 * t, 64), (97, 64)]),
}


def _run(case: Any, backend: str, x: list[Tensor], segments: Segments | None) -> tuple[Results, Results]:
    leaves = [y.detach().requires_grad_() for y in x]
    found = case(backend, leaves, segments)
    return found, torch.autograd.grad(torch.stack([y.float().square().mean() for y in found]).sum(), leaves)


def _apart(found: Results, expected: Results, floor: float) -> float:
    """The largest ‖found − expected‖ / ‖expected‖; the divisor is at least `floor` times the largest of those norms."""
    norms = [b.double().norm().item() for b in expected]
    least = max(floor * max(norms), 1e-12)
    errors = [(a.double() - b.double()).norm().item() for a, b in zip(found, expected, strict=True)]
    return max(error / max(norm, least) for error, norm in zip(errors, norms, strict=True))


def parity(device: torch.device, lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, Any]]:
    """Yield a row for each backend, dtype, length and packing: relative errors of values and gradients against fp64.

    A backend that cannot run here, or fails, gets a row with the reason.
    """
    for operation, definition in DEFINITIONS.items():
        case, shapes = CASES[operation]
        for name in (i.name for i in OPERATIONS[operation] if i.name != definition):
            for dtype in (torch.float32, torch.bfloat16):
                what = {"what": f"{operation}: {name}, {str(dtype).removeprefix('torch.')}"}
                if reason := why_not(operation, name, device, dtype):
                    yield what | {"not run": reason}
                    continue
                for t in lengths:
                    for packed in (False, True) if operation not in ("elementwise", "cross_entropy") else (False,):
                        row = what | {"tokens": t, "packed": packed}
                        try:
                            yield row | _compared(case, name, definition, shapes(t), dtype, device, t if packed else 0)
                        except Exception as error:  # reported as a row, so that the other kernels are still checked
                            yield row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def _compared(
    case: Any, name: str, definition: str, shapes: list[tuple], dtype: torch.dtype, device: torch.device, packed: int
) -> dict[str, Any]:
    x = [torch.randn(*s, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i, s in enumerate(shapes)]
    segments = _packed(packed, device) if packed else None
    values, gradients = _run(case, name, x, segments)
    exact = _run(case, definition, [y.double() for y in x], segments)
    floor = 0.3 if shapes[0][1] == 1 else 0.0  # gradients of q and k are zero for a single token
    found = _apart(values, exact[0], floor), _apart(gradients, exact[1], floor)
    return {"values": found[0], "gradients": found[1], "within": max(found) <= BOUND[dtype]}
