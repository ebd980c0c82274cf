"""Modules that torch puts around others: what they wrap, and names without theirs."""

from torch import nn

# Of activation checkpointing, torch.compile and FSDP.
INSIDE = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself."""
    while inner := next((module._modules[name] for name in INSIDE if name in module._modules), None):
        module = inner
    return module


def plain_name(name: str) -> str:
    """A module's or weight's name as it is without wrappers."""
    return ".".join(part for part in name.split(".") if part not in INSIDE)
