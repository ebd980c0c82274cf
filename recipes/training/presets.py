"""Presets of whole runs: a model's size, with the text, batch, rate and length that it needs, and what it costs."""

from dataclasses import replace
from typing import Any, NamedTuple

from recipes.training.settings import Settings


class Preset(NamedTuple):
    """What a preset sets, and its expected cost as text.

    Operations are counted (flops.py). Hours of a GPU are an estimate: operations at 30 % of its bf16 peak.
    """

    settings: dict[str, Any]
    cost: str


PRESETS = {
    "tiny": Preset(
        {"steps": 1000, "batch_size": 4, "window": 256, "lr": 4e-3},
        "2.1M parameters, 1.0M tokens, 1.5e13 operations: 9 minutes at the demo's 1,972 tok/s on two cores",
    ),
    "small": Preset(
        {"steps": 2000, "batch_size": 8, "window": 512, "lr": 2e-3, "warmup": 200, "accumulate": 1, "ema": 0.999},
        "28.7M parameters, 8.2M tokens, 8.6e14 operations: an estimated 8 hours on two cores, at the rate of tiny",
    ),
    "nano-60m": Preset(
        {
            "tokenizer": "bpe:16384",
            "steps": 12_000,
            "batch_size": 32,
            "window": 2048,
            "accumulate": 2,
            "optimizer": "muon",
            "lr": 2e-3,
            "warmup": 300,
            "packing": "best_fit",
            "skip_spikes": 6.0,
            "ema": 0.999,
            "eval_every": 500,
            "save_every": 500,
            "model": ("router_z_loss_coef=1e-3", "logit_z_loss_coef=1e-5"),
        },
        "56.8M parameters, 1.6G tokens, 4.2e17 operations: an estimated 24 minutes of an H100, 75 of an A100",
    ),
    "base-350m-a100m": Preset(
        {
            "tokenizer": "bpe:32768",
            "steps": 40_000,
            "batch_size": 16,
            "window": 4096,
            "accumulate": 4,
            "optimizer": "muon",
            "lr": 1e-3,
            "warmup": 1000,
            "packing": "best_fit",
            "skip_spikes": 6.0,
            "ema": 0.999,
            "eval_every": 1000,
            "save_every": 1000,
            "mtp_depths": 2,
            "recompute": ("mlp",),
            "model": ("router_z_loss_coef=1e-3", "logit_z_loss_coef=1e-5"),
        },
        "345M parameters, 97M active, 10.5G tokens, 9.1e18 operations: an estimated 9 hours of an H100, 27 of an A100",
    ),
}


def defaults(preset: str, *, minutes: bool = False) -> Settings:
    """The settings of a preset, from which a command line starts; of another name only the model's size.

    Args:
        minutes: the command line gives minutes in place of steps.
    """
    found = PRESETS.get(preset)
    values = dict(found.settings) if found else {}
    if minutes:
        values |= {"steps": None, "minutes": 1.0}
    return replace(Settings(preset=preset), **values)
