"""The description of a model for its compiled step: its parts, and the registry of the kinds of modules.

A kind of module has one entry: a function that says which weights the step reads, by field of the C structures and
with their shapes, which sizes all layers must share, and which children do the rest. kinds.py has the entries, and
describe_model.py collects them for a whole model. From the result come the arguments for C++ (arguments.py), the
weights that stay alive, and the reason why a model cannot run compiled. The guard counts changes of these classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

CALLS = attrgetter("forward", "__call__")
Number = int | float
Shape = tuple[int | None, ...]  # None: any number


@dataclass(frozen=True)
class Place:
    """Where a module stands and what is wanted there.

    Attributes:
        role: what stands there, one of the roles that kinds are registered with.
        field: where its weights go, such as "attention.q"; of a block, nothing.
        shape: of the weight of a linear map or norm; of a block or feed-forward (width,).
        optional: may be absent.
    """

    role: str
    field: str = ""
    shape: Shape = ()
    optional: bool = False


@dataclass(frozen=True)
class Needed:
    """The field and shape of one parameter or buffer.

    Attributes:
        part: "" for a weight or for the codes of one in groups, whose "scale" and "zero" are others.
        in_groups: whether these are the codes of a weight in groups.
    """

    field: str
    shape: Shape
    optional: bool = False
    part: str = ""
    in_groups: bool = False


@dataclass
class StepSpec:
    """What the step needs of one module.

    Attributes:
        weights: by name of parameter or buffer. A parameter that is not named here is refused.
        children: by attribute name. A child with parameters that is not named here is refused.
        sizes: numbers that must be equal in all layers, by field of `Sizes`.
        settings: numbers of this layer alone, by field of `Layer`.
        refusal: why the step cannot run such a module, said of "a layer", or None.
    """

    weights: dict[str, Needed] = field(default_factory=dict)
    children: dict[str, Place] = field(default_factory=dict)
    sizes: dict[str, Number] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)
    refusal: str | None = None


@dataclass(frozen=True)
class Held:
    """A weight that the step reads: its field of the C structures and its name in the model."""

    needed: Needed
    name: str
    tensor: Tensor

    @property
    def field(self) -> str:
        return self.needed.field


@dataclass
class Layer:
    """One block: its weights and its own settings."""

    weights: list[Held] = field(default_factory=list)
    settings: dict[str, int] = field(default_factory=dict)


@dataclass
class Description:
    """A whole model: what stands around the blocks, the blocks, and the sizes that they share."""

    around: Layer = field(default_factory=Layer)
    layers: list[Layer] = field(default_factory=list)
    sizes: dict[str, Number] = field(default_factory=dict)

    @property
    def weights(self) -> Iterator[Held]:
        for layer in (self.around, *self.layers):
            yield from layer.weights


@dataclass(frozen=True)
class Kind:
    """A registered class: the roles that it can take, its entry, and how it was called when it was registered."""

    roles: tuple[str, ...]
    describe: Callable[[Any, Place], StepSpec]
    calls: tuple[Any, Any]  # of the class: if one is replaced, the replacement must be called


KINDS: dict[type, Kind] = {}
REFUSED: dict[type, str] = {}  # why compiled code cannot run these classes


def describes(*classes: type, roles: tuple[str, ...]) -> Callable[[Callable], Callable]:
    """Register a function (module, place) → StepSpec for these classes, which can stand in places of these roles."""

    def register(function: Callable[[Any, Place], StepSpec]) -> Callable[[Any, Place], StepSpec]:
        KINDS.update({kind: Kind(roles, function, CALLS(kind)) for kind in classes})
        return function

    return register


def refuses(kind: type, reason: str) -> None:
    """Say why compiled code cannot run modules of a class, without a full stop."""
    REFUSED[kind] = reason
