"""The case by which fast implementations of attention are compared with the definition."""

from functools import partial

import torch

from layers.dispatch.registry import Results, implements
from layers.gated_attention import attend
from layers.kernels.cases import random, with_gradients
from layers.kernels.flash_attention import attend_fused


def attention(backend: str, device: torch.device, dtype: torch.dtype) -> Results:
    """The last 40 of 70 tokens look back, with key heads that are shared."""
    q, k, v = x = random(((1, 40, 4, 64), (1, 70, 2, 64), (1, 70, 2, 64)), device, dtype)
    return with_gradients((attend(q, k, v, backend=backend),), x)


implements("attention", "eager", definition=True)(partial(attend, backend="eager"))
for name in ("flash", "sdpa_flash"):
    implements("attention", name, checked_by=attention)(partial(attend_fused, name))
