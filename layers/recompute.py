"""Give up what a module made, and make it again in the backward pass: memory for time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layers.hook_point import HookPoint


def recomputing(module: nn.Module, *args: Any, run: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """module(*args, **kwargs), or `run`, a part of it; made again in the backward pass where `recomputed` says so.

    Without gradients there is nothing to give up, and a cache's state must not be extended twice. Hooks would fire a
    second time, and one that is gone by then would be missing in the gradients: a module with hooks at its points
    keeps all.
    """
    run = module if run is None else run
    wanted = getattr(module, "recomputed", False) and torch.is_grad_enabled() and kwargs.get("state") is None
    if not wanted or any(isinstance(m, HookPoint) and m.active for m in module.modules()):
        return run(*args, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
