"""Who looks inside a model, or chose how its parts run: then the modules themselves run."""

import torch
from torch import nn

from layers.dispatch.attached import attached
from layers.hook_point import HookPoint
from qwen3next.decoding.protocol import Decodable, decoding_modules

BACKENDS = ("backend", "linear_backend", "elementwise_backend")


def hooked(model: Decodable) -> bool:
    """As `Guard.hooked`, of a model as it is now."""
    modules = decoding_modules(model)
    armed = any(m.armed for m in modules if isinstance(m, HookPoint))
    return armed or attached(*modules) or any(map(chooses, modules)) or modes_act()


def chooses(module: nn.Module) -> bool:
    """Whether a module was told how to run: by name, by `model.materialize`, or by a `forward` of its own."""
    settings = module.__dict__
    return bool(
        "forward" in settings
        or named_backend(module)
        or settings.get("materialized_pattern")
        or settings.get("materialized_positions")
    )


def named_backend(module: nn.Module) -> bool:
    """Whether a backend was chosen for it by name."""
    return any(module.__dict__.get(name, "auto") != "auto" for name in BACKENDS)


def modes_act() -> bool:
    """Whether torch's modes see or change every operation of this thread (FlopCounterMode and the like)."""
    if torch._C._len_torch_dispatch_stack():
        return True
    count = torch._C._len_torch_function_stack()
    return any(
        type(mode).__name__ != "DeviceContext"  # torch.set_default_device: makes new tensors elsewhere, that is all
        for mode in map(torch._C._get_function_stack_at, range(count))
    )
