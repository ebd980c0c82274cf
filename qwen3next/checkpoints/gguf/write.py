"""Write a checkpoint as a GGUF file that llama.cpp opens, with one matrix in memory at a time."""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qwen3next.checkpoints.convert import Source
from qwen3next.checkpoints.gguf.blocks import KINDS, Kind, q8_0_blocks
from qwen3next.checkpoints.gguf.header import MAGIC
from qwen3next.checkpoints.gguf.metadata import model_metadata, tokenizer_metadata
from qwen3next.checkpoints.gguf.tensors import LAYOUT, gguf_name, storing
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.reader import CheckpointReader, open_checkpoint
from qwen3next.checkpoints.state_dict_adapter import TensorSpec, tensor_specs
from qwen3next.config import ModelConfig
from qwen3next.files.atomic import fresh_file
from qwen3next.files.tensor_files import memory_of

ALIGN = 32
NUMBERS = {kind.name: number for number, kind in KINDS.items()}
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type
ALWAYS_F32 = ("norm.weight", "ssm_conv1d.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


@dataclass
class Planned:
    """A GGUF tensor: the released ones that fill it in order, its shape and type."""

    specs: list[TensorSpec]
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.numbers * self.kind.nbytes


def to_gguf(
    source: str | Path, target: str | Path, *, kind: str = "bf16", mtp: bool = True, progress: bool = False
) -> ModelConfig:
    """Write the checkpoint in `source`, a folder or a GGUF file, as the GGUF file `target`.

    Matrices are stored in `kind`; norms, convolution, routers and vectors in F32, as llama.cpp's converter does. The
    tokenizer is written if it is Qwen's. Qwen3-Next's MTP layer is left out: llama.cpp has no place for it.

    Args:
        kind: "f32", "f16", "bf16" or "q8_0"; rows that are no multiple of 32 numbers are F16 then.
        mtp: False leaves out the MTP layer.
    Returns: the configuration of what was written.
    Raises: ValueError for an invalid source, or a model that llama.cpp's architectures cannot describe.
    """
    if kind not in TYPES:
        raise ValueError(f"The type of a GGUF file must be one of {', '.join(TYPES)}, got {kind!r}.")
    opened, target = open_checkpoint(source), Path(target)
    with opened.files, fresh_file(target) as fresh:
        config = opened.config
        if not mtp or config.model_type == "qwen3_next":
            config = config.replace(mtp_num_hidden_layers=0)
        metadata = model_metadata(config) | tokenizer_metadata(opened.folder, opened.metadata, config)
        metadata |= {"general.name": opened.folder.stem, "general.quantization_version": 2}
        metadata["general.file_type"] = FILE_TYPES[TYPES[kind]]
        plan = _plan(config, TYPES[kind])
        with fresh.open("wb") as file:
            _write(file, metadata, plan, opened, config, progress)
    return config


def _plan(config: ModelConfig, kind: str) -> dict[str, Planned]:
    plan: dict[str, Planned] = {}
    for spec in tensor_specs(config, LAYOUT):
        name, expert = gguf_name(spec.name, config)
        if name in plan:
            plan[name].specs.append(spec)
            continue
        shape = spec.shape
        if expert is not None:
            shape = (config.num_experts, *shape)
        elif name.endswith("ssm_ba.weight"):
            shape = (2 * shape[0], *shape[1:])
        elif name.endswith("ssm_conv1d.weight"):
            shape = (shape[0], shape[2])
        use = "F32" if len(shape) == 1 or name.endswith(ALWAYS_F32) else kind
        if use == "Q8_0" and shape[-1] % 32:
            use = "F16"
        plan[name] = Planned([spec], shape, KINDS[NUMBERS[use]])
    return plan


def _write(
    file: BinaryIO,
    metadata: dict[str, Any],
    plan: dict[str, Planned],
    opened: CheckpointReader,
    config: ModelConfig,
    progress: bool,
) -> None:
    head = MAGIC + struct.pack("<IQQ", 3, len(plan), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    end = 0
    for name, planned in plan.items():
        shape = planned.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", NUMBERS[planned.kind.name], end)
        end += -(-planned.nbytes // ALIGN) * ALIGN
    file.write(head + bytes(-len(head) % ALIGN))
    origin = Source(opened)
    for name, planned in tracked(plan.items(), progress, f"writing {opened.folder.name}", len(plan)):
        size = 0
        for x in _pieces(name, planned, origin, config):
            size += file.write(memory_of(_encoded(x, planned.kind)))
        assert size == planned.nbytes, name
        file.write(bytes(-size % ALIGN))
    file.flush()
    os.fsync(file.fileno())


def _pieces(name: str, planned: Planned, origin: Source, config: ModelConfig) -> Iterator[Tensor]:
    """The numbers of a tensor in fp32, in order: one piece, or one an expert."""
    if name.endswith("ssm_ba.weight"):  # rows alternate by key head: its b, then its a
        parts = [origin.tensor(spec, torch.float32) for spec in planned.specs]
        yield torch.stack([x.unflatten(0, (config.linear_num_key_heads, -1)) for x in parts], dim=1).flatten(0, 2)
        return
    for spec in planned.specs:
        yield storing(spec.name, config)(origin.tensor(spec, torch.float32))


def _encoded(x: Tensor, kind: Kind) -> Tensor:
    return (q8_0_blocks(x) if kind.name == "Q8_0" else x.to(kind.dtype)).contiguous()


def _text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()


def _value(x: Any) -> bytes:
    """A metadata value, with its type before it."""
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, str):
        return struct.pack("<I", 8) + _text(x)
    if all(isinstance(item, str) for item in x):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(_text, x))
    return struct.pack(f"<IIQ{len(x)}i", 9, 5, len(x), *x)
