"""Routed experts of a loaded model: in memory, in memory as int8, or on disk until a token needs them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layers.experts.cache import ExpertCache, Read
from layers.experts.disk import OffloadedExperts
from layers.experts.int8 import Int8Experts
from layers.moe import Experts, SparseMoE
from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import GroupLayout
from qwen3next.checkpoints.group_weights import LEAVES, put
from qwen3next.checkpoints.quantised.weight import QuantisedWeight
from qwen3next.checkpoints.reader import CheckpointReader
from qwen3next.checkpoints.state_dict_adapter import ParamSlice, TensorSpec

PLACES = ("memory", "disk", "int8")


def routed(name: str) -> bool:
    """Whether a parameter of the model, by name, belongs to routed experts."""
    return ".mlp.experts." in name


def replace_experts(
    model: Any,
    opened: CheckpointReader,
    place: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    cache: int,
    layouts: Mapping[str, GroupLayout],
) -> None:
    """Replace the `Experts` of a model on the meta device by the module for `place`.

    Args:
        place: "int8" or "disk".
        dtype: dtype of experts after they are read; None means as stored.
        device: where experts in int8 are kept.
        cache: bytes of the cache for experts read from the files.
        layouts: of parameters that are kept in groups in that cache, which then hold for all layers.
    """
    if place == "disk":
        model.expert_cache = ExpertCache(cache)
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE):
            assert isinstance(module.experts, Experts)
            count, width, inner = module.experts.down_proj.shape
            full = f"{name}.experts."
            if place == "int8":
                with device:
                    experts: nn.Module = Int8Experts(width, inner, count)
            else:
                assert model.expert_cache is not None
                kind = dtype or opened.dtypes[f"{full}down_proj"]
                read = reader(opened, full)
                pair = tuple(layouts[f"{full}{leaf}"] for leaf in LEAVES) if f"{full}down_proj" in layouts else None
                kept = {"cache": model.expert_cache, "dtype": kind, "layouts": pair}
                experts = OffloadedExperts(width, inner, count, read=read, **kept)
            module.experts = experts


def fill_int8(model: Any, opened: CheckpointReader, entry: TensorSpec) -> None:
    """Quantise the experts in one tensor of the folder, with one expert in memory at a time."""
    (place,) = entry.places
    module_name, _, leaf = place.name.rpartition(".")
    experts = model.get_submodule(module_name)
    assert isinstance(experts, Int8Experts)
    inner = experts.down_proj.shape[2]
    for e, rows, x in _experts_in(opened, entry):
        if leaf == "down_proj":
            experts.fill("down_proj", e, x)
        elif rows.start is None:
            experts.fill("gate_proj", e, x[:inner])
            experts.fill("up_proj", e, x[inner:])
        else:
            experts.fill("gate_proj" if rows.start == 0 else "up_proj", e, x)


def _experts_in(opened: CheckpointReader, entry: TensorSpec) -> Iterator[tuple[int, slice, Tensor]]:
    (place,) = entry.places
    if place.index:
        yield *_expert(place), opened.read(entry.name)
    else:
        for e in range(entry.shape[0]):
            yield e, slice(None), opened.read(entry.name, e)


def _expert(place: ParamSlice) -> tuple[int, slice]:
    """The expert and the rows that a place selects."""
    e, rows = place.index
    assert isinstance(e, int)
    assert isinstance(rows, slice)
    return e, rows


def reader(opened: CheckpointReader, ours: str) -> Read:
    """A function that reads one expert from the folder's files, for the layer whose parameters start with `ours`.

    A tensor of the wanted dtype is read directly into its target; others are converted through a copy of one expert.
    """
    single: dict[int, list[tuple[str, str, slice]]] = {}
    fused: dict[str, str] = {}
    for entry in opened.wanted:
        place = entry.places[0]
        if place.name.startswith(ours):
            if place.index:
                e, rows = _expert(place)
                single.setdefault(e, []).append((place.name.removeprefix(ours), entry.name, rows))
            else:
                fused[place.name.removeprefix(ours)] = entry.name

    def read(e: int, gate_up: Any, down: Any) -> int:
        targets, count = {"gate_up_proj": gate_up, "down_proj": down}, 0
        parts = single.get(e) or [(leaf, name, slice(None)) for leaf, name in fused.items()]
        for leaf, name, rows in parts:
            target, index = targets[leaf], None if single else e
            if isinstance(target, GroupWeight):
                stored = opened.stored[name]
                assert isinstance(stored, QuantisedWeight)
                put(stored.read_groups(opened.files, index), target.at(rows))
            else:
                opened.read_into(name, index, target[rows])
            count += opened.nbytes(name, index)
        return count

    return read
