"""Checkpoint folders in the released layout: config.json and safetensors, nothing else is read."""

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3next.config import ModelConfig
from qwen3next.model import Qwen3Next, as_device, as_dtype
from qwen3next.released import Entry, Tensors, entries


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Qwen3Next:
    """Open a checkpoint folder (or a hub id, where huggingface_hub can reach it), streamed tensor by tensor.

    Args:
        dtype: "auto" keeps every tensor as stored; else linear maps and embeddings are cast, while A_log, dt_bias and
            the norms keep the precision they are stored in, which their arithmetic uses.
        device: "auto" is CUDA where there is one, else the CPU.
        progress: show a bar on the terminal.
    Raises: ValueError that names file and tensor for anything missing, left over, misshapen, truncated or unsafe;
        nothing is left half-loaded.
    """
    folder = _folder(path)
    config = ModelConfig.load(folder)
    where = _locate(folder)
    config = _with_mtp_as_found(config, where)
    wanted = entries(config)
    with ExitStack() as stack:
        files = {f: stack.enter_context(_open(folder / f)) for f in sorted(set(where.values()))}
        stored = _check(folder, config, wanted, where, files)
        with torch.device("meta"):
            model = Qwen3Next(config)
        ours = _allocate(model, wanted, stored, None if dtype == "auto" else as_dtype(dtype), as_device(device))
        with torch.no_grad():
            for entry in _tracked(wanted, progress, f"loading {folder.name}"):
                tensor = files[where[entry.name]].get_tensor(entry.name)
                for place, piece in zip(entry.places, entry.split(tensor), strict=True):
                    place.of(ours).copy_(piece)
    return model


def save(model: Qwen3Next, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and safetensors in the released layout, which transformers and inference engines read.

    The new files are made beside the folder and then take its place by renaming, so that a crash leaves a whole
    checkpoint: the new one, or the old one (between the two renames, as .NAME-old-PID). Other files of the folder, such
    as a tokenizer's, are kept.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    ours = dict(model.named_parameters())
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        for kept in folder.iterdir() if folder.is_dir() else ():
            if kept.suffix != ".safetensors" and kept.name not in (
                "config.json",
                "model.safetensors.index.json",
            ):
                (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, fresh / kept.name)
        _write_shards(fresh, model.config, ours, max_shard_bytes)
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        config = model.config.to_dict() | {"torch_dtype": dtype}
        config.pop("dtype", None)  # transformers' newer name for the same
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _write_shards(folder: Path, config: ModelConfig, ours: Tensors, limit: int) -> None:
    shards: list[list[Entry]] = [[]]
    used = total = 0
    for entry in entries(config):
        size = math.prod(entry.shape) * entry.places[0].of(ours).element_size()
        if used + size > limit and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used, total = used + size, total + size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {e.name: e.merge(*(p.of(ours).detach() for p in e.places)).contiguous().cpu() for e in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors' 0600 would hide the model from other users of the folder
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _folder(path: str | Path) -> Path:
    """A local folder, downloading a hub id's config and safetensors where the hub can be reached."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "~", "/")):
        raise ValueError(f"{path} is not a folder: give one that holds config.json and safetensors, or a hub id.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no client, no network, no such id: the client raises many kinds
        raise ValueError(f"{path} is neither a folder here nor to be had from the hub ({error}).") from error


def _locate(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not a safetensors index ({error!r}): copy it again.") from error
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index} puts {name} into {file!r}, which is not a safetensors file of this folder.")
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file} is missing and should hold {name}: copy the checkpoint again.")
        return where
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json.")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single.name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): copy it again.") from error


def _with_mtp_as_found(config: ModelConfig, where: Mapping[str, str]) -> ModelConfig:
    """A qwen3_next config.json does not say whether the MTP layer is there: the tensors do."""
    found = int(any(name.startswith("mtp.") for name in where))
    if config.mtp_num_hidden_layers and not found:
        warnings.warn("This checkpoint has no MTP tensors: loaded without multi-token prediction.", stacklevel=3)
    return config.replace(mtp_num_hidden_layers=found)


def _check(
    folder: Path,
    config: ModelConfig,
    wanted: list[Entry],
    where: Mapping[str, str],
    files: Mapping[str, safe_open],
) -> dict[str, torch.dtype]:
    """Every wanted tensor is there in its shape and nothing else is; the dtype each is stored in."""
    names = {file: set(opened.keys()) for file, opened in files.items()}
    if absent := sorted(name for name, file in where.items() if name not in names[file]):
        file = folder / where[absent[0]]
        raise ValueError(f"{file} lacks {_some(absent)}, which the index puts there: copy the checkpoint again.")
    present = {name for found in names.values() for name in found}
    if config.tie_word_embeddings:
        present.discard("lm_head.weight")  # some writers repeat the tied embedding; it is not read
    expected = {entry.name for entry in wanted}
    if extra := sorted(present - expected):
        raise ValueError(f"{folder} holds {_some(extra)}, which config.json has no place for.")
    if missing := sorted(expected - where.keys()):
        raise ValueError(f"{folder} lacks {_some(missing)}, which config.json asks for.")
    stored = {}
    for entry in wanted:
        piece = files[where[entry.name]].get_slice(entry.name)
        if tuple(piece.get_shape()) != entry.shape:
            raise ValueError(
                f"{folder / where[entry.name]}: {entry.name} has shape {list(piece.get_shape())}, "
                f"config.json asks for {list(entry.shape)}."
            )
        kind = piece.get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{folder / where[entry.name]}: {entry.name} is stored as {kind}, which is not supported.")
        stored[entry.name] = _DTYPES[kind]
    return stored


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _allocate(
    model: Qwen3Next,
    wanted: list[Entry],
    stored: Mapping[str, torch.dtype],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Give every parameter memory in its dtype; that of the tensors that fill it, unless cast."""
    filled_from: dict[str, set[torch.dtype]] = {}
    for entry in wanted:
        for place in entry.places:
            filled_from.setdefault(place.name, set()).add(stored[entry.name])
    shared: dict[Tensor, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter not in shared:
                kinds = filled_from[name]
                if len(kinds) > 1:
                    raise ValueError(f"{name} would be filled from tensors of dtypes {sorted(map(str, kinds))}.")
                exact = name.endswith(("A_log", "dt_bias", "norm.weight")) or "_norm_" in name or "layernorm" in name
                kind = next(iter(kinds)) if dtype is None or exact else dtype
                shared[parameter] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=kind, device=device))
            setattr(module, leaf, shared[parameter])
    return dict(model.named_parameters())


def _tracked(wanted: list[Entry], progress: bool, label: str) -> Iterator[Entry]:
    if not progress:
        yield from wanted
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(wanted, description=label, console=Console(stderr=True))  # stdout is for results
