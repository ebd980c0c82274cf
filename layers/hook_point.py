"""Named points inside the model where a tensor can be read or replaced."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HookPoint(nn.Module):
    """An identity with a name. Register forward hooks, `fn(module, args, output)`, to read or replace its tensor.

    Without hooks it skips torch's module call and only tests `armed`, which takes a quarter of the time. `armed` is a
    plain attribute that changes with every hook added or removed. `torch.compile` guards on plain attributes and not
    on torch's dictionaries of hooks, so a hook that is added after compilation recompiles the frame and fires.

    Args:
        shape: of the tensor, in letters that docs/glossary.md lists; a dimension of size 1 is written 1.
        dtype: "model" for that of the model's activations, "fp32" for fp32 or better, else torch's name.
        route: what to call so that it fires, if it does not fire in every forward.
    Attributes:
        name: full name inside the model, set by the model.
        call: shared by a model's points; its entries are copied into `ctx` when a point fires.
        ctx: a dict for hooks: "layer", "position" (absolute, of the first token) and what hooks store in it.
    """

    def __init__(self, shape: str = "", *, dtype: str = "model", route: str = "") -> None:
        super().__init__()
        self.shape, self.dtype, self.route = shape, dtype, route
        self.name = ""
        self.call: dict[str, Any] = {}
        self.ctx: dict[str, Any] = {}
        self.armed = 0  # 0: nothing attached; else the number of the last change
        self._changes = 0

    @property
    def active(self) -> bool:
        """Whether it may fire. Ask before making a tensor for this point alone."""
        # Tracing libraries attach by giving the instance a `forward`.
        return bool(self.armed) or "forward" in self.__dict__

    def __call__(self, x: Tensor, position: int | tuple[int, ...] | None = None) -> Tensor:
        """x, or what hooks return in its place, in x's shape and dtype.

        `position` is that of x, if it is not that of the call's first token.
        """
        if self.armed or "forward" in self.__dict__:
            self.ctx.update(self.call)
            if position is not None:
                self.ctx["position"] = position
            return self._fitted(super().__call__(x), x)
        return x

    def _fitted(self, y: Any, x: Tensor) -> Tensor:
        """What hooks returned for x as a contiguous tensor of x's shape and dtype: broadcast, cast or copied.

        Raises: TypeError, ValueError for what cannot take x's place.
        """
        if y is x:
            return x
        name = self.name or "a hook point"
        if not isinstance(y, Tensor):
            raise TypeError(
                f"A hook at {name} returned {type(y).__name__}: return a tensor, or None to change nothing."
            )
        if y.device != x.device:
            raise ValueError(f"A hook at {name} returned a tensor on {y.device}: return one on {x.device}.")
        if y.is_complex() or (y.is_floating_point() and not x.is_floating_point()):
            raise ValueError(f"A hook at {name} returned {y.dtype}, which is no {x.dtype}: return that.")
        if y.shape != x.shape:
            try:
                y = y.expand(x.shape)
            except RuntimeError:
                raise ValueError(
                    f"A hook at {name} returned shape {tuple(y.shape)}, which does not broadcast to {tuple(x.shape)}, "
                    "that of what passes there."
                ) from None
        return y.to(x.dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def refuse(self) -> None:
        """Called instead of firing where this tensor is not made.

        Raises: RuntimeError if a hook waits here, except for hooks with `may_stay_silent`.
        """
        if any(not getattr(hook, "may_stay_silent", False) for hooks in self._hooks() for hook in hooks.values()):
            raise RuntimeError(f"{self.name or 'This hook point'} does not exist as the model runs now: {self.remedy}.")

    @property
    def remedy(self) -> str:
        """What to do about a point that does not fire."""
        return f"it needs {self.route}" if self.route else "nothing that was called runs it"

    def remove(self, chosen: Callable[[Any], bool]) -> None:
        """Detach the hooks that a predicate chooses."""
        found = [(hooks, n) for hooks in self._hooks() for n, hook in hooks.items() if chosen(hook)]
        for hooks, number in found:
            del hooks[number]
        if found:
            self._note()

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

    def _hooks(self) -> tuple[dict, ...]:
        return (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)

    def _note(self) -> None:
        self._changes += 1
        self.armed = self._changes if any(self._hooks()) else 0

    def extra_repr(self) -> str:
        return f"{self.shape!r}, {self.dtype}" if self.shape else ""
