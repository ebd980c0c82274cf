"""Save and load training states: everything that a run needs to resume exactly.

    save_state(folder, state, model, [optimizer])
    state = load_state(newest(folder), model, [optimizer])

A state is one safetensors file, `step-00000100.safetensors`: parameters, optimizer moments and torch's random states as
tensors, the rest as JSON in the header. It is one file, because renaming a file is atomic.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.training.tokenizer import explain_full_disk

KEEP = 2  # the newest, and the one before it in case the newest is damaged


@dataclass
class TrainingState:
    """The progress of a run, and what must be unchanged to resume it.

    Attributes:
        step: optimizer steps done.
        samples: windows seen; the batches are a pure function of this number.
        tokens: tokens seen, including document boundaries.
        elapsed: seconds of training, including those before resuming.
        total: planned number of steps; determines the learning-rate schedule.
        settings, model, fingerprint: the recipe's settings, the model's configuration and the data's fingerprint, to
            refuse the state of another run.
        threads: CPU threads; another number would change the last bits of sums.
        recent: loss and gradient norm of the last steps, with which spikes are compared.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    fingerprint: str
    threads: int
    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    total: int | None = None
    recent: list[list[float]] = field(default_factory=list)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; a state holds these."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def newest(folder: Path) -> Path | None:
    """The state file with the highest step in a folder, or None."""
    return max(folder.glob("step-*.safetensors"), default=None)


def save_state(
    folder: Path,
    state: TrainingState,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    average: dict[str, Tensor] | None = None,
) -> Path:
    """Write a state, with the average of the weights where there is one; then delete all but the newest two.

    The file is written under another name, synced and renamed, so a kill never leaves an incomplete state.

    Raises: OSError for a full disk; the older states remain.
    """
    taught = trained(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in taught.items()}
    for name, parameter in taught.items():
        for optimizer in optimizers:
            moments = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": value.detach() for key, value in moments.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in (average or {}).items()}
    tensors["random.torch"] = torch.get_rng_state()
    for i, rng in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"random.cuda.{i}"] = rng
    kind, words, *rest = np.random.get_state(legacy=True)
    header = asdict(state) | {"python": random.getstate(), "numpy": [kind, np.asarray(words).tolist(), *rest]}

    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".saving-*"):  # left by a killed process; only one run uses a folder at a time
        left.unlink()
    path = folder / f"step-{state.step:08d}.safetensors"
    fresh = folder / f".saving-{os.getpid()}"
    with explain_full_disk(folder):
        try:
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                fresh,
                metadata={"state": json.dumps(header)},
            )
            fresh.chmod(0o644)  # safetensors' 0600 would hide the file from other users of the folder
            _sync(fresh)
            os.replace(fresh, path)
            _sync(folder)  # otherwise the new name could be lost at a power failure
        except SafetensorError as error:  # it contains the system's error as text
            if "os error 28" in str(error):
                raise OSError(28, str(error)) from error
            raise
        finally:
            fresh.unlink(missing_ok=True)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
        _forget(old)
    return path


def _forget(path: Path) -> None:
    path.unlink()


def read_state(path: Path) -> TrainingState:
    """The JSON part of a state file. Raises: ValueError for a damaged file or one that is not a state."""
    return _read(path, tensors=False)[0]


def load_state(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], average: dict[str, Tensor] | None = None
) -> TrainingState:
    """Load a state into a model, its optimizers and the average of its weights, and restore every random generator.

    Raises: ValueError for a file that is damaged or belongs to another model.
    """
    state, header, tensors = _read(path, tensors=True)
    named = trained(model)
    stored = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    wrong = named.keys() ^ stored.keys() or {n for n, p in named.items() if p.shape != stored[n].shape}
    if wrong:
        raise ValueError(f"{path} belongs to another model: {min(wrong)} differs.")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(stored[name])
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in named}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter_name = name.split(".", 2)
            moments[parameter_name][key] = tensor
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    moments |= {name: {} for name in name_of.values() if name not in moments}
    for optimizer in optimizers:
        order = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
        filled = {i: moments[name] for i, name in enumerate(order) if moments[name]}
        optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, tensor in (average or {}).items():
        tensor.copy_(tensors[f"average.{name}"])

    version, internal, gauss = header["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(header["numpy"]))
    torch.set_rng_state(tensors["random.torch"])
    for i in range(torch.cuda.device_count()):
        if f"random.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)
    return state


def _read(path: Path, *, tensors: bool) -> tuple[TrainingState, dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            names = list(file.keys()) if tensors else []
            stored = {name: file.get_tensor(name) for name in names}
        header = {"recent": []} | header  # states of earlier releases have none
        fields = {name: header[name] for name in TrainingState.__dataclass_fields__}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to resume from the state before it.") from error
    return TrainingState(**fields), header, stored


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
