"""How a checkpoint's authors want it sampled: its generation_config.json."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3next.json_files import read_object

# What others apply and `sample` does not, with the value that asks for nothing.
NOT_APPLIED = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of `stream` under its names. As they stand here: greedy, until the config's eos_token_id.

    Attributes:
        stop_tokens: ids that end a reply; None means config.json's eos_token_id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] | None = None

    @classmethod
    def load(cls, folder: str | Path, *, quiet: bool = False) -> "GenerationConfig":
        """Read a folder's generation_config.json, where there is one.

        Without do_sample it is greedy whatever the temperature, as in transformers. Warns, unless
        `quiet`, of what is not applied here.
        Raises: ValueError for a value of another type or outside its range.
        """
        path = Path(folder) / "generation_config.json"
        given = read_object(path, "a generation configuration", optional=True)
        values = {key: value for key, value in given.items() if value is not None}
        temperature, top_k, top_p = values.get("temperature", 1.0), values.get("top_k", 0), values.get("top_p", 1.0)
        stops = values.get("eos_token_id", [])
        stops = stops if isinstance(stops, list) else [stops]
        for key, right, rule in (
            ("temperature", _number(temperature) and temperature >= 0, "a number from 0"),
            ("top_k", _whole(top_k), "a whole number from 0"),
            ("top_p", _number(top_p) and 0 < top_p <= 1, "a number above 0, 1 at most"),
            ("eos_token_id", all(map(_whole, stops)), "a token id or a list of them"),
        ):
            if not right:
                raise ValueError(f"{path} has {key} {values[key]!r}: make it {rule}.")
        for key, neutral in NOT_APPLIED.items():
            if values.get(key, neutral) != neutral and not quiet:
                warnings.warn(f"{path} asks for {key} {values[key]}, which is not applied here.", stacklevel=2)
        return cls(
            temperature=float(temperature) if values.get("do_sample", False) else 0.0,
            top_k=top_k,
            top_p=float(top_p),
            stop_tokens=tuple(stops) or None,
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
