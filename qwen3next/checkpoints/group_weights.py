"""Which weights of a loaded model stay in groups of 4 or 8 bits, and reading them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layers.linear import Linear
from layers.moe import Experts
from layers.quantised.experts import QuantisedExperts
from layers.quantised.group_weight import GROUP_SIZES, GroupWeight, quantise
from layers.quantised.held import GroupLayout, HoldsGroups
from layers.quantised.linear import QuantisedLinear
from qwen3next.checkpoints.quantised.weight import QuantisedWeight
from qwen3next.checkpoints.reader import CheckpointReader
from qwen3next.checkpoints.state_dict_adapter import TensorSpec

WEIGHTS = ("dequantised", "stored", "int8", "int4")
# Small projections whose outputs are logits, gates or decays: they stay as stored, and so do embedding, norms and conv.
AS_STORED = ("router", "shared_expert_gate", "in_proj_b", "in_proj_a")
LEAVES = ("gate_up_proj", "down_proj")  # of experts
HEAD = "lm_head.weight"
HEAD_BITS = 8  # of the head in "int4" too: its error is the logits'
ROWS_AT_ONCE = 2**12  # of a tied head that is rounded


@dataclass(frozen=True)
class Rounding:
    """How far a rounded weight is from the stored one: ‖rounded − stored‖² and ‖stored‖²."""

    wrong: float = 0.0
    whole: float = 0.0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(self.wrong + other.wrong, self.whole + other.whole)

    @property
    def error(self) -> float:
        """‖rounded − stored‖ / ‖stored‖ (Frobenius)."""
        return (self.wrong / self.whole) ** 0.5 if self.whole else 0.0


def roundable(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that may be kept in groups, by name, with their shapes (…, out, in)."""
    found: dict[str, tuple[int, ...]] = {}
    shared = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for prefix, module in model.named_modules():
        if type(module) is Experts:
            found |= {f"{prefix}.{name}": tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        elif type(module) is Linear and not prefix.endswith(AS_STORED) and id(module.weight) not in shared:
            found[f"{prefix}.weight"] = tuple(module.weight.shape)
    return found


def tied_head(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The head with its shape if it is tied to the embedding.

    "int8" and "int4" keep a rounded copy for it: a step reads all of the head, but one row of the embedding.
    """
    head, embedding = getattr(model, "lm_head", None), getattr(model, "embed_tokens", None)
    if type(head) is not Linear or not isinstance(embedding, nn.Embedding) or head.weight is not embedding.weight:
        return {}
    return {HEAD: tuple(head.weight.shape)}


def layout_for(name: str, shape: tuple[int, ...], weights: str, group_size: int | None = None) -> GroupLayout | None:
    """How "int8" or "int4" keeps a parameter; None if its rows do not consist of whole groups."""
    bits = HEAD_BITS if weights == "int8" or name == HEAD else 4
    size = GROUP_SIZES[bits] if group_size is None else group_size
    return None if shape[-1] % (size or 2) else GroupLayout(bits, size)


def layouts_for(model: nn.Module, weights: str, group_size: int | None = None) -> dict[str, GroupLayout]:
    """How "int8" or "int4" keeps the parameters of a model, by name."""
    shapes = roundable(model) | tied_head(model)
    every = {name: layout_for(name, shape, weights, group_size) for name, shape in shapes.items()}
    return _pairs({name: layout for name, layout in every.items() if layout is not None})


def _pairs(layouts: dict[str, GroupLayout]) -> dict[str, GroupLayout]:
    """The layouts without those of experts of which only one matrix has one."""
    lone = {
        name
        for name in layouts
        if name.endswith(LEAVES) and any(f"{name.rpartition('.')[0]}.{leaf}" not in layouts for leaf in LEAVES)
    }
    return {name: layout for name, layout in layouts.items() if name not in lone}


def group_layouts(model: nn.Module, opened: CheckpointReader, weights: str, *, routed: str) -> dict[str, GroupLayout]:
    """The parameters that stay in groups, by name, and how.

    Args:
        model: on the meta device.
        weights: "stored" keeps what the folder stores in groups; "int8" and "int4" also round what it does not.
        routed: where the routed experts are: in "memory"; in "int8", which has groups of its own; or on "disk", where
            they are as stored, in all layers or in none, for one cache serves all.
    """
    if weights == "dequantised":
        return {}
    stored: dict[str, set[GroupLayout | None]] = {}
    for entry in opened.wanted:
        weight = opened.stored[entry.name]
        kept = weight.group_layout(opened.files) if isinstance(weight, QuantisedWeight) else None
        for place in entry.places:
            stored.setdefault(place.name, set()).add(kept)
    found: dict[str, GroupLayout] = {}
    for name, shape in roundable(model).items():
        expert = name.endswith(LEAVES)
        if expert and routed == "int8":
            continue
        layouts = stored[name]
        layout = next(iter(layouts)) if len(layouts) == 1 else None  # those of all experts must be equal
        if layout is None and weights != "stored" and not (expert and routed == "disk"):
            layout = layout_for(name, shape, weights)
        if layout is not None:
            found[name] = layout
    if weights != "stored":
        heads = {name: layout_for(name, shape, weights) for name, shape in tied_head(model).items()}
        found |= {name: layout for name, layout in heads.items() if layout is not None}
    found = _pairs(found)
    experts = {name: found.get(name) for name in stored if name.endswith(LEAVES)}
    kinds = {tuple(experts[f"{name.rpartition('.')[0]}.{leaf}"] for leaf in LEAVES) for name in experts}
    if routed == "disk" and len(kinds) > 1:
        return {name: layout for name, layout in found.items() if name not in experts}
    return found


def hold_groups(model: nn.Module, layouts: dict[str, GroupLayout], device: torch.device) -> None:
    """Replace the modules of these parameters by modules with memory for groups."""
    modules = dict(model.named_modules())
    for owner in sorted({name.rpartition(".")[0] for name in layouts}):
        module = modules[owner]
        with device:
            if isinstance(module, Experts):
                parts = [layouts[f"{owner}.{leaf}"].empty(*getattr(module, leaf).shape) for leaf in LEAVES]
                made: nn.Module = QuantisedExperts(*parts)
            else:
                assert isinstance(module, Linear)
                made = QuantisedLinear(layouts[f"{owner}.weight"].empty(*module.weight.shape))
        if getattr(module, "bias", None) is not None:
            made.bias = module.bias  # on the meta device still
        parent, _, leaf = owner.rpartition(".")
        setattr(modules[parent], leaf, made)


def fill_groups(
    model: nn.Module, opened: CheckpointReader, entry: TensorSpec, layouts: dict[str, GroupLayout], ours: dict[str, Any]
) -> dict[str, Rounding]:
    """Read one tensor of the folder into its places, of which some are in groups. Returns the error of what it rounds.

    One expert of fused ones is in memory at a time.
    """
    weight = opened.stored[entry.name]
    kept = weight.group_layout(opened.files) if isinstance(weight, QuantisedWeight) else None
    errors: dict[str, Rounding] = {}
    fused = len(entry.shape) > 2
    for index in range(entry.shape[0]) if fused else [None]:
        groups = x = None
        if kept is not None and all(layouts.get(place.name) == kept for place in entry.places):
            assert isinstance(weight, QuantisedWeight)
            groups = weight.read_groups(opened.files, index)
        else:
            x = opened.read(entry.name, index)
        for i, place in enumerate(entry.places):
            at = place.index if index is None else (index,)
            if place.name not in layouts:
                assert x is not None
                place.of(ours).copy_(entry.split(x)[i])
                continue
            target = held(model, place.name)
            target = target.at(at) if at else target
            if groups is not None:
                piece = groups.each(partial(_piece, entry, i))
            else:
                assert x is not None
                exact = entry.split(x)[i].float()
                piece = rounded(exact, layouts[place.name])
                errors[place.name] = errors.get(place.name, Rounding()) + difference(piece, exact)
            put(piece, target)
    return errors


def fill_tied_head(model: Any, layout: GroupLayout) -> Rounding:
    """Round the embedding into the place of a head that was tied to it. Returns the error."""
    target, error = held(model, HEAD), Rounding()
    for begin in range(0, target.shape[0], ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        exact = model.embed_tokens.weight.detach()[rows].float()
        piece = rounded(exact, layout)
        put(piece, target.at(rows))
        error += difference(piece, exact)
    return error


def _piece(entry: TensorSpec, i: int, x: Tensor) -> Tensor:
    """What a stored tensor gives for its place number i."""
    return entry.split(x)[i]


def held(model: nn.Module, name: str) -> GroupWeight:
    """The weight in groups in the place of a parameter."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    assert isinstance(module, HoldsGroups)
    return module.held(leaf)


def rounded(x: Tensor, layout: GroupLayout) -> GroupWeight:
    """To the nearest codes. Raises: ValueError for weights that are not finite."""
    return quantise(x, layout.bits, layout.group_size, scale_dtype=layout.scale_dtype)


def difference(piece: GroupWeight, exact: Tensor) -> Rounding:
    return Rounding(float((piece.dequantise() - exact).norm()) ** 2, float(exact.norm()) ** 2)


def put(piece: GroupWeight, target: GroupWeight) -> None:
    target.codes.copy_(piece.codes)
    target.scale.copy_(piece.scale)
    if target.zero is not None:
        target.zero.copy_(piece.zero if piece.zero is not None else torch.tensor(0 if target.bits == 8 else 8))
