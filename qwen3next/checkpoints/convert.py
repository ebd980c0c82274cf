"""Rewrite a checkpoint folder in another layout or dtype, with one tensor in memory at a time."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen3next.checkpoints.gguf.tokenizer import write_text_files
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.reader import CheckpointReader, cast_dtype, open_checkpoint
from qwen3next.checkpoints.save import is_weights, write_config, write_shards
from qwen3next.checkpoints.state_dict_adapter import Layout, ParamSlice, TensorSpec, tensor_specs
from qwen3next.config import ModelConfig
from qwen3next.files.atomic import fresh_folder
from qwen3next.inputs import as_dtype

ABOUT_QUANTISATION = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
CARRIED = (".json", ".jinja", ".txt", ".md", ".model")  # files that describe a model or its text


class Source:
    """Reads the tensors of an opened folder in any other layout of the same parameters."""

    def __init__(self, opened: CheckpointReader):
        self.opened = opened
        self._filling: dict[str, list[TensorSpec]] = {}
        for entry in opened.wanted:
            for place in entry.places:
                self._filling.setdefault(place.name, []).append(entry)

    def dtype(self, entry: TensorSpec) -> torch.dtype:
        return self.opened.dtypes[entry.places[0].name]

    def tensor(self, entry: TensorSpec, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the other layout, cast to `dtype`; None keeps the stored dtype, or gives fp32 if quantised."""
        return entry.merge(*(self._piece(place, entry.shape, dtype) for place in entry.places))

    def _read(self, entry: TensorSpec, dtype: torch.dtype | None, index: int | None = None) -> Tensor:
        x = self.opened.read(entry.name, index)
        return x if dtype is None else x.to(dtype)

    def _piece(self, place: ParamSlice, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        filling = self._filling[place.name]
        for entry in filling:
            for i, other in enumerate(entry.places):
                if other == place:
                    return entry.split(self._read(entry, dtype))[i]
        if place.index:  # one expert of a fused tensor: only that expert is read
            expert, rows = place.index
            assert isinstance(expert, int)
            return self._read(filling[0], dtype, expert)[rows]
        out: Tensor | None = None  # a fused tensor of `shape`, from the tensors of single experts
        for entry in filling:
            (part,), (at,) = entry.split(self._read(entry, dtype)), entry.places
            out = torch.empty(shape, dtype=part.dtype) if out is None else out
            out[at.index] = part
        assert out is not None
        return out


def convert(
    source: str | Path,
    target: str | Path,
    *,
    experts: str | None = None,
    dtype: str | torch.dtype = "auto",
    mtp: bool = True,
    vision: bool = True,
    max_shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> ModelConfig:
    """Rewrite the checkpoint in `source`, a folder or a GGUF file, as folder `target`, which may be the same folder.

    Quantised weights are dequantised to the dtype that config.json gives. Sidecar files (tokenizer, chat template,
    generation_config.json, …) are copied.

    Args:
        experts: "fused" for two tensors per layer, "single" for three tensors per expert; None keeps the layout.
        dtype: "auto" keeps the dtype of every tensor. Another dtype applies to linear maps and embeddings; A_log,
            dt_bias and norms keep theirs.
        mtp: False drops the MTP layer.
        vision: False drops the vision tower, if any, so that a text model remains.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
    Returns: the configuration that was written.
    Raises: ValueError for an invalid source, before anything is written.
    """
    if experts not in (None, "fused", "single"):
        raise ValueError(f"experts must be 'fused', 'single' or None, got {experts!r}.")
    cast = None if dtype == "auto" else as_dtype(dtype)
    opened = open_checkpoint(source)
    if cast is None and opened.torn:
        raise ValueError(opened.torn)
    folder, towered = Path(target), vision and bool(opened.vision)
    with opened.files, fresh_folder(folder, replaced=is_weights) as fresh:
        config = opened.config if mtp else opened.config.replace(mtp_num_hidden_layers=0)
        layout = opened.layout_to_save or Layout.released(config)
        layout = layout if towered else replace(layout, prefix="model.")
        if experts is not None:
            layout = replace(layout, fused_experts=experts == "fused", fused_mtp_experts=experts == "fused")
        origin, kept = Source(opened), sorted(opened.vision.items()) if towered else []
        plan = []
        for entry in tensor_specs(config, layout):
            kind = origin.dtype(entry)
            plan.append((entry, kind if cast is None else cast_dtype(entry.name, kind, cast)))
        kinds = {entry.name: kind for entry, kind in plan}
        tower = [(TensorSpec(name, stored.shape, ()), opened.dtype_of(stored)) for name, stored in kept]

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for entry, _ in plan:
                yield entry.name, origin.tensor(entry, kinds[entry.name])
            for name, stored in kept:
                yield name, opened.values(stored).to(opened.dtype_of(stored))

        if opened.is_file:
            write_text_files(opened.metadata, fresh)
        else:
            _carry(opened.folder, fresh)
        label, total = f"converting {opened.folder.name}", len(plan) + len(tower)
        write_shards(fresh, plan + tower, tracked(tensors(), progress, label, total), max_shard_bytes)
        written = opened.whole.replace(mtp_num_hidden_layers=config.mtp_num_hidden_layers) if towered else config
        write_config(fresh, written.to_dict(), kinds[f"{layout.prefix}embed_tokens.weight"])
    return written


def _carry(source: Path, target: Path) -> None:
    for path in source.iterdir():
        text = path.suffix in CARRIED or path.name.startswith("LICENSE")
        if path.is_file() and text and not is_weights(path.name) and path.name not in ABOUT_QUANTISATION:
            shutil.copyfile(path, target / path.name)
