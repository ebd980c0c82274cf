"""Write a model as a checkpoint folder in the released layout."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.experts.disk import OffloadedExperts
from layers.experts.int8 import Int8Experts
from layers.quantised.held import HoldsGroups
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.reader import INDEX, SINGLE, some
from qwen3next.checkpoints.state_dict_adapter import Layout, TensorSpec, tensor_specs
from qwen3next.files.atomic import fresh_folder
from qwen3next.files.tensor_files import write
from qwen3next.hooks.wrappers import plain_name

# Sidecar files of a text model, copied along with its weights.
SIDECAR_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def save(
    model: Any,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    layout: Layout | None = None,
    progress: bool = False,
) -> None:
    """Write config.json and safetensors in the released layout, which transformers and inference engines read.

    Copies the tokenizer, the chat template and generation_config.json from the folder that the model was loaded from,
    and keeps other files of the target folder. The new folder is written under a temporary name and then renamed, so
    that a crash leaves a complete checkpoint: the old one or the new one. A head that is no longer tied to the
    embedding is written as its own tensor.

    Args:
        model: a Qwen3Next.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
        layout: how tensors are arranged; None means as loaded, or as the model's family was released.
    Raises: ValueError for a model that the layout cannot store: adapters, or shapes that differ from its
        configuration.
    """
    folder = Path(folder)
    if missing := [
        name
        for name, module in model.named_modules()
        if isinstance(module, (OffloadedExperts, Int8Experts, HoldsGroups))
    ]:
        raise ValueError(
            f"{missing[0]} does not hold the released weights: save a model loaded with experts='memory', or use "
            "`qwen3next convert`."
        )
    ours, config = {plain_name(name): x for name, x in model.state_dict().items()}, model.config
    if config.tie_word_embeddings and not _same(ours.get("lm_head.weight"), ours.get("embed_tokens.weight")):
        config = config.replace(tie_word_embeddings=False)  # the head was replaced after loading
    found = model.layout or Layout.released(config)
    layout = layout or Layout(**{**vars(found), "prefix": "model."})  # other prefixes occur only with a vision tower
    wanted = list(tensor_specs(config, layout))
    _check_whole(ours, wanted, tied=config.tie_word_embeddings)
    with fresh_folder(folder, replaced=is_weights) as fresh:
        if model.origin is not None and model.origin.is_dir():
            copy_sidecar_files(model.origin, fresh)
        plan = [(e, e.places[0].of(ours).dtype) for e in wanted]
        tensors = ((e.name, e.merge(*(p.of(ours).detach() for p in e.places))) for e, _ in plan)
        write_shards(fresh, plan, tracked(tensors, progress, f"saving {folder.name}", len(plan)), max_shard_bytes)
        write_config(fresh, config.to_dict(), ours["embed_tokens.weight"].dtype)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.is_meta or b.is_meta:
        return True  # `_check_whole` reports it
    return a.data_ptr() == b.data_ptr() or (a.dtype == b.dtype and torch.equal(a, b))


def _check_whole(ours: dict[str, Tensor], wanted: list[TensorSpec], *, tied: bool) -> None:
    """Check that the wanted tensors hold all parameters of the model. Raises: ValueError otherwise."""
    places = {place.name for entry in wanted for place in entry.places}
    spare = ours.keys() - places - ({"lm_head.weight"} if tied else set())
    if spare:
        raise ValueError(
            f"The released layout has no place for {some(sorted(spare))}: merge adapters into the weights and undo "
            "parametrisations, or save model.state_dict()."
        )
    if missing := sorted(places - ours.keys()):
        raise ValueError(f"The model lacks {some(missing)}, which its configuration requires: change model.config.")
    for entry in wanted:
        pieces = [place.of(ours).detach() for place in entry.places]
        if any(piece.is_meta for piece in pieces):
            raise ValueError(f"{entry.places[0].name} is on the meta device: give it values before saving.")
        if len({piece.dtype for piece in pieces}) > 1:
            raise ValueError(
                f"{' and '.join(p.name for p in entry.places)} form one tensor on disk: give them the same dtype."
            )
        shape = tuple(entry.merge(*(piece.to("meta") for piece in pieces)).shape)
        if shape != entry.shape:
            raise ValueError(
                f"{entry.places[0].name} gives a tensor of shape {list(shape)}, but the configuration requires "
                f"{list(entry.shape)}: change model.config to match the weights."
            )


def is_weights(name: str) -> bool:
    """Whether a new checkpoint replaces this file: weights, their index or config.json."""
    return name.endswith(".safetensors") or name in ("config.json", INDEX)


def copy_sidecar_files(source: Path, target: Path) -> None:
    for name in SIDECAR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_config(folder: Path, values: dict[str, object], dtype: torch.dtype) -> None:
    """Write config.json for unquantised weights of that dtype."""
    about = ("dtype", "torch_dtype", "quantization_config")
    values = {k: v for k, v in values.items() if k not in about}
    if isinstance(nested := values.get("text_config"), dict):
        values["text_config"] = {k: v for k, v in nested.items() if k not in about}
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_shards(
    folder: Path, plan: list[tuple[TensorSpec, torch.dtype]], tensors: Iterator[tuple[str, Tensor]], limit: int
) -> None:
    """Write tensors, in the order of the plan, into as few files of at most `limit` bytes as possible, and an index."""
    if limit < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {limit}.")
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    used = total = 0
    for entry, dtype in plan:
        size = math.prod(entry.shape) * dtype.itemsize
        if used + size > limit and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append((entry.name, dtype, entry.shape))
        used, total = used + size, total + size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(folder / name, shard, (next(tensors) for _ in shard))
        weight_map |= {tensor: name for tensor, _, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
