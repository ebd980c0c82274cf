"""Notice that a model is no longer what a fast path was made for.

A compiled step and a CUDA graph read weights and settings where they were found once. Before each step a guard compares
the model with what it was then: modules, weights, settings, hooks. Whatever happened in between acts on that very step.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layers.dispatch.attached import attached
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.mlp import SwiGLU
from layers.moe import Experts, SparseMoE
from layers.norm import GatedRMSNorm, RMSNorm
from qwen3next.block import Block

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

ADDRESS = torch._C.TensorBase.data_ptr
ARMED, FORWARD, CALLS = attrgetter("armed"), attrgetter("forward"), attrgetter("forward", "__call__")
# Classes whose attributes are watched as they are set; others are compared.
WATCHED = (Linear, RMSNorm, GatedRMSNorm, GatedDeltaNet, GatedAttention, SwiGLU, SparseMoE, Experts, Block, HookPoint)
BACKENDS = ("backend", "linear_backend", "elementwise_backend")
changes = 0  # of an attribute of a module of these classes
DTYPE, WEIGHT = attrgetter("dtype"), itemgetter("weight")
SAME_MEMORY = torch._C.TensorBase.is_set_to  # same storage, place, sizes and strides


class Guard:
    """A model's modules, weights and settings as they are now, the MTP layer left out.

    Every weight's memory is kept alive, so that its address stays good even where the model lets go of it. The guard
    holds nothing that refers to the model itself.
    """

    def __init__(self, model: "Qwen3Next"):
        inner = [module for module in decoding_modules(model) if module is not model]
        self._points = [m for m in inner if isinstance(m, HookPoint)]
        self._modules = [m for m in inner if not isinstance(m, HookPoint)]
        self._classes = list({type(m) for m in inner})
        self._calls = list(map(FORWARD, self._classes))
        self._top, self._kind, self._config = dict(model._modules), type(model), model.config
        self._children = [m._modules for m in self._modules if m._modules]
        self._children_then = [dict(children) for children in self._children]
        self._weights = Weights([m._parameters for m in self._modules if m._parameters])
        self._changes = changes
        self._others = [m for m in self._modules if type(m) not in WATCHED]
        self._types = list(map(type, self._others))
        self._settings = [m.__dict__ for m in self._others]
        self._settings_then = [dict(settings) for settings in self._settings]
        self._whole = [m.__dict__ for m in self._modules]
        self._lengths = list(map(len, self._whole))  # who sets an attribute past `__setattr__` mostly adds one
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
                and self._weights.hold()
                and changes == self._changes
                and self._settings == self._settings_then
                and list(map(len, self._whole)) == self._lengths
                and list(map(type, self._others)) == self._types
                and list(map(FORWARD, self._classes)) == self._calls
            )
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError):
            return False  # something that cannot be compared has come: it is not what was there

    def watched(self, model: "Qwen3Next") -> bool:
        """Whether somebody looks inside, or chose how something inside runs: then the modules themselves run."""
        registered = RemovableHandle.next_id  # grows with every hook that is registered anywhere
        if self._hooked or registered != self._registered:
            self._registered, self._hooked = (
                registered,
                any(map(ARMED, self._points)) or attached(model, *self._modules),
            )
        return self._hooked or self._chosen or modes_act()


class Weights:
    """Where weights lie and how they are read: address, sizes, strides, dtype. Which object holds them is all the same.

    Tensors are never compared by ==: that would compare their numbers, which may be many, or have no memory.
    """

    def __init__(self, named: list[dict[str, nn.Parameter | None]]):
        plain: dict[int, Tensor] = {}  # each once, however often it is tied
        self._single: list[dict[str, nn.Parameter | None]] = []
        self._several: list[dict[str, nn.Parameter | None]] = []
        self._others: list[tuple[dict[str, nn.Parameter | None], str, object]] = []
        for names in named:
            found = [x for x in names.values() if x is not None]
            new = all(type(x) in (Tensor, nn.Parameter) and id(x) not in plain for x in found)
            if new and len(found) == 1 and names.get("weight") is not None:
                self._single.append(names)
            elif new and len(found) == len(names):
                self._several.append(names)
            else:  # tied, of other classes, or absent: the same object as before
                self._others += [(names, name, x) for name, x in names.items()]
                continue
            plain |= {id(x): x for x in found}
        tensors = self._now()
        self._addresses = list(map(ADDRESS, tensors))
        self._memory = [x.detach() for x in tensors]  # kept alive: no other tensor can get its address
        self._dtypes = list(map(DTYPE, tensors))
        self._guards: Any = None
        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        try:  # in a third of the time, by what torch.compile does it with, which is no public part of torch
            from torch._C._dynamo.guards import TensorGuards

            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        except Exception:  # moved or changed in some release: `hold` then compares by torch's public functions
            pass

    def _now(self) -> list[Tensor]:
        values: Iterator[Any] = chain(map(WEIGHT, self._single), *map(dict.values, self._several))
        return list(values)

    def hold(self) -> bool:
        """Whether nothing about them has changed. Raises: whatever comes of looking at what is no weight any more."""
        now = self._now()
        return (
            list(map(ADDRESS, now)) == self._addresses
            and all([names[name] is x for names, name, x in self._others])
            and (
                (self._guards is not None and self._guards.check(*now))
                # Whatever else TensorGuards minds: gradients wanted, modes of torch.
                or (all(map(SAME_MEMORY, now, self._memory)) and list(map(DTYPE, now)) == self._dtypes)
            )
        )


def _count_changes(kind: type[nn.Module]) -> None:
    """Let `changes` grow whenever an attribute of a module of this class is set or deleted."""
    set_, delete = kind.__setattr__, kind.__delattr__

    def __setattr__(module: nn.Module, name: str, value: Any) -> None:
        global changes
        changes += 1
        set_(module, name, value)

    def __delattr__(module: nn.Module, name: str) -> None:
        global changes
        changes += 1
        delete(module, name)

    kind.__setattr__, kind.__delattr__ = __setattr__, __delattr__  # type: ignore[method-assign, assignment]
    for name in ("register_parameter", "register_buffer", "register_module", "add_module"):
        setattr(kind, name, _counted(getattr(kind, name)))


def _counted(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> None:
        global changes
        changes += 1
        method(*args, **options)

    return call


for _kind in WATCHED:
    _count_changes(_kind)


def decoding_modules(model: "Qwen3Next") -> list[nn.Module]:
    """The model and all its modules but those of the MTP layer."""
    apart = set() if model.mtp is None else set(model.mtp.modules())
    return [module for module in model.modules() if module not in apart]


def chooses(module: nn.Module) -> bool:
    """Whether a module was told how to run: by name, by `model.expose`, or by a `forward` of its own."""
    settings = module.__dict__
    return bool(
        "forward" in settings
        or named_backend(module)
        or settings.get("exposed_pattern")
        or settings.get("exposed_positions")
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


def watched(model: "Qwen3Next") -> bool:
    """As `Guard.watched`, of a model as it is now."""
    modules = decoding_modules(model)
    armed = any(m.armed for m in modules if isinstance(m, HookPoint))
    return armed or attached(*modules) or any(map(chooses, modules)) or modes_act()
