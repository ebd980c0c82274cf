"""Check a checkpoint folder and list all problems, without loading the model."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from qwen3next.checkpoints.gguf.tokenizer import read_tokenizer
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.reader import INDEX, CheckpointReader, local_folder, some
from qwen3next.config import ModelConfig
from qwen3next.files.json_files import read_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Report:
    """The result of `verify`.

    Attributes:
        problems: one message per problem; if there are none, the folder loads.
        notices: messages about files and tensors that are skipped, unused or missing without an error.
        config: the language model's configuration, if config.json could be read.
        formats: number of quantised weights of each format.
        tensors, nbytes: number and bytes of the language model's tensors, as stored.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    config: ModelConfig | None = None
    tensors: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


def verify(path: str | Path, *, values: bool = False, progress: bool = False) -> Report:
    """Check a folder against its config.json, or a GGUF file: files, headers, names, shapes, dtypes, tokenizer.

    Args:
        values: also read every tensor, one at a time, and report NaN, infinity and tensors that are all zero.
    """
    report = Report(local_folder(path))
    try:
        opened = CheckpointReader(report.folder)
    except ValueError as error:
        report.problems.append(str(error))
    else:
        with opened.files:
            report.config, report.tensors, report.formats = opened.config, len(opened.stored), opened.formats
            report.nbytes = sum(stored.nbytes for stored in opened.stored.values())
            report.problems += opened.problems
            if not opened.problems and (mixed := opened.mixed()):
                report.problems.append(mixed)
            report.notices += opened.notices()
            if values and not opened.problems:
                _check_values(opened, report, progress)
            _check_tokenizer(opened, report)
    _check_other_files(report)
    return report


def _check_values(opened: CheckpointReader, report: Report, progress: bool) -> None:
    for name in tracked(sorted(opened.stored), progress, f"reading {opened.folder.name}", len(opened.stored)):
        tensor = opened.read(name)
        if bad := int((~torch.isfinite(tensor)).sum()):
            report.problems.append(f"{opened.stored[name].path}: {name} holds {bad} values that are not finite.")
        elif tensor.ndim > 1 and not tensor.any():
            report.notices.append(f"{name} is zero everywhere: check that it was written.")


def _check_tokenizer(opened: CheckpointReader, report: Report) -> None:
    path = opened.folder if opened.is_file else opened.folder / "tokenizer.json"
    try:
        tokenizer = read_tokenizer(opened.metadata) if opened.is_file else _tokenizer(path)
    except ValueError as error:
        report.problems.append(f"{path}: {error}")
        return
    if tokenizer is None:
        where = "tokenizer in the file" if opened.is_file else "tokenizer.json"
        report.notices.append(f"There is no {where}: the model can be used with token ids only.")
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= opened.config.vocab_size:
        report.problems.append(
            f"{path} has ids up to {largest}, but {opened.source} has vocab_size {opened.config.vocab_size}: "
            "use this model's tokenizer."
        )


def _tokenizer(path: Path) -> Tokenizer | None:
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"it is not a tokenizer ({error}).") from error


def _check_other_files(report: Report) -> None:
    folder = report.folder
    if not folder.is_dir():
        return
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                read_object(folder / name, "a configuration")
            except ValueError as error:
                report.problems.append(str(error))
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        report.notices.append(f"{some(pickles)}: not opened, because pickles could run code.")
    listed = set()
    if (folder / INDEX).is_file():
        try:
            index = read_object(folder / INDEX, "a safetensors index")
            listed = {str(file) for file in (index.get("weight_map") or {}).values()}
        except (ValueError, AttributeError):
            return  # already reported
        if unused := sorted(p.name for p in folder.glob("*.safetensors") if p.name not in listed):
            report.notices.append(f"{some(unused)}: not read, because the index does not list it.")
