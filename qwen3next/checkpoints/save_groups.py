"""Write a model with weights in groups as a folder in compressed-tensors' pack-quantized format.

transformers with the compressed-tensors package, vLLM and `q.load` read it. The layout of the parts is that of
quantised/packed_ints.py.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import HoldsGroups
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.save import copy_sidecar_files, is_weights, write_config, write_shards
from qwen3next.checkpoints.state_dict_adapter import Layout, TensorSpec, tensor_specs
from qwen3next.files.atomic import fresh_folder

Part = tuple[TensorSpec, torch.dtype]


def save_groups(model: Any, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9, progress: bool = False) -> None:
    """Write config.json and safetensors: what is in groups packed, with its scales, all else as it is.

    Experts are written one by one, the layout that other programs read. The folder is written under a temporary name
    and then renamed; other files of it stay.

    Raises: ValueError for weights in fp32 scales of which released tensors share parts with plain ones.
    """
    folder = Path(folder)
    found = model.layout or Layout.released(model.config)
    layout = replace(found, prefix="model.", fused_experts=False, fused_mtp_experts=False)
    groups = dict(groups_of(model))
    plain = {name: x for name, x in model.state_dict().items()}
    plan: list[Part] = []
    makers: list[tuple[str, Any]] = []
    ignored: list[str] = []
    schemes: dict[tuple[int, int, bool], list[str]] = {}
    for entry in tensor_specs(model.config, layout):
        inside = [place.name in groups for place in entry.places]
        if not all(inside):
            if any(inside):
                raise ValueError(f"{entry.name} would be in groups in part: load with one kind of weights.")
            plan.append((entry, entry.places[0].of(plain).dtype))
            makers.append((entry.name, lambda entry=entry: entry.merge(*(p.of(plain).detach() for p in entry.places))))
            if len(entry.shape) == 2 and "embed_tokens" not in entry.name:
                ignored.append(entry.name.removesuffix(".weight"))
            continue
        whole = _merged(entry, groups)
        size = 0 if whole.scale.shape[-1] == 1 else whole.group_size
        schemes.setdefault((whole.bits, size, whole.zero is not None), []).append(entry.name.removesuffix(".weight"))
        for end, shape, dtype in _parts(whole):
            plan.append((TensorSpec(f"{entry.name}{end}", shape, ()), dtype))
            makers.append((f"{entry.name}{end}", lambda entry=entry, end=end: _packed(_merged(entry, groups), end)))
    with fresh_folder(folder, replaced=is_weights) as fresh:
        if model.origin is not None and model.origin.is_dir():
            copy_sidecar_files(model.origin, fresh)
        tensors: Iterator[tuple[str, Tensor]] = ((name, make()) for name, make in makers)
        write_shards(fresh, plan, tracked(tensors, progress, f"saving {folder.name}", len(plan)), max_shard_bytes)
        write_config(fresh, model.config.to_dict(), plain["embed_tokens.weight"].dtype)
        path = fresh / "config.json"
        values = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": _settings(schemes, ignored)}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def groups_of(model: Any) -> Iterator[tuple[str, GroupWeight]]:
    """The weights in groups of a model, by the name of the parameter in whose place they are."""
    for prefix, module in model.named_modules():
        if isinstance(module, HoldsGroups):
            for name in module._buffers:
                if name.endswith("_codes"):
                    leaf = name.removesuffix("_codes")
                    yield f"{prefix}.{leaf}", module.held(leaf)


def _merged(entry: TensorSpec, groups: dict[str, GroupWeight]) -> GroupWeight:
    """A released weight of the rows of its places, which are in the same groups."""
    pieces = [groups[p.name].at(p.index or ...) for p in entry.places]
    if len({(w.bits, w.group_size, w.scale.dtype, w.zero is None) for w in pieces}) > 1:
        raise ValueError(f"The parts of {entry.name} are in different groups: load with one kind of weights.")
    zero = None if pieces[0].zero is None else entry.merge(*(w.zero for w in pieces))
    return GroupWeight(entry.merge(*(w.codes for w in pieces)), entry.merge(*(w.scale for w in pieces)), zero)


def _parts(w: GroupWeight) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """What is stored of a weight: the end of its name, shape and dtype."""
    out, columns = w.shape
    per = 32 // w.bits
    yield "_packed", (out, -(-columns // per)), torch.int32
    yield "_scale", tuple(w.scale.shape), w.scale.dtype
    yield "_shape", (2,), torch.int64
    if w.zero is not None:
        yield "_zero_point", (-(-out // per), w.scale.shape[1]), torch.int32


def _packed(w: GroupWeight, end: str) -> Tensor:
    if end == "_scale":
        return w.scale
    if end == "_shape":
        return torch.tensor(w.shape)
    if end == "_packed":
        return _words(w.codes if w.bits == 4 else w.codes.view(torch.uint8) ^ 128)
    assert w.zero is not None
    points = (w.zero if w.bits == 4 else w.zero.int() + 128).to(torch.uint8).mT
    if w.bits == 4:
        points = torch.nn.functional.pad(points, (0, points.shape[1] % 2))
        points = points[:, ::2] | points[:, 1::2] << 4
    return _words(points.contiguous()).mT.contiguous()


def _words(codes: Tensor) -> Tensor:
    """Bytes (rows, n) as int32 words, the last filled with zeros."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).contiguous().view(torch.int32)


def _settings(schemes: dict[tuple[int, int, bool], list[str]], ignored: list[str]) -> dict[str, Any]:
    """quantization_config: one group of targets for each scheme; the largest are all linear maps but those named."""
    most = max(schemes, key=lambda scheme: len(schemes[scheme]), default=None)
    groups: dict[str, Any] = {}
    for number, (scheme, names) in enumerate(sorted(schemes.items(), key=lambda item: item[0] == most)):
        bits, size, zero = scheme
        weights = {"num_bits": bits, "type": "int", "symmetric": not zero, "group_size": size or None}
        weights["strategy"] = "group" if size else "channel"
        targets = ["Linear"] if scheme == most else names
        groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
    }
