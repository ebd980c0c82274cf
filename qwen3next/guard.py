"""Notice that a model is no longer what a fast path was made for.

A compiled step and a CUDA graph read weights and settings where they were found once. Before each step a guard compares
the model with what it was then: modules, weights, settings, hooks. Whatever happened in between acts on that very step.
"""

from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layers.hook_point import HookPoint
from layers.linear import Linear

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

# Modules without settings of their own: whether an attribute came or went is all that counts.
PLAIN = (nn.Linear, Linear, nn.ModuleList, nn.Identity, HookPoint)
# Same storage, place, sizes and strides. `data_ptr` alone would miss a slice or a transposition of the same memory.
SAME_MEMORY = torch._C.TensorBase.is_set_to
DTYPE, ARMED, CALLS = attrgetter("dtype"), attrgetter("armed"), attrgetter("forward", "__call__")
END = object()
OF_ALL_MODULES = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


class Guard:
    """A model's modules, weights and settings as they are now, the MTP layer left out.

    Every weight's memory is kept alive, so that its address stays good even where the model lets go of it. The guard
    holds nothing that refers to the model itself.
    """

    def __init__(self, model: "Qwen3Next"):
        inner = [module for module in decoding_modules(model) if module is not model]
        self._points = [m for m in inner if isinstance(m, HookPoint)]
        self._modules = [m for m in inner if not isinstance(m, HookPoint)]
        self._types, self._classes = list(map(type, self._modules)), list({type(m) for m in inner})
        self._calls = list(map(CALLS, self._classes))
        self._top, self._kind, self._config = dict(model._modules), type(model), model.config
        self._children = [m._modules for m in self._modules if m._modules]
        self._children_then = [dict(children) for children in self._children]
        self._named = [m._parameters for m in self._modules]
        self._weights = [*chain.from_iterable(names.values() for names in self._named), END]
        self._tensors = [x for x in self._weights if type(x) in (Tensor, nn.Parameter)]  # others: the same object
        self._memory = [x.detach() for x in self._tensors]
        self._dtypes = list(map(DTYPE, self._tensors))
        set_apart = [m for m in self._modules if type(m) not in PLAIN or "backend" in m.__dict__]
        self._settings = [m.__dict__ for m in set_apart]
        self._settings_then = [dict(settings) for settings in self._settings]
        known = set(map(id, set_apart))
        self._plain = [m.__dict__ for m in inner if id(m) not in known]
        self._lengths = list(map(len, self._plain))
        self._overridden = "forward" in model.__dict__
        self._chosen = self._overridden or any(map(chooses, inner))
        self._registered, self._hooked = -1, False

    def holds(self, model: "Qwen3Next") -> bool:
        """Whether modules, weights and settings are what they were, hooks aside."""
        try:
            return (
                model.config is self._config
                and type(model) is self._kind
                and model._modules == self._top
                and ("forward" in model.__dict__) == self._overridden
                and self._children == self._children_then
                and all(map(is_, chain(chain.from_iterable(map(dict.values, self._named)), (END,)), self._weights))
                and all(map(SAME_MEMORY, self._tensors, self._memory))
                and list(map(DTYPE, self._tensors)) == self._dtypes
                and self._settings == self._settings_then
                and list(map(len, self._plain)) == self._lengths
                and list(map(type, self._modules)) == self._types
                and list(map(CALLS, self._classes)) == self._calls
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            return False  # something that cannot be compared has come: it is not what was there

    def watched(self, model: "Qwen3Next") -> bool:
        """Whether somebody looks inside, or chose how something inside runs: then the modules themselves run."""
        registered = RemovableHandle.next_id  # grows with every hook that is registered anywhere
        if self._hooked or registered != self._registered:
            self._registered, self._hooked = registered, any(map(ARMED, self._points)) or has_hooks(
                (model, *self._modules)
            )
        return self._hooked or self._chosen or modes_act()


def decoding_modules(model: "Qwen3Next") -> list[nn.Module]:
    """The model and all its modules but those of the MTP layer."""
    apart = set() if model.mtp is None else set(model.mtp.modules())
    return [module for module in model.modules() if module not in apart]


def has_hooks(modules: "tuple[nn.Module, ...]") -> bool:
    """Whether hooks of any kind wait at one of these modules, or at all modules there are."""
    own = (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
    return any(OF_ALL_MODULES) or any(own)


def chooses(module: nn.Module) -> bool:
    """Whether a module was told how to run: by name, by `model.expose`, or by a `forward` of its own."""
    settings = module.__dict__
    return bool(
        "forward" in settings
        or settings.get("backend", "auto") != "auto"
        or settings.get("exposed_pattern")
        or settings.get("exposed_positions")
    )


def modes_act() -> bool:
    """Whether torch's modes see or change every operation of this thread (FlopCounterMode and the like)."""
    if torch._C._len_torch_dispatch_stack():
        return True
    count = torch._C._len_torch_function_stack()
    return any(
        type(mode).__name__ != "DeviceContext"  # torch.set_default_device: makes new tensors elsewhere, that is all
        for mode in map(torch._C._get_function_stack_at, range(count))
    )


def watched(model: "Qwen3Next") -> bool:
    """As `Guard.watched`, of a model as it is now."""
    modules = decoding_modules(model)
    armed = any(m.armed for m in modules if isinstance(m, HookPoint))
    return armed or has_hooks(tuple(modules)) or any(map(chooses, modules)) or modes_act()
