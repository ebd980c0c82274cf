"""Find what is attached to modules: hooks, and `forward` methods of single instances."""

from torch import nn

OF_ALL_MODULES = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def attached(*modules: nn.Module) -> bool:
    """Whether one of these modules has a hook or a `forward` of its own, or a hook of all modules is registered.

    Tracers, adapters and offloading attach in these ways. Code may skip a module's call only if this is False.
    """
    if any([bool(hooks) for hooks in OF_ALL_MODULES]):
        return True
    own = [
        bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        or "forward" in m.__dict__
        for m in modules
    ]
    return any(own)
