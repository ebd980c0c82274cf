"""Describe a whole model for its compiled step, and check it: a weight that is not understood is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import qwen3next.decoding.kinds  # noqa: F401  # registers the kinds
from layers.cpp.step import CODES, SCALES, EmbeddingAndHead, has_field
from qwen3next.decoding.description import CALLS, KINDS, REFUSED, Description, Held, Layer, Needed, Number, Place
from qwen3next.decoding.protocol import Decodable
from qwen3next.inputs import like

AROUND = ("embed_tokens", "norm", "lm_head")  # the blocks
ENDS = ("embed_tokens", "lm_head")  # of the model, which the MTP layer uses too
FLOATS = (torch.float32, torch.bfloat16, torch.float64)  # dtypes of weights and states that C++ reads
GROUPS = {"": tuple(CODES), "scale": tuple(SCALES), "zero": (torch.int8,)}  # the same for weights in groups


class Unsupported(Exception):
    """Why compiled code cannot run a model: a sentence without a full stop."""


def describe(model: Decodable) -> Description:
    """What a step needs of the modules around the blocks and of all blocks.

    Raises: Unsupported with the first reason why compiled code cannot run this model.
    """
    if reason := unknown_module(model):
        raise Unsupported(reason)
    found, width = Description(), like(model).shape[-1]
    places = Place("embedding", "embedding", (None, width)), Place("norm", "norm", (width,))
    with _parts_in_place():
        for name, place in zip(AROUND, (*places, Place("linear", "head", (None, width))), strict=True):
            _visit(getattr(model, name), name, place, found.around, found.sizes)
        for i, block in enumerate(model.blocks):
            found.layers.append(Layer())
            _visit(block, f"blocks.{i}", Place("block", shape=(width,)), found.layers[-1], found.sizes)
    return _checked(model, found)


def describe_mtp(model: Decodable) -> Description:
    """What drafts need of the MTP layer: its only block, and around it the model's embedding and head and all else.

    Raises: Unsupported with the first reason why compiled code cannot run this layer.
    """
    if model.mtp is None:
        raise Unsupported("the model has no MTP layer")
    around = [(name, getattr(model, name)) for name in ENDS]
    if reason := _unknown([*around, *model.mtp.named_modules(prefix="mtp")]):
        raise Unsupported(reason)
    found, whole, width = Description(), Layer(), like(model).shape[-1]
    with _parts_in_place():
        _visit(model.embed_tokens, "embed_tokens", Place("embedding", "embedding", (None, width)), whole, found.sizes)
        _visit(model.lm_head, "lm_head", Place("linear", "head", (None, width)), whole, found.sizes)
        _visit(model.mtp, "mtp", Place("mtp", shape=(width,)), whole, found.sizes)
    outer = {name for name, _ in EmbeddingAndHead._fields_}
    found.around.weights = [held for held in whole.weights if held.field in outer]
    found.layers.append(Layer([held for held in whole.weights if held.field not in outer], whole.settings))
    return _checked(model, found)


@contextmanager
def _parts_in_place() -> Iterator[None]:
    """Raises: Unsupported where an entry's module lacks a part."""
    try:
        yield
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise Unsupported(f"a module is not in its place ({error})") from None


def _checked(model: Decodable, found: Description) -> Description:
    for held in found.weights:
        _check(held, like(model).device)
    _check_sizes(model, found)
    return found


def unknown_module(model: Decodable) -> str | None:
    """The first module of a class that is not registered or whose call was replaced, in a sentence, or None."""
    around = [(name, getattr(model, name)) for name in AROUND]
    return _unknown([*around, *model.blocks.named_modules(prefix="blocks")])


def _unknown(named: list[tuple[str, nn.Module]]) -> str | None:
    for name, module in named:
        kind = type(module)
        if kind in REFUSED:
            return f"{name} is a {kind.__name__}: {REFUSED[kind]}"
        if kind not in KINDS:
            return f"{name} is a {kind.__name__}, which it does not know"
        if CALLS(kind) != KINDS[kind].calls:
            return f"the forward of {kind.__name__} was replaced"
    return None


def _visit(module: nn.Module, name: str, place: Place, layer: Layer, sizes: dict[str, Number]) -> None:
    """Add what the step needs of a module and its children to `layer` and `sizes`. Raises: Unsupported."""
    kind = KINDS[type(module)]
    if place.role not in kind.roles:
        raise Unsupported(f"{name} is a {type(module).__name__}, not a {place.role.replace('_', ' ')}")
    spec = kind.describe(module, place)
    if spec.refusal is not None:
        raise Unsupported(f"a layer {spec.refusal} ({name})")
    for size, value in spec.sizes.items():
        if sizes.setdefault(size, value) != value:
            raise Unsupported(f"{type(module).__name__}: {size} is not the same in all layers ({name})")
    layer.settings |= spec.settings
    for key in spec.weights.keys() | module._parameters.keys():
        tensor = module._buffers.get(key) if key in module._buffers else module._parameters.get(key)
        _take(tensor, f"{name}.{key}", spec.weights.get(key), layer)
    for key in (*spec.children, *(key for key in module._modules if key not in spec.children)):
        child, wanted = module._modules.get(key), spec.children.get(key)
        if child is not None and wanted is not None:
            _visit(child, f"{name}.{key}", wanted, layer, sizes)
        elif child is not None:
            for parameter, _ in child.named_parameters(prefix=f"{name}.{key}"):
                raise Unsupported(f"{parameter} is a weight that it does not know")
        elif wanted is not None and not wanted.optional:
            raise Unsupported(f"{name} has no {key}")


def _take(tensor: Tensor | None, name: str, needed: Needed | None, layer: Layer) -> None:
    if tensor is None:
        if needed is not None and not needed.optional:
            raise Unsupported(f"{name} is missing")
        return
    if needed is None or not has_field(needed.field):
        raise Unsupported(f"{name} is a weight that it does not know")
    layer.weights.append(Held(needed, name, tensor))


def _check(held: Held, device: torch.device) -> None:
    """Raises: Unsupported for a weight that C++ would misread."""
    x, shape = held.tensor, held.needed.shape
    kind: type[Tensor] = nn.Parameter
    dtypes: tuple[torch.dtype, ...] = FLOATS
    if held.needed.in_groups or held.needed.part:
        kind, dtypes = Tensor, GROUPS[held.needed.part]
    if type(x) is not kind:
        raise Unsupported(f"{held.name} is a {type(x).__name__}, and it knows nn.Parameter alone")
    if not x.is_contiguous() or x.dtype not in dtypes or x.device != device:
        raise Unsupported(f"{held.name} is not contiguous, elsewhere, or of a dtype that it does not know")
    if x.is_neg():
        raise Unsupported(f"{held.name} is a view that negates")
    fits = len(x.shape) == len(shape) and all(b in (None, a) for a, b in zip(x.shape, shape, strict=True))
    if not fits:
        raise Unsupported(f"{held.name} has the shape {tuple(x.shape)} where it expects {shape}")


def _check_sizes(model: Decodable, found: Description) -> None:
    """Raises: Unsupported for what no single module can see. Adds the sizes that belong to the model as a whole."""
    if not found.layers:
        raise Unsupported("blocks is empty")
    if like(model).dtype == torch.float64 and any(held.needed.in_groups for held in found.weights):
        raise Unsupported("it multiplies weights in groups in fp32 and bf16, not in fp64")
    rows, rotary, head_dim = len(like(model)), model.config.rotary_dim, found.sizes.get("head_dim")
    if rows < model.vocab_size:
        raise Unsupported(f"embed_tokens has {rows} rows and the vocabulary {model.vocab_size} tokens")
    found.sizes |= {"layers": len(found.layers), "width": like(model).shape[-1]}
    if head_dim is not None:
        if rotary > head_dim or rotary % 2:
            raise Unsupported(f"RoPE turns {rotary} of {head_dim} numbers a head")
        found.sizes["rotary"] = rotary
