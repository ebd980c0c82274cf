"""The cases by which fast implementations are compared with the definitions: small random inputs, and gradients."""

import torch
from torch import Tensor

import layers.causal_conv as conv
from layers.delta_rule import gated_delta_rule
from layers.dispatch.registry import Results
from layers.norm import l2_normalise


def delta_rule(backend: str, device: torch.device, dtype: torch.dtype) -> Results:
    """Two chunks and a bit, from a state, with key heads that are shared."""
    t = 130 if torch.is_grad_enabled() else 70
    shapes = ((1, t, 2, 64), (1, t, 2, 64), (1, t, 4, 64), (1, t, 4), (1, t, 4), (1, 4, 64, 64))
    x = random(shapes, device, dtype)
    q, k = (l2_normalise(y, backend="torch") for y in x[:2])
    gates = -0.1 * x[3].float().exp(), x[4].float().sigmoid()
    found = gated_delta_rule(q * 0.125, k, x[2], *gates, state=x[5].float(), backend=backend)
    return with_gradients(found, x)


def causal_conv(backend: str, device: torch.device, dtype: torch.dtype) -> Results:
    """A row of 70 tokens, from a state."""
    x = random(((1, 70, 64), (64, 4), (1, 3, 64)), device, dtype)
    y, _ = conv.causal_conv(x[0], x[1], state=x[2], backend=backend)
    return with_gradients((y,), x)


def random(shapes: tuple[tuple[int, ...], ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, the same on every call, of which gradients are taken where these are enabled."""
    made = [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    return [x.to(device, dtype).requires_grad_(torch.is_grad_enabled()) for x in made]


def with_gradients(found: Results, inputs: list[Tensor]) -> Results:
    """The results, followed by the gradients of the sum of their squares where gradients are enabled."""
    if not torch.is_grad_enabled():
        return found
    return *found, *torch.autograd.grad(torch.stack([x.float().square().sum() for x in found]).sum(), inputs)
