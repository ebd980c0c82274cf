"""The study's figures of one checkpoint, released or trained here, and its attention maps."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from recipes.demo import machine
from recipes.documents import documents
from recipes.study_claims import CLAIMS
from recipes.study_maps import draw_maps, text_prompt
from recipes.study_metrics import measure
from recipes.study_report import COLUMNS, PROMPT
from recipes.study_run import MEASURED_AT_THE_END, write_json
from recipes.study_text import BOS, with_first
from recipes.tokenizer import load_tokenizer


def report_checkpoint(
    checkpoint: Path, *, source: str, out: Path, window: int, sequences: int, device: str, prompt: str, console: Console
) -> dict[str, Any]:
    """Measure a checkpoint on text; print its figures beside the paper's, write them as JSON, and its attention maps.

    Text is cut into windows as it comes, document after document. Where the tokenizer has the token with which windows
    begin in this study's own training, they begin with it; else with whatever comes.

    Args:
        source: as `documents` takes it.
        window: tokens; the study measured at its training length, 4096.
        sequences: windows.
    Raises: ValueError for a model without softmax layers, without a tokenizer, or too little text.
    """
    place = checkpoint.resolve()
    name = place.parent.name if place.name == "model" else place.name  # of runs here, which keep theirs in model/
    tokenizer = load_tokenizer(checkpoint)
    model = q.load(checkpoint, device=device).eval()
    first = tokenizer.token_to_id(BOS)
    windows = _windows(tokenizer, source, window=window, sequences=sequences, first=first)
    rows = max(1, min(16, 4096 * 2 // window))
    found = measure(model, windows.split(rows))
    arm = arm_of(model.config)
    values = {
        "checkpoint": name,
        "arm": arm,
        "text": source,
        "windows": len(windows),
        "window": window,
        "first_token": None if first is None else BOS,
        **found,
        "machine": machine(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", values)
    ids, tokens = text_prompt(tokenizer, prompt or PROMPT, first)
    draw_maps({name: model}, ids, tokens, out / f"{name}-map.png")
    console.print(f"{name}: {len(windows)} windows of {window} tokens; as the study's {arm}", highlight=False)
    for figure in COLUMNS:
        if figure in found:
            printed = paper_figure(figure, arm)
            beside = "" if printed is None else f"   paper {printed:g}"
            console.print(f"  {figure.replace('_', ' '):24} {found[figure]:.4g}{beside}", highlight=False)
    console.print(f"Layer by layer: {out / name}.json; attention of a prompt beside it.", highlight=False)
    return values


def arm_of(config: q.ModelConfig) -> str:
    """The study's arm that a configuration is, by its gate; "another" for what it has not."""
    if config.chosen("attention_"):
        return "another"
    return {"none": "baseline", "head_shared": "g1_head_shared"}.get(
        config.attention_gate, f"g1_{config.attention_gate}"
    )


def paper_figure(metric: str, arm: str) -> float | None:
    """What the paper prints for an arm, of its largest models."""
    for claim in CLAIMS:
        if claim.metric == metric and isinstance(claim.paper, tuple):
            for name, value in zip((claim.arm, claim.against), claim.paper, strict=True):
                if name == arm:
                    return value
    return None


def _windows(tokenizer: Tokenizer, source: str, *, window: int, sequences: int, first: int | None) -> Tensor:
    size = window - (first is not None)
    if size < 2 or sequences < 1:
        raise ValueError(f"{sequences} windows of {window} tokens say nothing: give at least 1 of 3.")
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
