"""Distributed checkpoints outside of a run: read without processes, export, and turn into plain training states.

torchtitan writes `OUT/checkpoint/step-N`, a folder of torch.distributed.checkpoint (DCP): parts of tensors, which any
number of processes reads. Here one process reads tensor by tensor. DCP pickles what is no tensor: open only your own.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import qwen3next as q
from qwen3next.checkpoints.reader import cast_dtype
from qwen3next.checkpoints.save import is_weights, write_config, write_shards
from qwen3next.checkpoints.state_dict_adapter import Layout, tensor_specs
from qwen3next.files.atomic import fresh_folder
from recipes.scaling.pieces import in_pieces, piece_names, rows_of, whole

PREFIX = "core."


def _alone(call: Callable[..., Any], state: dict[str, Any], folder: Path) -> None:
    """Load or save in this process, without DCP's warning that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        call(state, checkpoint_id=folder, no_dist=True)


def newest(out: Path) -> Path:
    """The last complete checkpoint of a run. Raises: ValueError if there is none."""
    found = [path.parent for path in out.glob("checkpoint/step-*/.metadata")]
    if not found:
        raise ValueError(f"There is no complete checkpoint in {out / 'checkpoint'}: let the run save one.")
    return max(found, key=lambda path: int(path.name.split("-")[1]))


class Reader(Mapping[str, Tensor]):
    """The tensors of a checkpoint by our parameters' names, each read when it is asked for.

    Args:
        folder: a step's folder.
        kind: "" for weights, "average" for their average, or a moment of the optimizers: "exp_avg", "exp_avg_sq",
            "step" or "momentum_buffer".
    """

    def __init__(self, folder: Path, config: q.ModelConfig, kind: str = "") -> None:
        self.folder, self.config, self.kind = folder, config, kind
        self.stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        with torch.device("meta"):
            self.names = [name for name, _ in q.Qwen3Next(config).named_parameters()]

    def __getitem__(self, name: str) -> Tensor:
        if self.kind == "step":
            return self._read(piece_names(self.config, name)[0])
        return whole(self.config, name, self._read)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a parameter in this kind."""
        return self.key(piece_names(self.config, name)[0]) in self.stored

    def key(self, piece: str) -> str:
        """The name in the checkpoint of a piece of a parameter."""
        if self.kind in ("", "average"):
            return f"{self.kind}.{PREFIX}{piece}".removeprefix(".")
        return f"optimizer.state.{PREFIX}{piece}.{self.kind}"

    def _read(self, piece: str) -> Tensor:
        key = self.key(piece)
        about = self.stored.get(key)
        if about is None or isinstance(about, BytesStorageMetadata):
            raise ValueError(f"{self.folder} lacks {key}: it belongs to another model than model.json says.")
        state = {key: torch.empty(about.size, dtype=about.properties.dtype)}
        _alone(load, state, self.folder)
        return state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_values(folder: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are no tensors, by their keys, as {"train_state": {"step": 0}}."""
    state = json.loads(json.dumps(keys))
    _alone(load, state, folder)
    return state


def export(out: Path, folder: Path, *, dtype: torch.dtype | None = None, average: bool = False) -> Path:
    """Write the last checkpoint of a run as a model folder in the released layout, one tensor at a time.

    Args:
        dtype: of linear maps and embeddings; norms, A_log and dt_bias, and all if None, keep that of the checkpoint.
        average: write the average of the weights instead.
    Raises: ValueError without a complete checkpoint, or for an average that the run does not keep.
    """
    config = q.ModelConfig.load(out / "model.json")
    source = Reader(newest(out), config, "average" if average else "")
    if average and not source.has("norm.weight"):
        raise ValueError(f"{out} keeps no average of its weights: train with --ema 0.999, or export the weights.")
    wanted = list(tensor_specs(config, Layout.released(config)))
    kept = {key: about.properties.dtype for key, about in source.stored.items() if hasattr(about, "properties")}
    of = {e.name: kept[PREFIX + piece_names(config, e.places[0].name)[0]] for e in wanted}
    if dtype is not None:
        of = {e.name: cast_dtype(e.places[0].name, of[e.name], dtype) for e in wanted}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        last: tuple[str, Tensor] | None = None  # experts of a layer are views of one tensor
        for e in wanted:
            pieces = []
            for place in e.places:
                if last is None or last[0] != place.name:
                    last = place.name, source[place.name]
                pieces.append(place.of({place.name: last[1]}))
            yield e.name, e.merge(*pieces).to(of[e.name])

    with fresh_folder(folder, replaced=is_weights) as fresh:
        write_shards(fresh, [(e, of[e.name]) for e in wanted], tensors(), 5 * 10**9)
        write_config(fresh, config.to_dict(), of[wanted[0].name])
    return folder


def plain_state(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The last checkpoint in memory, with the names of `recipes.training.checkpoints`.

    Returns: weights, moments and the average of weights as far as the run keeps it; and {"step", "samples"}, with
        "recent" of a run that skips spikes.
    """
    config, folder = q.ModelConfig.load(out / "model.json"), newest(out)
    weights, average = Reader(folder, config), Reader(folder, config, "average")
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name in weights:
        muon = Reader(folder, config, "momentum_buffer").has(name)
        for kind in ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{kind}.{name}"] = Reader(folder, config, kind)[name]
        if average.has(name):
            tensors[f"average.{name}"] = average[name]
    recent: dict[str, Any] = {"recent": []} if "train_state.recent" in weights.stored else {}
    values = read_values(folder, {"train_state": {"step": 0} | recent, "dataloader": {"samples": 0}})
    return tensors, values["train_state"] | values["dataloader"]


def write_plain(
    folder: Path, config: q.ModelConfig, tensors: Mapping[str, Tensor], groups: Mapping[str, dict[str, Any]],
    *, step: int, samples: int, tokens: int, recent: list[list[float]] | None = None,
) -> None:  # fmt: skip
    """Write a plain training state as a checkpoint that torchtitan resumes from.

    Args:
        folder: OUT/checkpoint/step-N.
        tensors: as `plain_state` gives them.
        groups: options of the optimizer's group of each parameter (lr, betas, weight_decay, ...).
        recent: losses and norms of the last steps, of a run that skips spikes.
    """
    state: dict[str, Any] = {}
    average: dict[str, Tensor] = {}
    moments: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            state |= {f"{PREFIX}{piece}": x.contiguous() for piece, x in in_pieces(config, name, tensor).items()}
            # torchtitan's schedule adds the first, and its optimizers' container the next two.
            chosen = {"initial_lr": groups[name]["lr"], "fused": False, "foreach": False} | groups[name]
            if "rows" in chosen:
                chosen["rows"] = rows_of(config, name, chosen["rows"])
            for piece in piece_names(config, name):
                options |= {f"param_groups.{PREFIX}{piece}.{option}": x for option, x in chosen.items()}
        elif kind == "average":
            average |= {f"{PREFIX}{piece}": x.contiguous() for piece, x in in_pieces(config, name, tensor).items()}
        elif kind == "optimizer":
            moment, _, name = name.partition(".")
            if moment == "step":
                pieces: dict[str, Tensor] = dict.fromkeys(piece_names(config, name), tensor)
            else:
                pieces = in_pieces(config, name, tensor)
            moments |= {f"state.{PREFIX}{piece}.{moment}": x.contiguous() for piece, x in pieces.items()}
    if config.tie_word_embeddings:
        state[f"{PREFIX}lm_head.weight"] = state[f"{PREFIX}embed_tokens.weight"]
    state |= {
        "optimizer": moments | options,
        "lr_scheduler": {"last_epoch": step},
        "dataloader": {"samples": samples},
        "train_state": {"step": step, "ntokens_seen": tokens} | ({} if recent is None else {"recent": recent}),
    }
    if average:
        state["average"] = average
    _alone(save, state, folder)
