"""Load a model from a checkpoint folder in a released layout."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layers.deprecation import warn_renamed
from qwen3next.checkpoints.expert_weights import PLACES, fill_int8, replace_experts, routed
from qwen3next.checkpoints.group_weights import (
    HEAD,
    WEIGHTS,
    Rounding,
    fill_groups,
    fill_tied_head,
    group_layouts,
    hold_groups,
    tied_head,
)
from qwen3next.checkpoints.memory_needs import bytes_needed, check_memory
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.reader import CheckpointReader, cast_dtype, open_checkpoint
from qwen3next.config import ModelConfig
from qwen3next.files.fingerprint import files_as_they_are
from qwen3next.files.sizes import parse_bytes
from qwen3next.generation.generation_config import GenerationConfig
from qwen3next.inputs import as_device, as_dtype

M = TypeVar("M", bound=Any)  # a Qwen3Next


def load_as(
    kind: Callable[[ModelConfig], M],
    path: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    progress: bool,
    experts: str,
    expert_cache: str | int,
    weights: str = "dequantised",
    head: bool = True,
) -> M:
    """`q.load` for the model class `kind`; see there for arguments and errors; `head`: whether it is rounded."""
    cast, target = None if dtype == "auto" else as_dtype(dtype), as_device(device)
    if experts == "mmap":
        warn_renamed("experts='mmap'", "experts='disk'", stacklevel=4)
        experts = "disk"
    if experts not in PLACES:
        raise ValueError(f"experts {experts!r} is unknown: choose one of {', '.join(PLACES)}.")
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is unknown: choose one of {', '.join(WEIGHTS)}.")
    budget = parse_bytes(expert_cache)
    opened = open_checkpoint(path)
    with ExitStack() as failed:
        failed.callback(opened.files.close)
        if cast is None and (mixed := opened.mixed()):
            raise ValueError(mixed)
        generation = GenerationConfig.load(opened.folder, quiet=True)
        with torch.device("meta"):
            model = kind(opened.config)
        layouts = group_layouts(model, opened, weights, routed=experts)
        if not head:
            layouts.pop(HEAD, None)
        copied = layouts.get(HEAD) if tied_head(model) else None
        needs = bytes_needed(model, partial(_dtype, opened, cast), layouts)
        check_memory(needs, experts, target, opened.folder.name)
        if experts != "memory":
            places: Any = {"dtype": cast, "device": target, "cache": budget, "layouts": layouts}
            replace_experts(model, opened, experts, **places)
        hold_groups(model, {n: x for n, x in layouts.items() if experts == "memory" or not routed(n)}, target)
        ours = _allocate(model, opened, cast, target)
        with torch.no_grad():
            for entry in tracked(opened.wanted, progress, f"loading {opened.folder.name}"):
                if experts != "memory" and routed(entry.places[0].name):
                    if experts == "int8":
                        fill_int8(model, opened, entry)
                    continue
                if any(place.name in layouts for place in entry.places):
                    for name, error in fill_groups(model, opened, entry, layouts, ours).items():
                        model.rounding[name] = model.rounding.get(name, Rounding()) + error
                    continue
                for place, piece in zip(entry.places, entry.split(opened.read(entry.name)), strict=True):
                    place.of(ours).copy_(piece)
                del piece  # or it would be in memory with the next one
            if copied is not None:
                model.rounding[HEAD] = fill_tied_head(model, copied)
        if experts == "disk":
            failed.pop_all()  # the files stay open, as experts are read later
    model.layout, model.origin = opened.layout_to_save, opened.folder
    model.generation_config = generation
    model.experts_in = files_as_they_are(opened.folder) if experts == "disk" else ""
    model.weight_sums.loaded(opened.folder, model.state_dict(keep_vars=True), f"{cast} {experts} {weights}")
    return model


def _dtype(opened: CheckpointReader, cast: torch.dtype | None, name: str) -> torch.dtype:
    """The dtype that a parameter is kept in: that of its stored tensors where nothing is cast."""
    return opened.dtypes[name] if cast is None else cast_dtype(name, opened.dtypes[name], cast)


def _allocate(
    model: nn.Module, opened: CheckpointReader, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """Allocate every parameter in `dtype`, or in the dtype of its stored tensors if None; returns them by name."""
    shared: dict[Tensor, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter not in shared:
                empty = torch.empty(parameter.shape, dtype=_dtype(opened, dtype, name), device=device)
                shared[parameter] = nn.Parameter(empty)
            setattr(module, leaf, shared[parameter])
    return dict(model.named_parameters())
