"""Named points inside the model where a tensor can be read or replaced."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HookPoint(nn.Module):
    """An identity with a name. Give it forward hooks, `fn(module, args, output)`, to read or replace what passes.

    Idle, it does not go through torch's module call: it tests a number, for a quarter of the time. That number is a
    plain attribute, new with every hook that comes or goes, because `torch.compile` guards on those and not on torch's
    dictionaries of hooks: a hook that is added after compilation makes the frame compile again and fires.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""  # full name inside the model, set by the model
        self.armed = 0  # 0: nothing attached; else the number of the last change
        self._changes = 0

    def __call__(self, x: Tensor) -> Tensor:
        # Tracing libraries attach by placing a `forward` into the instance.
        if self.armed or "forward" in self.__dict__:
            return super().__call__(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """torch's; likewise the three below."""
        return self._noted(super().register_forward_hook(*args, **kwargs))

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_forward_pre_hook(*args, **kwargs))

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_full_backward_hook(*args, **kwargs))

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._noted(super().register_full_backward_pre_hook(*args, **kwargs))

    def _noted(self, handle: RemovableHandle) -> RemovableHandle:
        remove = handle.remove

        def remove_and_note() -> None:
            remove()
            self._note()

        handle.remove = remove_and_note  # type: ignore[method-assign]
        self._note()
        return handle

    def _note(self) -> None:
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        self._changes += 1
        self.armed = self._changes if any(hooks) else 0
