"""Notice that calling a module would do more than the class says."""

from torch import nn

OF_ALL_MODULES = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def attached(*modules: nn.Module) -> bool:
    """Whether hooks wait at one of these modules or at all there are, or one has a `forward` of its own.

    Tracers, adapters and offloading attach so. A shortcut past a module's call may be taken only where this is False.
    """
    if any([bool(hooks) for hooks in OF_ALL_MODULES]):
        return True
    own = [
        bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        or "forward" in m.__dict__
        for m in modules
    ]
    return any(own)
