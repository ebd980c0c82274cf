"""Notice that a model is no longer what a fast path was made for.

A compiled step and a CUDA graph read weights and settings where they were found once. Before each step a guard compares
the model with what it was then: modules, weights, settings, hooks. Whatever happened in between acts on that very step.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from layers.dispatch.attached import attached
from layers.hook_point import HookPoint
from qwen3next.decoding import attribute_changes
from qwen3next.decoding.observers import chooses, modes_act
from qwen3next.decoding.protocol import Decodable, decoding_modules
from qwen3next.decoding.weight_memory import Weights

ARMED, FORWARD = attrgetter("armed"), attrgetter("forward")


class Guard:
    """A model's modules, weights and settings as they are now.

    Args:
        modules: those that matter; None means all but the MTP layer's.

    Every weight's memory is kept alive, so that its address stays good even where the model lets go of it. The guard
    holds nothing that refers to the model itself.
    """

    def __init__(self, model: Decodable, modules: Sequence[nn.Module] | None = None):
        inner = [module for module in decoding_modules(model) if module is not model]
        inner = inner if modules is None else list(modules)
        self._points = [m for m in inner if isinstance(m, HookPoint)]
        self._modules = [m for m in inner if not isinstance(m, HookPoint)]
        self._classes = list({type(m) for m in inner})
        self._calls = list(map(FORWARD, self._classes))
        self._top, self._kind, self._config = dict(model._modules), type(model), model.config
        self._children = [m._modules for m in self._modules if m._modules]
        self._children_then = [dict(children) for children in self._children]
        held = [m._parameters for m in self._modules if m._parameters] + [
            m._buffers for m in self._modules if m._buffers
        ]
        self._weights = Weights(held)
        self._changes = attribute_changes.changes
        self._others = [m for m in self._modules if type(m) not in attribute_changes.COUNTED]
        self._types = list(map(type, self._others))
        self._settings = [m.__dict__ for m in self._others]
        self._settings_then = [dict(settings) for settings in self._settings]
        self._whole = [m.__dict__ for m in self._modules]
        self._lengths = list(map(len, self._whole))  # who sets an attribute past `__setattr__` mostly adds one
        self._overridden = "forward" in model.__dict__
        self._chosen = self._overridden or any(map(chooses, inner))
        self._registered, self._hooked = -1, False

    def is_valid(self, model: Decodable) -> bool:
        """Whether modules, weights and settings are what they were, hooks aside."""
        try:
            return (
                model.config is self._config
                and type(model) is self._kind
                and model._modules == self._top
                and ("forward" in model.__dict__) == self._overridden
                and self._children == self._children_then
                and self._weights.hold()
                and attribute_changes.changes == self._changes
                and self._settings == self._settings_then
                and list(map(len, self._whole)) == self._lengths
                and list(map(type, self._others)) == self._types
                and list(map(FORWARD, self._classes)) == self._calls
            )
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError):
            return False  # something that cannot be compared has come: it is not what was there

    def hooked(self, model: Decodable) -> bool:
        """Whether hooks or tracers are attached, or a backend was chosen: then the modules themselves run."""
        registered = RemovableHandle.next_id  # grows with every hook that is registered anywhere
        if self._hooked or registered != self._registered:
            self._registered, self._hooked = (
                registered,
                any(map(ARMED, self._points)) or attached(cast(nn.Module, model), *self._modules),
            )
        return self._hooked or self._chosen or modes_act()
