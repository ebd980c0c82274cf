"""LoRA adapters on a model: live or merged into its weights, several at once with weights, taken out to the bit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.quantised.linear import QuantisedLinear
from qwen3next.checkpoints.lora import LoraPart, read_adapter, write_adapter
from qwen3next.checkpoints.save_groups import groups_of
from qwen3next.files.tensor_files import memory_of


class Adapters:
    """The adapters of one model (`model.adapters`).

    Attributes:
        parts: what each adapter changes, by its name.
        active: the weight of each adapter that acts.
        merged: whether they are in the weights; else the layers add them, with the weights as they were loaded.
    """

    def __init__(self, model: Any):
        self.model = model
        self.parts: dict[str, list[LoraPart]] = {}
        self.active: dict[str, float] = {}
        self.merged = False
        self._handles: list[Any] = []
        self._originals: dict[str, Tensor] = {}

    def load(self, folder: str | Path, name: str = "") -> str:
        """Read a PEFT folder; `use` makes it act. Returns its name, which is the folder's if none is given.

        Raises: ValueError for a name that is taken, or as `read_adapter`.
        """
        name = name or Path(folder).resolve().name
        if name in self.parts:
            raise ValueError(f"There is an adapter {name!r} already: give this one another name.")
        parameters = dict(self.model.named_parameters())
        like = next(iter(parameters.values()))
        in_groups = {name: torch.empty(w.shape, device="meta") for name, w in groups_of(self.model)}
        parts = read_adapter(folder, self.model.config, parameters | in_groups)
        for part in parts:
            if part.name in in_groups and (part.index or part.experts):
                raise ValueError(
                    f"{folder} changes {part.name}, whose experts are in groups of 4 or 8 bits: load the model with "
                    "weights='dequantised' for it."
                )
        moved: dict[int, Tensor] = {}

        def here(x: Tensor) -> Tensor:  # parts that share A go on sharing it
            return moved.setdefault(id(x), x.to(like.device))

        self.parts[name] = [LoraPart(p.name, p.index, here(p.a), here(p.b), p.scale, p.experts) for p in parts]
        return name

    def use(self, chosen: str | Mapping[str, float] | None = None) -> None:
        """Let these adapters act, in place of those that did; without any, the model is as it was loaded, to the bit.

        Args:
            chosen: a name, or names with the weight of each.
        Raises: ValueError for an unknown name.
        """
        active = {chosen: 1.0} if isinstance(chosen, str) else dict(chosen or {})
        if unknown := sorted(active.keys() - self.parts.keys()):
            raise ValueError(f"There is no adapter {unknown[0]!r}: {', '.join(self.parts) or 'none was loaded'}.")
        merged = self.merged
        self._take_out()
        self.active = active
        if merged:
            self.merge()
        else:
            self._attach()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapters to the weights, which is as fast as without; `unmerge` brings the weights back.

        Raises: ValueError where a weight is in groups of 4 or 8 bits.
        """
        if self.merged:
            return
        parameters = dict(self.model.named_parameters())
        if lacking := sorted(self._by_parameter().keys() - parameters.keys()):
            raise ValueError(
                f"{lacking[0]} is in groups of 4 or 8 bits and cannot take an adapter in: leave it live, or load the "
                "model with weights='dequantised'."
            )
        self._detach()
        for name, changes in self._by_parameter().items():
            weight = parameters[name]
            self._originals[name] = weight.detach().clone()
            weight.copy_(_changed(weight, changes))
        self.merged = True

    def unmerge(self) -> None:
        """Bring the weights back, to the bit, and let the layers add the active adapters."""
        if self.merged:
            self._take_out()
            self._attach()

    def remove(self, name: str) -> None:
        """Forget an adapter; if it acts, it no longer does. Raises: ValueError for an unknown name."""
        if name not in self.parts:
            raise ValueError(f"There is no adapter {name!r}: {', '.join(self.parts) or 'none was loaded'}.")
        if name in self.active:
            self.use({key: weight for key, weight in self.active.items() if key != name})
        del self.parts[name]

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as a folder that PEFT loads on transformers' class. Raises: as `write_adapter`."""
        if name not in self.parts:
            raise ValueError(f"There is no adapter {name!r}: {', '.join(self.parts) or 'none was loaded'}.")
        write_adapter(folder, self.parts[name], self.model.config)

    def _by_parameter(self) -> dict[str, list[tuple[LoraPart, float]]]:
        found: dict[str, list[tuple[LoraPart, float]]] = {}
        for name, weight in self.active.items():
            for part in self.parts[name]:
                found.setdefault(part.name, []).append((part, weight))
        return found

    @torch.no_grad()
    def _take_out(self) -> None:
        self._detach()
        parameters = dict(self.model.named_parameters())
        for name, original in self._originals.items():
            parameters[name].copy_(original)
        self._originals, self.merged = {}, False

    def _attach(self) -> None:
        """Hooks at the modules whose weights the active adapters change: the weights stay as they are."""
        digest = hashlib.sha256()
        for name, changes in self._by_parameter().items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if isinstance(module, (nn.Linear, QuantisedLinear)) and not any(part.index for part, _ in changes):
                self._handles.append(module.register_forward_hook(_adding(changes)))
            else:
                self._handles += _replacing(module, leaf, changes)
            for part, weight in changes:
                digest.update(f"{name} {part.index} {part.scale} {weight}".encode())
                for x in (part.a, part.b):
                    digest.update(memory_of(x.detach().cpu().contiguous()))
        self.model.live_adapters = digest.hexdigest() if self._handles else ""

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.model.live_adapters = [], ""


def _adding(changes: list[tuple[LoraPart, float]]) -> Any:
    """A forward hook that adds the adapters' products to a linear map's."""

    def add(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        for part, weight in changes:
            inner = F.linear(args[0].to(part.a.dtype), part.a)
            y = y + (F.linear(inner, part.b) * (part.scale * weight)).to(y.dtype)
        return y

    return add


def _replacing(module: nn.Module, leaf: str, changes: list[tuple[LoraPart, float]]) -> list[Any]:
    """Hooks by which a module runs with the changed weight, made anew in every call and dropped after it."""
    kept: list[Any] = []

    def before(_module: nn.Module, _args: Any) -> None:
        kept.append(module._parameters[leaf])
        module._parameters[leaf] = _changed(kept[-1], changes)

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        module._parameters[leaf] = kept.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def _changed(weight: Tensor, changes: list[tuple[LoraPart, float]]) -> Any:
    """The weight with the adapters added in fp32, and rounded once."""
    exact = weight.double() if weight.dtype == torch.float64 else weight.float()
    exact = exact.clone()
    for part, share in changes:
        exact[part.index] += share * part.delta().to(exact.dtype)
    return exact.to(weight.dtype)
