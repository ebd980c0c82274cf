"""Checkpoint folders in the released layout: config.json and safetensors, nothing else is read.

Every released tensor is described by one `Entry`: its name and shape, and the places in our parameters that it fills.
Reading splits a tensor into pieces, writing merges the pieces; the two are inverse to the bit.
"""

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3next.config import ModelConfig
from qwen3next.model import Qwen3Next, as_dtype

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A part of one of our parameters: the whole, or what `index` selects, always a view."""

    name: str
    index: tuple[int | slice, ...] = ()

    def of(self, ours: Tensors) -> Tensor:
        return ours[self.name][self.index] if self.index else ours[self.name]


@dataclass(frozen=True)
class Entry:
    """One released tensor: `split` gives the pieces for `places`, `merge` makes the tensor from them."""

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)
    merge: Callable[..., Tensor] = lambda x: x


def entries(config: ModelConfig) -> list[Entry]:
    """The tensors of a qwen3_next checkpoint, in the order of the layers."""
    c, width = config, config.hidden_size
    found = [
        _whole("model.embed_tokens.weight", "embed_tokens.weight", (c.vocab_size, width)),
        _whole("model.norm.weight", "norm.weight", (width,)),
    ]
    if not c.tie_word_embeddings:
        found.append(_whole("lm_head.weight", "lm_head.weight", (c.vocab_size, width)))
    for i, kind in enumerate(c.layer_types):
        found += _block(c, f"model.layers.{i}.", f"blocks.{i}.", kind, c.is_sparse(i))
    for i in range(c.mtp_num_hidden_layers):
        found.append(_whole("mtp.fc.weight", "mtp.fc.weight", (width, 2 * width)))
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            found.append(_whole(f"mtp.{norm}.weight", f"mtp.{norm}.weight", (width,)))
        found += _block(c, f"mtp.layers.{i}.", f"mtp.blocks.{i}.", "full_attention", c.num_experts > 0)
    return found


def _whole(released: str, ours: str, shape: tuple[int, ...]) -> Entry:
    return Entry(released, shape, (Place(ours),))


def _block(c: ModelConfig, theirs: str, ours: str, kind: str, sparse: bool) -> list[Entry]:
    width = c.hidden_size
    found = [_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", (width,)) for n in _BLOCK_NORMS]
    mixer = _linear_attention if kind == "linear_attention" else _full_attention
    found += mixer(c, theirs, ours)
    if not sparse:
        return found + _swiglu(f"{theirs}mlp.", f"{ours}mlp.", width, c.intermediate_size)
    inner, experts = c.moe_intermediate_size, f"{ours}mlp.experts."
    found.append(_whole(f"{theirs}mlp.gate.weight", f"{ours}mlp.router.weight", (c.num_experts, width)))
    for e in range(c.num_experts):
        for name, shape, tensor, rows in (
            ("gate_proj", (inner, width), "gate_up_proj", slice(0, inner)),
            ("up_proj", (inner, width), "gate_up_proj", slice(inner, 2 * inner)),
            ("down_proj", (width, inner), "down_proj", slice(None)),
        ):
            found.append(Entry(f"{theirs}mlp.experts.{e}.{name}.weight", shape, (Place(experts + tensor, (e, rows)),)))
    shared = "mlp.shared_expert."
    found += _swiglu(theirs + shared, ours + shared, width, c.shared_expert_intermediate_size)
    gate = "mlp.shared_expert_gate.weight"
    return [*found, _whole(theirs + gate, ours + gate, (1, width))]


_BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


def _swiglu(theirs: str, ours: str, width: int, inner: int) -> list[Entry]:
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return [_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", shape) for n, shape in shapes.items()]


def _full_attention(c: ModelConfig, theirs: str, ours: str) -> list[Entry]:
    theirs, ours = f"{theirs}self_attn.", f"{ours}self_attn."
    width, d = c.hidden_size, c.head_dim
    heads, kv = c.num_attention_heads, c.num_key_value_heads

    def split_gate(x: Tensor) -> tuple[Tensor, ...]:
        """Rows per head: d of the query, then d of its gate."""
        query, gate = x.unflatten(0, (heads, 2, d)).unbind(1)
        return query.flatten(0, 1), gate.flatten(0, 1)

    def merge_gate(query: Tensor, gate: Tensor) -> Tensor:
        return torch.stack([x.unflatten(0, (heads, d)) for x in (query, gate)], dim=1).flatten(0, 2)

    both = (Place(f"{ours}q_proj.weight"), Place(f"{ours}gate_proj.weight"))
    shapes = {"k_proj": (kv * d, width), "v_proj": (kv * d, width), "o_proj": (width, heads * d)}
    return [
        Entry(f"{theirs}q_proj.weight", (2 * heads * d, width), both, split_gate, merge_gate),
        *(_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", shape) for n, shape in shapes.items()),
        *(_whole(f"{theirs}{n}.weight", f"{ours}{n}.weight", (d,)) for n in ("q_norm", "k_norm")),
    ]


def _linear_attention(c: ModelConfig, theirs: str, ours: str) -> list[Entry]:
    theirs, ours = f"{theirs}linear_attn.", f"{ours}linear_attn."
    width, groups = c.hidden_size, c.linear_num_key_heads
    k, heads = c.linear_key_head_dim, c.linear_num_value_heads
    v = c.linear_value_head_dim * heads // groups  # value rows beside one key head
    keys, values, taps = groups * k, groups * v, c.linear_conv_kernel_dim

    def split_qkvz(x: Tensor) -> tuple[Tensor, ...]:
        """Rows per key head: its q, its k, the v and the z of the value heads that share it."""
        q, key, value, z = (p.flatten(0, 1) for p in x.unflatten(0, (groups, -1)).split((k, k, v, v), dim=1))
        return torch.cat((q, key, value)), z

    def merge_qkvz(qkv: Tensor, z: Tensor) -> Tensor:
        parts = (*qkv.split((keys, keys, values)), z)
        return torch.cat([p.unflatten(0, (groups, -1)) for p in parts], dim=1).flatten(0, 1)

    def split_ba(x: Tensor) -> tuple[Tensor, ...]:
        """Rows per key head: b, then a, of the value heads that share it."""
        b, a = x.unflatten(0, (groups, 2, -1)).unbind(1)
        return b.flatten(0, 1), a.flatten(0, 1)

    def merge_ba(b: Tensor, a: Tensor) -> Tensor:
        return torch.stack([p.unflatten(0, (groups, -1)) for p in (b, a)], dim=1).flatten(0, 2)

    def at(*names: str) -> tuple[Place, ...]:
        return tuple(Place(ours + name) for name in names)

    qkvz = at("in_proj_qkv.weight", "in_proj_z.weight")
    ba = at("in_proj_b.weight", "in_proj_a.weight")
    channels = 2 * keys + values
    return [
        Entry(f"{theirs}in_proj_qkvz.weight", (channels + values, width), qkvz, split_qkvz, merge_qkvz),
        Entry(f"{theirs}in_proj_ba.weight", (2 * heads, width), ba, split_ba, merge_ba),
        Entry(
            f"{theirs}conv1d.weight",
            (channels, 1, taps),
            at("conv_weight"),
            lambda x: (x.squeeze(1),),
            lambda x: x.unsqueeze(1),
        ),
        _whole(f"{theirs}A_log", f"{ours}A_log", (heads,)),
        _whole(f"{theirs}dt_bias", f"{ours}dt_bias", (heads,)),
        _whole(f"{theirs}norm.weight", f"{ours}norm.weight", (c.linear_value_head_dim,)),
        _whole(f"{theirs}out_proj.weight", f"{ours}out_proj.weight", (width, values)),
    ]


def to_released(config: ModelConfig, ours: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The released names and tensors for our parameters, or for anything of their shapes: gradients, moments."""
    for entry in entries(config):
        yield entry.name, entry.merge(*(place.of(ours) for place in entry.places))


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
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with ExitStack() as stack:
        files = {f: stack.enter_context(_open(folder / f)) for f in sorted(set(where.values()))}
        stored = _check(folder, config, wanted, where, files)
        with torch.device("meta"):
            model = Qwen3Next(config)
        ours = _allocate(model, wanted, stored, None if dtype == "auto" else as_dtype(dtype), torch.device(device))
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
    except Exception as error:
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
    return config.replace(mtp_num_hidden_layers=found, layer_types=config.layer_types)


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
