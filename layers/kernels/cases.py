"""The cases by which fast implementations are compared with the definitions: small random inputs, and gradients."""

import torch
from torch import Tensor

import layers.causal_conv as conv
from layers.delta_rule import gated_delta_rule
from layers.dispatch.registry import Results
from layers.norm import l2_normalise
from layers.segments import Segments


def delta_rule(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Results:
    """Two chunks and a bit from a state, as one row, as packed rows and as a row's last token; key heads are shared."""
    t, d = 130 if torch.is_grad_enabled() else 70, head_dim or 128
    shapes = ((1, t, 2, d), (1, t, 2, d), (1, t, 4, d), (1, t, 4), (1, t, 4), (1, 4, d, d))
    x = random(shapes, device, dtype)
    q, k = (l2_normalise(y, backend="torch") for y in x[:2])
    parts = q * d**-0.5, k, x[2], -0.1 * x[3].float().exp(), x[4].float().sigmoid()
    state, packed = x[5].float() / d**0.5, Segments.from_lengths([[33, 1, t - 34]], device)
    found = [
        *gated_delta_rule(*parts, state=state, backend=backend),
        *gated_delta_rule(*parts, state=state, segments=packed, backend=backend),
        *gated_delta_rule(*(y[:, -1:] for y in parts), state=state, backend=backend),
    ]
    return with_gradients(tuple(found), x)


def causal_conv(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    """A row of 70 tokens from a state, also with two sequences in it."""
    x = random(((1, 70, 64), (64, 4), (1, 3, 64)), device, dtype)
    packed = Segments.from_lengths([[33, 37]], device)
    found = [conv.causal_conv(x[0], x[1], state=x[2], segments=s, backend=backend)[0] for s in (None, packed)]
    return with_gradients(tuple(found), x)


def random(shapes: tuple[tuple[int, ...], ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, the same on every call, of which gradients are taken where these are enabled."""
    made = [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    return [x.to(device, dtype).requires_grad_(torch.is_grad_enabled()) for x in made]


def with_gradients(found: Results, inputs: list[Tensor]) -> Results:
    """The results, followed by the gradients of the sum of their squares where gradients are enabled."""
    if not torch.is_grad_enabled():
        return found
    return *found, *torch.autograd.grad(torch.stack([x.float().square().sum() for x in found]).sum(), inputs)
