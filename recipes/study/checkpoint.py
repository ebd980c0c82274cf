"""Measure the study's figures and attention maps of checkpoints, released or trained here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from qwen3next.checkpoints.reader import local_folder
from recipes.demo import machine
from recipes.study.claims import CLAIMS
from recipes.study.maps import draw_depths, draw_maps, head_averages, text_prompt
from recipes.study.metrics import measure
from recipes.study.progress import say
from recipes.study.report import COLUMNS, PROMPT
from recipes.study.run import MEASURED_AT_THE_END, write_json
from recipes.study.text import BOS, with_first
from recipes.training.documents import documents
from recipes.training.tokenizer import load_tokenizer, write_atomically


@dataclass(frozen=True)
class How:
    """Options for measuring checkpoints.

    Attributes:
        source: text source, as in `documents`.
        window: tokens in a window; the study measured at its training length, 4096.
        sequences: number of windows.
        prompt: prompt whose attention is drawn; a few lines of Python if empty.
        device: "auto", "cpu" or "cuda".
        experts: how routed experts are held, as in `q.load`.
    """

    source: str
    window: int
    sequences: int
    prompt: str
    device: str
    experts: str


def report_checkpoints(
    checkpoints: Sequence[Path], how: How, *, out: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Measure checkpoints one after another on the same text; print their figures with the paper's, and write them.

    Writes into `out` for each checkpoint: its figures, also by layer, as NAME.json, and the attention of four layers as
    NAME-maps.png. For several checkpoints also checkpoints.md, and checkpoints-maps.png, which shows the layer with the
    strongest attention sink in the first checkpoint, for all of them.

    Args:
        checkpoints: folders, or hub ids: owner/name or owner/name/folder.
    Raises: ValueError for a model without softmax layers or without a tokenizer, or for too little text.
    """
    names, folders = names_of(checkpoints), [local_folder(checkpoint) for checkpoint in checkpoints]
    measured, averages, prompts = dict[str, dict[str, Any]](), dict[str, dict[int, Tensor]](), list[list[str]]()
    for name, folder in zip(names, folders, strict=True):
        measured[name], averages[name], tokens = _measure(name, folder, how)
        prompts.append(tokens)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{name}.json", measured[name])
        draw_depths(name, averages[name], tokens, out / f"{name}-maps.png")
        say(console, _in_words(measured[name]))
        say(console, f"Layer by layer: {out / name}.json; attention of a prompt beside it.")
    if len(measured) > 1:
        write_atomically(out / "checkpoints.md", "\n".join(_table(measured)).encode())
        alike = all(a.keys() == next(iter(averages.values())).keys() for a in averages.values())
        if drawn := alike and all(tokens == prompts[0] for tokens in prompts):
            draw_maps(averages, prompts[0], out / "checkpoints-maps.png")
        say(console, f"Side by side: {out}/checkpoints.md" + " and checkpoints-maps.png." * drawn)
    return measured


def names_of(checkpoints: Sequence[Path]) -> list[str]:
    """Short, distinct names: the run's name if the path ends in model/, else the shortest distinct end of the path."""
    whole = [place.resolve() if place.is_dir() else place for place in checkpoints]
    parts = [(place.parent if place.name == "model" else place).parts for place in whole]
    if len(set(parts)) < len(parts):
        raise ValueError("The same checkpoint is named twice: name each once.")
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return ["-".join(part for part in p[-length:] if part != "/") for p in parts]


def _measure(name: str, folder: Path, how: How) -> tuple[dict[str, Any], dict[int, Tensor], list[str]]:
    """A checkpoint's figures, and for the prompt its attention averaged over heads and its tokens."""
    tokenizer = load_tokenizer(folder)
    model = q.load(folder, device=how.device, experts=how.experts, progress=True).eval()
    first = tokenizer.token_to_id(BOS)
    windows = _windows(tokenizer, how.source, window=how.window, sequences=how.sequences, first=first)
    found = measure(model, windows.split(max(1, min(16, 4096 * 2 // how.window))))
    values = {
        "checkpoint": name,
        "arm": arm_of(model.config),
        "text": how.source,
        "windows": len(windows),
        "window": how.window,
        "first_token": None if first is None else BOS,
        **found,
        "machine": machine(),
    }
    ids, tokens = text_prompt(tokenizer, how.prompt or PROMPT, first)
    return values, head_averages(model, ids), tokens


def _in_words(values: Mapping[str, Any]) -> str:
    text = f"{values['windows']} windows of {values['window']} tokens"
    lines = [f"{values['checkpoint']}: {text}; as the study's {values['arm']}"]
    lines += [f"  {figure.replace('_', ' '):24} {_cell(values, figure)}" for figure in COLUMNS if figure in values]
    return "\n".join(lines)


def _table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table: a row for each figure, a column for each checkpoint."""
    lines = ["| figure | " + " | ".join(measured) + " |", "|---|" + "--:|" * len(measured)]
    for figure in COLUMNS:
        if any(figure in values for values in measured.values()):
            cells = [_cell(values, figure) for values in measured.values()]
            lines.append(f"| {figure.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(values: Mapping[str, Any], figure: str) -> str:
    """A figure, followed by the paper's figure of that arm if it prints one."""
    if figure not in values:
        return "-"
    printed = paper_figure(figure, values["arm"])
    return f"{values[figure]:.4g}" + ("" if printed is None else f" (paper {printed:g})")


def arm_of(config: q.ModelConfig) -> str:
    """The study's arm with the gate of this configuration, or "another"."""
    if config.chosen("attention_"):
        return "another"
    return {"none": "baseline", "head_shared": "g1_head_shared"}.get(
        config.attention_gate, f"g1_{config.attention_gate}"
    )


def paper_figure(metric: str, arm: str) -> float | None:
    """The paper's figure of an arm, for its largest models; None if it prints none."""
    for claim in CLAIMS:
        if claim.metric == metric and isinstance(claim.paper, tuple):
            for name, value in zip((claim.arm, claim.against), claim.paper, strict=True):
                if name == arm:
                    return value
    return None


def _windows(tokenizer: Tokenizer, source: str, *, window: int, sequences: int, first: int | None) -> Tensor:
    """Windows of concatenated documents (n, window), each after the token `first` if the tokenizer has it."""
    size = window - (first is not None)
    if size < 2 or sequences < 1:
        raise ValueError(f"{sequences} windows of {window} tokens cannot be measured: give at least 1 of 3.")
    ids: list[int] = []
    for _, text in documents(source):
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= size * sequences:
            break
    cut = [ids[i : i + size] for i in islice(range(0, len(ids) - size + 1, size), sequences)]
    if not cut:
        raise ValueError(f"{source} has {len(ids)} tokens, fewer than a window of {window}: give more text.")
    rows = torch.tensor(cut)
    return rows if first is None else with_first(rows, first)


DEFAULT_SEQUENCES = MEASURED_AT_THE_END
