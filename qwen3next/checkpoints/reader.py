"""Open a checkpoint folder: read and check its configuration, layout and headers; tensors are read later."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3next.checkpoints.gguf.config import read_config
from qwen3next.checkpoints.gguf.header import read_files
from qwen3next.checkpoints.gguf.tensors import weights
from qwen3next.checkpoints.quantised.find import Found, Weight, formats
from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.checkpoints.quantised.weight import FLOATS, QuantisedWeight
from qwen3next.checkpoints.state_dict_adapter import VISION, Layout, TensorSpec, tensor_specs
from qwen3next.config import ModelConfig
from qwen3next.files.atomic import usable
from qwen3next.files.json_files import read_object
from qwen3next.files.tensor_files import CODES, Files, Stored, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF = ".gguf"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*")
BRING = "load with one dtype, such as dtype='bfloat16', or rewrite the folder with `qwen3next convert --dtype`"
ENOUGH = 10_000  # stop counting missing tensors here: config.json belongs to another model


class CheckpointReader:
    """An open checkpoint folder, or GGUF file.

    Attributes:
        folder: the folder, or the file.
        whole: config.json with a vision tower, if any.
        metadata: that of a GGUF file.
        config: the configuration of the language model alone, with MTP layers if the folder has their tensors.
        layout: how the tensors are arranged.
        stored: the weights of the language model, by released name; a quantised one counts once, with its scales.
        formats: number of quantised weights of each format.
        method: the method of quantisation that config.json names, or "".
        activations: names of scales of activations, which are not read.
        vision: the tensors of a vision tower, which a text model does not load.
        dtypes: the dtype of each parameter after reading, by the model's names.
        wanted: the tensors that config.json requires, in the order of the layers.
        torn: an error message if tensors of one parameter differ in dtype, so that they need a cast; else "".
        problems: error messages; if there are any, only `verify` continues.
    """

    def __init__(self, path: str | Path):
        self.folder = local_folder(path)
        self.files = Files()
        self.problems: list[str] = []
        self.activations: list[str] = []
        self.method = ""
        self.metadata: dict[str, Any] = {}
        self.config: ModelConfig
        every = self._open_file() if self.is_file else self._open_folder()
        self.formats = formats(every)
        self.vision = {n: s for n, s in every.items() if n.startswith(VISION)} if self.whole.wrapper_config else {}
        self.stored = {n: s for n, s in every.items() if n not in self.vision}
        self.mtp_promised = bool(self.config.mtp_num_hidden_layers)
        with_mtp = int(any(name.startswith("mtp.") for name in self.stored))
        self.config = self.config.replace(mtp_num_hidden_layers=with_mtp)
        self.layout = Layout.found(self.config, self.stored.keys())
        self.wanted: list[TensorSpec] = []
        self.torn = ""
        self.dtypes: dict[str, torch.dtype] = {}
        self.problems += self._compare()

    @property
    def source(self) -> str:
        """What the configuration was read from."""
        return "its metadata" if self.is_file else "config.json"

    @property
    def is_file(self) -> bool:
        """Whether this is a GGUF file."""
        return self.folder.suffix == GGUF

    @property
    def layout_to_save(self) -> Layout | None:
        """The layout in which a model loaded from here is saved; None for the released one of its family."""
        return None if self.is_file else self.layout

    def notices(self) -> Iterator[str]:
        """Messages about tensors that are skipped or missing without an error."""
        if self.vision:
            size = sum(stored.nbytes for stored in self.vision.values())
            yield (
                f"This checkpoint has a vision tower ({len(self.vision)} tensors, {size / 2**30:.2f} GiB), which is "
                "left out: only the language model is loaded."
            )
        if self.mtp_promised and not self.config.mtp_num_hidden_layers:
            yield "This checkpoint has no MTP tensors: loaded without multi-token prediction."
        if self.method and not self.formats:
            yield f"config.json says the weights are quantised with {self.method!r}, but none is."
        if self.activations:
            yield f"Scales of activations are not read, since activations are not quantised: {some(self.activations)}."

    def mixed(self) -> str:
        """An error message if the stored dtypes cannot be computed with together; else ""."""
        if self.torn:
            return self.torn
        kinds = Counter(kind for name, kind in self.dtypes.items() if not stays_exact(name))
        usual = kinds.most_common(1)[0][0] if kinds else torch.float32
        other = [name for name, kind in self.dtypes.items() if kind != cast_dtype(name, kind, usual)]
        if not other:
            return ""
        stored = next(e for e in self.wanted if any(place.name == other[0] for place in e.places))
        return (
            f"{self.stored[stored.name].path}: {stored.name} is {CODES[self.dtypes[other[0]]]}, but most other "
            f"weights are {CODES[usual]}: {BRING}."
        )

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor after reading: as stored, or if quantised that of config.json (else bfloat16)."""
        return self.dtype_of(self.stored[name])

    def dtype_of(self, stored: Weight) -> torch.dtype:
        if not isinstance(stored, QuantisedWeight):
            return stored.dtype
        if stored.exact_dtype is not None:
            return stored.exact_dtype
        named = getattr(torch, str(self.config.extra.get("dtype") or self.config.extra.get("torch_dtype")), None)
        return named if named in FLOATS else torch.bfloat16

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or `[index]` of it, in CPU memory; quantised weights are dequantised to fp32."""
        return self.values(self.stored[name], index)

    def values(self, stored: Weight, index: int | None = None) -> Tensor:
        """As `read`, for an entry of `stored` or `vision`."""
        if isinstance(stored, QuantisedWeight):
            return stored.read(self.files, index)
        return self.files.read(stored, index)

    def read_into(self, name: str, index: int | None, target: Tensor) -> None:
        """Read a tensor, or `[index]` of it, into a contiguous tensor; without a copy if it is stored in that dtype."""
        stored = self.stored[name]
        if isinstance(stored, QuantisedWeight) or stored.dtype != target.dtype:
            target.copy_(self.values(stored, index))
        else:
            self.files.read(stored, index, into=target)

    def nbytes(self, name: str, index: int | None = None) -> int:
        """Bytes that `read` reads from the files, including scales."""
        stored = self.stored[name]
        return stored.nbytes if index is None else stored.nbytes // stored.shape[0]

    def _open_folder(self) -> dict[str, Weight]:
        self.whole = ModelConfig.load(self.folder)
        self.config = self.whole.text_only()
        settings = self._settings()
        found = Found(self._headers(), settings, self.files)
        self.problems += found.problems
        self.activations, self.method = found.activations, settings.method
        return found.weights

    def _open_file(self) -> dict[str, Weight]:
        header = read_files(self.folder)
        self.metadata = header.metadata
        try:
            self.whole = self.config = read_config(header)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error
        return dict(weights(header, self.config))

    def _settings(self) -> Settings:
        try:
            return Settings(self.config.extra.get("quantization_config"))
        except ValueError as error:
            self.problems.append(f"{self.folder / 'config.json'}: {error}")
            return Settings(None)

    def _headers(self) -> dict[str, Stored]:
        """Every tensor of the folder by name, from the index or the single file."""
        where = self._index()
        files = sorted(set(where.values())) if where is not None else [SINGLE]
        every: dict[str, Stored] = {}
        for file in files:
            path = self.folder / file
            if not path.is_file():
                held = [name for name, f in (where or {}).items() if f == file]
                self.problems.append(f"{path} is missing, which should hold {some(held)}: copy the checkpoint again.")
                continue
            try:
                header = read_header(path)
            except ValueError as error:
                self.problems.append(str(error))
                continue
            if twice := sorted(header.keys() & every.keys()):
                self.problems.append(f"{path} and {every[twice[0]].path} both hold {some(twice)}: remove one file.")
            every |= header
            if where is not None:
                absent = [name for name, f in where.items() if f == file and name not in header]
                if absent:
                    self.problems.append(
                        f"{path} lacks {some(absent)}, which the index places in it: copy the checkpoint again."
                    )
                if unlisted := sorted(header.keys() - where.keys()):
                    self.problems.append(f"{path} holds {some(unlisted)}, which the index does not list: add it there.")
        return every

    def _index(self) -> dict[str, str] | None:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.exists():
            if not single.is_file():
                other = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
                hint = f": {other[0]} is not supported, convert it to safetensors" if other else ""
                raise ValueError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{hint}.")
            return None
        where = read_object(index, "a safetensors index").get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index} is not a safetensors index (it has no weight_map): copy it again.")
        for name, file in where.items():
            inside = isinstance(file, str) and Path(file).name == file and "\0" not in file
            if not inside or not file.endswith(".safetensors"):
                raise ValueError(f"{index} places {name} in {file!r}, which is not a safetensors file of this folder.")
        if single.is_file() and SINGLE not in where.values():
            raise ValueError(f"{self.folder} holds both {SINGLE} and an index of other files: remove the older one.")
        return where

    def _compare(self) -> Iterator[str]:
        """Error messages for tensors that are missing, unexpected or of another shape than config.json requires."""
        expected, missing = set(), []
        for entry in tensor_specs(self.config, self.layout):
            self.wanted.append(entry)
            expected.add(entry.name)
            if entry.name not in self.stored:
                missing.append(entry.name)
                if len(missing) > ENOUGH:
                    break
            elif self.stored[entry.name].shape != entry.shape:
                stored = self.stored[entry.name]
                yield (
                    f"{stored.path}: {entry.name} has shape {list(stored.shape)}, "
                    f"but {self.source} requires {list(entry.shape)}."
                )
        if missing:
            yield f"{self.folder} lacks {some(missing)}, which {self.source} requires."
        else:
            allowed = expected | ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
            if extra := sorted(self.stored.keys() - allowed):
                yield f"{self.folder} holds {some(extra)}, which {self.source} does not define."
        self._note_dtypes()
        yield from self._check_tie()

    def _note_dtypes(self) -> None:
        """Set `dtypes`, and `torn` if tensors of one parameter differ in dtype."""
        for entry in self.wanted:
            if stored := self.stored.get(entry.name):
                for place in entry.places:
                    kind = self.dtypes.setdefault(place.name, self.dtype(entry.name))
                    if kind != self.dtype(entry.name) and not self.torn:
                        self.torn = (
                            f"{stored.path}: {entry.name} is {CODES[self.dtype(entry.name)]}, but other tensors of "
                            f"the same parameter are {CODES[kind]}: {BRING}."
                        )

    def _check_tie(self) -> Iterator[str]:
        head, embedding = self.stored.get("lm_head.weight"), self.stored.get(f"{self.layout.prefix}embed_tokens.weight")
        if self.config.tie_word_embeddings and head and embedding and not self.problems:
            if not self._equal(head, embedding):
                yield (
                    f"{head.path}: lm_head.weight differs from the embedding, but config.json has tie_word_embeddings "
                    "true: set it to false."
                )
            del self.stored["lm_head.weight"]  # some writers repeat the tied embedding

    def _equal(self, a: Weight, b: Weight) -> bool:
        if isinstance(a, QuantisedWeight) or isinstance(b, QuantisedWeight):
            return torch.equal(self.values(a).float(), self.values(b).float())
        return self.files.equal(a, b)


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Open a folder (or hub id) and check that it holds exactly the tensors that config.json requires.

    Raises: ValueError that names the file and tensor for a missing, unexpected or invalid one.
    """
    opened = CheckpointReader(path)
    if opened.problems:
        opened.files.close()
        raise ValueError(opened.problems[0])
    for notice in opened.notices():
        warnings.warn(notice, stacklevel=3)
    return opened


def stays_exact(name: str) -> bool:
    """Whether a tensor of this name (the model's or the released one) keeps its stored dtype in a cast."""
    return name.endswith(("A_log", "dt_bias", "norm.weight")) or "_norm_" in name or "layernorm" in name


def cast_dtype(name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a model cast to `dtype`. A stored fp64 becomes fp32, or it would promote activations."""
    if not stays_exact(name):
        return dtype
    return torch.float32 if stored == torch.float64 and dtype != torch.float64 else stored


def local_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint, or a GGUF file; a hub id is downloaded.

    Args:
        path: a folder, a GGUF file, owner/name on the hub, or owner/name/folder for a hub repository with several
            models.
    Raises: ValueError if it is neither, or cannot be downloaded.
    """
    folder, parts = Path(path), str(path).split("/")
    with usable(path):
        if folder.is_dir():
            return _one_model(folder)
        if folder.suffix == GGUF and folder.is_file():
            return folder
    here = folder.exists() or parts[0].startswith((".", "~"))
    mistyped = len(parts) > 2 and Path(parts[0]).exists()  # a local path, not a folder on the hub
    if here or mistyped or len(parts) < 2 or not all(parts):
        raise ValueError(
            f"{path} is not a folder: give a folder with config.json and safetensors, a .gguf file, or a hub id."
        )
    inside = "/".join(parts[2:])
    try:
        from huggingface_hub import snapshot_download

        wanted = [f"{inside}/{name}" if inside else name for name in HUB_FILES]
        found = Path(snapshot_download("/".join(parts[:2]), allow_patterns=wanted)) / inside
    except Exception as error:  # no client, no network, no such id: the client raises many kinds
        raise ValueError(f"{path} is not a folder and could not be downloaded from the hub ({error}).") from error
    if not found.is_dir():
        raise ValueError(f"{'/'.join(parts[:2])} on the hub has no folder {inside}: check its name.")
    return _one_model(found)


def _one_model(folder: Path) -> Path:
    """Return `folder`. Raises: ValueError that names its models if it holds several in subfolders."""
    if not (folder / "config.json").exists():
        inside = sorted(place.parent.name for place in folder.glob("*/config.json"))
        if inside:
            raise ValueError(f"{folder} holds no config.json, its subfolders do: give one of them ({some(inside)}).")
    return folder


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
