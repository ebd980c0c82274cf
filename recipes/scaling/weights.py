"""Put numbers into a model that is divided over processes, a tensor at a time.

Random numbers depend on the seed and the tensor's name alone, so that every layout starts alike. Each process makes the
whole tensor and keeps its part; at most one tensor is whole at a time.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import qwen3next as q
from qwen3next.checkpoints.reader import open_checkpoint
from recipes.scaling.pieces import in_pieces


def random_tensors(config: q.ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and random values of every parameter, by the model's own rules, on the CPU in fp32."""
    with torch.device("meta"):
        model = q.Qwen3Next(config)
    before = torch.get_rng_state()
    try:
        for path, module in model.named_modules():
            own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
            if not own or (config.tie_word_embeddings and path == "lm_head"):
                continue
            module.to_empty(device="cpu", recurse=False)
            torch.manual_seed(zlib.crc32(f"{seed} {path}".encode()))
            model.reset_module(module)
            for leaf in own:
                made = module._parameters[leaf]
                assert made is not None
                yield f"{path}.{leaf}" if path else leaf, made.detach()
            module._apply(lambda x: x.to("meta"), recurse=False)
    finally:
        torch.set_rng_state(before)


def stored_tensors(folder: str | Path) -> Iterator[tuple[str, tuple[int | slice, ...], Tensor]]:
    """The tensors of a checkpoint folder as views of parameters: name, index, values; in fp32, read one at a time."""
    opened = open_checkpoint(folder)
    try:
        for entry in opened.wanted:
            for place, piece in zip(entry.places, entry.split(opened.read(entry.name)), strict=True):
                yield place.name, place.index, piece.float()
    finally:
        opened.files.close()


@torch.no_grad()
def fill(model: nn.Module, config: q.ModelConfig, name: str, values: Tensor) -> None:
    """Give a parameter of the divided model its values, from the whole tensor on every process."""
    parameters = dict(model.named_parameters())
    for piece, tensor in in_pieces(config, name, values).items():
        put(parameters[piece], tensor)


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Copy the whole tensor into a parameter; of a DTensor, this process's part."""
    if isinstance(target, DTensor):
        shards = values.to(target.device)
        values = distribute_tensor(shards, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def initialise(model: nn.Module, config: q.ModelConfig, *, seed: int, folder: str = "") -> None:
    """Random weights, or those of a checkpoint folder. The model may be divided or whole."""
    if not folder:
        for name, values in random_tensors(config, seed):
            fill(model, config, name, values)
        return
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in q.Qwen3Next(config).named_parameters()}
    gathering: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, index, values in stored_tensors(folder):
        whole = gathering.setdefault(name, torch.empty(shapes[name]))
        (whole[index] if index else whole).copy_(values)
        missing[name] = missing.get(name, whole.numel()) - values.numel()
        if not missing[name]:
            fill(model, config, name, gathering.pop(name))
