"""Draw attention maps of one prompt, with two models side by side, and write their numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from qwen3next.interp.pictures import draw_attention
from recipes.study.run import write_json
from recipes.study.toy import BOS, HELD_OUT, TRIGGERS, BigramBackcopy

SHOWN = 40  # tokens


@torch.no_grad()
def head_averages(model: q.Qwen3Next, ids: Tensor) -> dict[int, Tensor]:
    """Attention of each softmax layer averaged over heads, (t, s), for one prompt (1, t)."""
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    names = [f"blocks.{i}.self_attn.hook_pattern" for i in layers]
    with model.materialize(pattern=layers):
        _, acts = model.run_with_cache(ids.to(model.embed_tokens.weight.device), names_filter=names)
    return {i: acts[name][0].float().mean(0).cpu() for i, name in zip(layers, names, strict=True)}


def draw_maps(averages: Mapping[str, Mapping[int, Tensor]], tokens: Sequence[str], path: Path) -> dict[str, Any]:
    """Draw each model's attention in the layer in which the first model attends most to the first token.

    Args:
        averages: `head_averages` of one prompt by model name; the models have the same number of layers.
    Writes `path` (.png) and the numbers as .json with the same name. Returns the numbers.
    """
    first = next(iter(averages.values()))
    layer = max(first, key=lambda i: first_token_share(first[i]))
    draw_attention(
        {_title(name, layer, maps[layer]): maps[layer] for name, maps in averages.items()}, tokens=tokens
    ).savefig(path, bbox_inches="tight")
    values = {
        "layer": layer,
        "tokens": list(tokens),
        "first_token": {name: first_token_share(maps[layer]) for name, maps in averages.items()},
        "maps": {name: _rounded(maps[layer]) for name, maps in averages.items()},
    }
    write_json(path.with_suffix(".json"), values)
    return values


def draw_depths(name: str, averages: Mapping[int, Tensor], tokens: Sequence[str], path: Path) -> None:
    """Draw a model's attention in four of its softmax layers; of 28 layers those of the study: 1st, 7th, 21st, last.

    Writes `path` (.png) and the numbers as .json with the same name, with the first token's share in every layer.
    """
    layers = list(averages)
    n = len(layers)
    shown = sorted({layers[i] for i in (0, max(n // 4 - 1, 0), max(3 * n // 4 - 1, 0), n - 1)})
    titled = {_title(name, i, averages[i]): averages[i] for i in shown}
    figure = draw_attention(titled, tokens=tokens, columns=2 if len(shown) == 4 else None)
    figure.savefig(path, bbox_inches="tight")
    values = {
        "tokens": list(tokens),
        "first_token": {i: first_token_share(matrix) for i, matrix in averages.items()},
        "maps": {i: _rounded(averages[i]) for i in shown},
    }
    write_json(path.with_suffix(".json"), values)


def first_token_share(matrix: Tensor) -> float:
    """Mean attention of all later tokens to the first token."""
    return float(matrix[1:, 0].mean())


def _title(name: str, layer: int, matrix: Tensor) -> str:
    return f"{name}, layer {layer}: {first_token_share(matrix):.2f} on the first token"


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(x, 4) for x in row] for row in matrix.tolist()]


def toy_prompt() -> tuple[Tensor, list[str]]:
    """A held-out sequence of the toy task, with marked triggers."""
    ids = BigramBackcopy(SHOWN, 0).batch(HELD_OUT, 1).input_ids
    return ids, ["BOS" if i == BOS else f"!{i}" if i < TRIGGERS else str(i) for i in ids[0].tolist()]


def text_prompt(tokenizer: Tokenizer, text: str, first: int | None) -> tuple[Tensor, list[str]]:
    """The first tokens of a text, after the token `first` if there is one."""
    encoded = tokenizer.encode(text, add_special_tokens=False).ids
    found = ([] if first is None else [first]) + encoded[: SHOWN - (first is not None)]
    if len(found) < 2:
        raise ValueError("The prompt has fewer than two tokens, so there is no attention to draw: give a longer one.")
    tokens = [tokenizer.decode([i]) or tokenizer.id_to_token(i) or "?" for i in found]
    return torch.tensor([found]), tokens
