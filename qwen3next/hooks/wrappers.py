"""Module wrappers of torch: the wrapped module, and names without the wrappers' parts."""

from torch import nn

# Of activation checkpointing, torch.compile and FSDP.
INSIDE = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    while inner := next((module._modules[name] for name in INSIDE if name in module._modules), None):
        module = inner
    return module


def plain_name(name: str) -> str:
    """The name of a module or weight without the wrappers' parts."""
    return ".".join(part for part in name.split(".") if part not in INSIDE)
