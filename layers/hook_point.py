"""Named points inside the model where a tensor can be read or replaced."""

from torch import Tensor, nn


class HookPoint(nn.Module):
    """An identity with a name. Give it forward hooks, `fn(module, args, output)`, to read or replace what passes.

    Idle, it costs an attribute look-up and two tests, about a tenth of an ordinary module call: `__call__` goes
    through torch's hook machinery only when something is attached. `torch.compile` guards on what is tested here, so
    a hook that is added after compilation makes the frame compile again and fires.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""  # full name inside the model, set by the model

    def __call__(self, x: Tensor) -> Tensor:
        if self.armed:
            return super().__call__(x)
        return x

    @property
    def armed(self) -> bool:
        """Whether anything is attached: torch hooks, or a replaced `forward` (how tracing libraries attach)."""
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or "forward" in self.__dict__
        )

    def forward(self, x: Tensor) -> Tensor:
        return x
