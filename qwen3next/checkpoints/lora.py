"""LoRA adapters in PEFT's folders, trained on transformers' classes or on those of qwen3next/hf.py.

An adapter adds scale · B A to a weight. Rows of a released tensor that are several parameters here are split, B with
them; all parts share A. Writing merges them again.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3next.checkpoints.state_dict_adapter import Layout, TensorSpec, tensor_specs
from qwen3next.config import ModelConfig
from qwen3next.files.atomic import fresh_folder
from qwen3next.files.json_files import read_object
from qwen3next.files.tensor_files import Files, read_header, write

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SUFFIX = re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.weight$|\.lora_([AB])$")
EXPERTS = re.compile(r"^(.*\.mlp\.experts)((?:\.base_layer)*)$")
# Settings of PEFT that change the mathematics, and the one value that is supported.
PLAIN = {"use_dora": False, "lora_bias": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


@dataclass(frozen=True)
class LoraPart:
    """What an adapter adds to one parameter, or to the rows of it that `index` selects.

    Attributes:
        a: (r, in); of all experts at once (experts · r, in).
        b: (out, r); of all experts at once (out, r · experts), the expert changing fastest.
        experts: how many, if a and b are of all experts; else 0.
    """

    name: str
    index: tuple[int | slice, ...]
    a: Tensor
    b: Tensor
    scale: float
    experts: int = 0

    def delta(self) -> Tensor:
        """scale · B A, in fp32, in the shape of the parameter or its rows."""
        a, b = self.a.float(), self.b.float()
        if not self.experts:
            return self.scale * (b @ a)
        e = self.experts
        return self.scale * torch.einsum("ore,eri->eoi", b.unflatten(1, (-1, e)), a.unflatten(0, (e, -1)))


def read_adapter(folder: str | Path, config: ModelConfig, parameters: Mapping[str, Tensor]) -> list[LoraPart]:
    """The parts of the adapter in a PEFT folder.

    Args:
        parameters: the model's, by name.
    Raises: ValueError that names the folder for a missing file, a setting that is not supported, or a key that belongs
        to no parameter of the model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} is not a PEFT adapter: it must hold {CONFIG} and {WEIGHTS}.")
    settings = read_object(folder / CONFIG, "an adapter's configuration")
    _check(folder, settings)
    parts, homes = [], _Homes(config, parameters)
    for path, (a, b) in _pairs(folder, homes).items():
        rank = min(a.shape[0], b.shape[1])
        found = EXPERTS.match(path)
        if found and f"{homes.ours(found[1])}.gate_up_proj" in parameters:
            parts.append(_of_experts(folder, settings, homes, found, a, b))
            continue
        places = homes.of(path, len(b))
        if not places:
            raise ValueError(f"{folder}: {path} is no linear map of this model with {len(b)} rows: load its own model.")
        for name, index, rows in places(b):
            if (a.shape[1], rank) != (homes.columns(name), rows.shape[1]):
                raise ValueError(f"{folder}: {path} has the shapes {_shapes(a, b)}, which do not fit.")
            parts.append(LoraPart(name, index, a, rows, _scale(settings, path, rank)))
    return parts


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder} holds a {settings['peft_type']} adapter: only LORA is supported.")
    for key, plain in PLAIN.items():
        value = settings.get(key)
        if value and value != plain:
            raise ValueError(
                f"{folder} has {key} {value!r}, which is not supported: merge it with PEFT and load the result."
            )


def _pairs(folder: Path, homes: "_Homes") -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the path of their module, as saved without PEFT's own prefix.

    Beside a head or an embedding PEFT also stores the weight that was there: it must be the model's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    files = Files()
    try:
        for key, stored in read_header(folder / WEIGHTS).items():
            if key.endswith(".base_layer.weight"):
                name = homes.ours(key.removeprefix("base_model.model.").replace(".base_layer", ""))
                weight = homes.parameters.get(name)
                if weight is None or not torch.equal(weight.detach().cpu(), files.read(stored).to(weight.dtype)):
                    raise ValueError(
                        f"{folder / WEIGHTS}: {key} is not this model's weight: merge the adapter with PEFT."
                    )
                continue
            match = SUFFIX.search(key)
            if match is None:
                raise ValueError(f"{folder / WEIGHTS} holds {key}, which is neither lora_A nor lora_B of a linear map.")
            path = key[: match.start()].removeprefix("base_model.model.").replace("language_model.", "")
            found.setdefault(path, {})[match[1] or match[2]] = files.read(stored)
    finally:
        files.close()
    if lone := [path for path, pair in found.items() if len(pair) < 2]:
        raise ValueError(f"{folder / WEIGHTS} holds only one of lora_A and lora_B for {lone[0]}: copy it again.")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _shapes(a: Tensor, b: Tensor) -> str:
    return f"{tuple(a.shape)} and {tuple(b.shape)}"


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """lora_alpha / r, or / √r; both as patterns of module names say."""
    alpha = next((x for key, x in (settings.get("alpha_pattern") or {}).items() if _fits(key, path)), None)
    alpha = settings.get("lora_alpha", 8) if alpha is None else alpha
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _fits(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


class _Homes:
    """Where modules of transformers' classes, and of ours, are in the model."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor]):
        self.parameters, layout = parameters, Layout.released(config)
        fused = Layout(**{**vars(layout), "fused_experts": True, "fused_mtp_experts": True})
        self.released = {spec.name: spec for spec in tensor_specs(config, fused)}
        self._config, self._single = config, Layout(**{**vars(layout), "fused_experts": False})

    @staticmethod
    def ours(path: str) -> str:
        """A path of the classes in qwen3next/hf.py, by the names of `q.Qwen3Next`."""
        path = path.removeprefix("model.")
        return f"blocks.{path.removeprefix('layers.')}" if path.startswith("layers.") else path

    def columns(self, name: str) -> int:
        return self.parameters[name].shape[-1]

    def of(self, path: str, rows: int) -> Any:
        """A function from B to (parameter, index, its rows of B); None if there is no such module of so many rows."""
        name = f"{path}.weight"
        if ".experts." in path and name not in self.released:  # a linear map an expert
            self.released |= {spec.name: spec for spec in tensor_specs(self._config, self._single)}
        spec, own = self.released.get(name), f"{self.ours(path)}.weight"
        if spec is not None and len(spec.shape) == 2 and spec.shape[0] == rows:
            return lambda b: [
                (place.name, place.index, piece) for place, piece in zip(spec.places, spec.split(b), strict=True)
            ]
        if (weight := self.parameters.get(own)) is not None and weight.ndim == 2 and len(weight) == rows:
            return lambda b: [(own, (), b)]
        return None


def _of_experts(
    folder: Path, settings: Mapping[str, Any], homes: _Homes, found: re.Match[str], a: Tensor, b: Tensor
) -> LoraPart:
    """A part of all experts at once (PEFT's target_parameters), which wraps gate_up_proj first and down_proj around it.

    PEFT before 0.19 took a parameter's axes the other way round; shapes tell, or else the version in the settings.
    """
    prefix = homes.ours(found[1])
    fitting = []
    for leaf in ("gate_up_proj", "down_proj"):
        experts, out, inner = homes.parameters[f"{prefix}.{leaf}"].shape
        for swapped in (False, True):
            rows, columns = (inner, out) if swapped else (out, inner)
            if a.shape[1] == columns and b.shape[0] == rows and len(a) == b.shape[1] and not len(a) % experts:
                fitting.append((leaf, swapped, experts))
    if len({leaf for leaf, _, _ in fitting}) > 1:
        wanted = "gate_up_proj" if found[2] else "down_proj"
        fitting = [fit for fit in fitting if fit[0] == wanted]
    if len(fitting) > 1:
        version = re.match(r"(\d+)\.(\d+)", str(settings.get("peft_version") or ""))
        if version is None:
            raise ValueError(f"{folder}: the axes of {found[0]} cannot be told by shape: add peft_version to {CONFIG}.")
        fitting = [fit for fit in fitting if fit[1] == ((int(version[1]), int(version[2])) < (0, 19))]
    if not fitting:
        raise ValueError(f"{folder}: {found[0]} has the shapes {_shapes(a, b)}, which do not fit.")
    leaf, swapped, experts = fitting[0]
    rank = len(a) // experts
    if swapped:  # ΔWᵀ = B A: what was A's is B's, expert by expert
        first = a.unflatten(0, (experts, rank)).permute(2, 1, 0).reshape(a.shape[1], -1)
        a, b = b.unflatten(1, (rank, experts)).permute(2, 1, 0).reshape(-1, b.shape[0]), first
    scale = _scale(settings, f"{found[1]}.{leaf}", rank)
    return LoraPart(f"{prefix}.{leaf}", (), a.contiguous(), b.contiguous(), scale, experts)


def write_adapter(folder: str | Path, parts: Collection[LoraPart], config: ModelConfig) -> None:
    """Write a PEFT folder for transformers' class of this model; parts with different A are stacked to a higher rank.

    Raises: ValueError for what PEFT cannot hold there: an adapter of single experts.
    """
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for path, leaf, a, b, scale, rank in _modules(parts, config):
        inner = leaf == "gate_up_proj" and any(p.name.endswith(f"{_Homes.ours(path)}.down_proj") for p in parts)
        key = f"base_model.model.{path}{'.base_layer' if inner else ''}"
        tensors |= {f"{key}.lora_A.weight": a.contiguous(), f"{key}.lora_B.weight": b.contiguous()}
        target = f"{path}.{leaf}" if leaf else path
        (parameters if leaf else modules).append(target)
        alphas[target], ranks[target] = scale * rank, rank
    settings = {
        "peft_type": "LORA",
        "peft_version": "0.19.0",  # how the axes of experts lie
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": max(ranks.values(), default=8),
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": modules or None,
        "target_parameters": parameters or None,
        "rank_pattern": {re.escape(target): rank for target, rank in ranks.items()},
        "alpha_pattern": {re.escape(target): alpha for target, alpha in alphas.items()},
    }
    with fresh_folder(Path(folder), replaced=lambda name: name in (WEIGHTS, CONFIG)) as fresh:
        entries = [(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
        write(fresh / WEIGHTS, entries, tensors.items())
        (fresh / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _modules(parts: Collection[LoraPart], config: ModelConfig) -> Iterator[tuple[str, str, Tensor, Tensor, float, int]]:
    """Path, parameter (of experts), A, B, scale and rank of every released tensor that the parts change."""
    layout = Layout(**{**vars(Layout.released(config)), "fused_experts": True, "fused_mtp_experts": True})
    left = list(parts)
    for spec in tensor_specs(config, layout):
        names = [place.name for place in spec.places]
        here = [part for part in left if part.name in names and not part.index]
        left = [part for part in left if part not in here]
        if not here:
            continue
        path, _, leaf = spec.name.rpartition(".")
        if here[0].experts:
            yield path, leaf, here[0].a, here[0].b, here[0].scale, len(here[0].a) // here[0].experts
        else:
            yield path, "", *_stacked(spec, here)
    if left:
        raise ValueError(f"An adapter of {left[0].name} {left[0].index} alone has no place in PEFT: merge it.")


def _stacked(spec: TensorSpec, parts: list[LoraPart]) -> tuple[Tensor, Tensor, float, int]:
    """A, B, scale and rank of a whole released tensor."""
    rows = [len(x) for x in spec.split(torch.empty(spec.shape, device="meta"))]
    blocks: list[list[LoraPart]] = []
    for part in parts:
        same = next(
            (block for block in blocks if torch.equal(block[0].a, part.a) and block[0].scale == part.scale), None
        )
        if same is None or any(part.name == other.name for other in same):
            blocks.append([part])
        else:
            same.append(part)
    scale, found = blocks[0][0].scale, []
    for block in blocks:
        given = {part.name: part.b for part in block}
        zero = block[0].b.new_zeros
        pieces = [given.get(p.name, zero(n, block[0].b.shape[1])) for p, n in zip(spec.places, rows, strict=True)]
        found.append(spec.merge(*pieces) * (block[0].scale / scale))
    a, b = torch.cat([block[0].a for block in blocks]), torch.cat(found, dim=1)
    return a, b, scale, len(a)
