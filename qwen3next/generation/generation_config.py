"""Reading of generation_config.json, a checkpoint's default sampling options."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qwen3next.files.json_files import read_object
from qwen3next.generation.sampling_rules import SamplingRules, are_ids, is_whole, wrong

# Options of transformers that are not implemented here, with the values that have no effect.
NOT_APPLIED: dict[str, tuple[object, ...]] = {
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_length": (20,),  # older files write this default
    "max_time": (),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (),
    "sequence_bias": (),
    "token_healing": (),
    "top_h": (),
    "watermarking_config": (),
}
# Options that do not change the text, or only together with an option above.
_BESIDE = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bos_token_id
    cache_config cache_implementation chat_format compile_config continuous_batching_config decoder_start_token_id
    disable_compile diversity_penalty early_stopping is_assistant length_penalty low_memory max_cache_len
    max_matching_ngram_size max_window_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    output_attentions output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size
    prompt_lookup_num_tokens renormalize_logits return_dict_in_generate speculation_type target_lookbehind
    transformers_version use_cache use_mtp
"""
BESIDE = frozenset(_BESIDE.split())
OWN = ("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "stop_strings", "max_new_tokens")
RULES = tuple(f.name for f in fields(SamplingRules))


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of `stream`, under its names. The defaults are greedy, until the config's eos_token_id.

    Attributes:
        stop_tokens: ids that end a reply; None means config.json's eos_token_id.
        stop_strings: strings that end a reply and are not part of it.
        max_new_tokens: most tokens of a reply, unless the caller sets it; None leaves it to the program.
        rules: penalties, excluded tokens and other rules.
        ignored: a message that lists the file's options that are not implemented; "" if there are none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    rules: SamplingRules = field(default_factory=SamplingRules)
    ignored: str = ""

    @classmethod
    def load(cls, folder: str | Path, *, quiet: bool = False) -> "GenerationConfig":
        """Read a folder's generation_config.json; the defaults if it has none.

        Without do_sample, the temperature is 0, as in transformers. Warns of options that are not implemented, unless
        `quiet`.
        Raises: ValueError for a value of another type or outside its range.
        """
        path = Path(folder) / "generation_config.json"
        given = read_object(path, "a generation configuration", optional=True)
        values = {key: value for key, value in given.items() if value is not None}
        temperature, top_k, top_p = values.get("temperature", 1.0), values.get("top_k", 0), values.get("top_p", 1.0)
        do_sample, most = values.get("do_sample", False), values.get("max_new_tokens", 1)
        stops, texts = (_listed(values.get(key, [])) for key in ("eos_token_id", "stop_strings"))
        for key, right, rule in (
            ("do_sample", isinstance(do_sample, bool), "true or false"),
            ("temperature", _number(temperature) and 0 <= temperature < math.inf, "a number from 0"),
            ("top_k", is_whole(top_k), "an integer from 0"),
            ("top_p", _number(top_p) and 0 < top_p <= 1, "a number above 0 and at most 1"),
            ("eos_token_id", are_ids(stops), "a token id or a list of them"),
            ("stop_strings", all(isinstance(text, str) and text for text in texts), "a string or a list of them"),
            ("max_new_tokens", is_whole(most) and most > 0, "an integer from 1"),
        ):
            if not right:
                raise ValueError(f"{path}: {key} must be {rule}, got {values[key]!r}.")
        if problem := wrong(values):
            raise ValueError(f"{path}: {problem}")
        config = cls(
            temperature=float(temperature) if do_sample else 0.0,
            top_k=top_k,
            top_p=float(top_p),
            stop_tokens=tuple(stops) or None,
            stop_strings=tuple(texts),
            max_new_tokens=values.get("max_new_tokens"),
            rules=SamplingRules(**{key: values[key] for key in RULES if key in values}),
            ignored=_ignored(path, values),
        )
        if not quiet:
            config.warn()
        return config

    def warn(self) -> None:
        """Warn of options that are not implemented, if there are any."""
        if self.ignored:
            warnings.warn(self.ignored, stacklevel=3)


def _ignored(path: Path, values: Mapping[str, Any]) -> str:
    asked = []
    for key, value in values.items():
        known = key in BESIDE or key in OWN or key in RULES or key.startswith("_")
        nothing = value is False or (isinstance(value, (str, list, dict)) and not value)
        if not known and not nothing and value not in NOT_APPLIED.get(key, ()):
            asked.append(f"{key} {value}")
    if not asked:
        return ""
    return f"{path} sets {', '.join(asked)}, which {'is' if len(asked) == 1 else 'are'} not supported and ignored."


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
