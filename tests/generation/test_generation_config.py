"""generation_config.json: released files are read, invalid values raise a clear error."""

import json

import pytest
import transformers

from qwen3next.generation.generation_config import BESIDE, NOT_APPLIED, OWN, RULES, GenerationConfig
from qwen3next.generation.sampling_rules import SamplingRules


def write(folder, values):
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    "values, expected",
    [
        (None, GenerationConfig()),
        ({}, GenerationConfig()),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [5, 3]},
            GenerationConfig(temperature=0.7, top_p=0.8, top_k=20, stop_tokens=(5, 3)),
        ),
        ({"do_sample": True, "eos_token_id": 0}, GenerationConfig(temperature=1.0, stop_tokens=(0,))),
        ({"temperature": 0.7, "top_k": None, "eos_token_id": []}, GenerationConfig()),  # do_sample is not set
        ({"do_sample": True, "repetition_penalty": 1.0, "pad_token_id": 3}, GenerationConfig(temperature=1.0)),
        (
            {"repetition_penalty": 1.05, "presence_penalty": 1.5, "bad_words_ids": [[1, 2]], "suppress_tokens": [3]},
            GenerationConfig(
                rules=SamplingRules(
                    repetition_penalty=1.05, presence_penalty=1.5, bad_words_ids=((1, 2),), suppress_tokens=(3,)
                )
            ),
        ),
        ({"stop_strings": "x", "max_new_tokens": 9}, GenerationConfig(stop_strings=("x",), max_new_tokens=9)),
    ],
)
def test_values(tmp_path, values, expected):
    if values is not None:
        write(tmp_path, values)
    assert GenerationConfig.load(tmp_path) == expected


def test_what_is_not_applied_is_said(tmp_path):
    write(tmp_path, {"num_beams": 4, "an_invention": [1], "use_cache": True, "num_return_sequences": 1})
    with pytest.warns(UserWarning, match=r"sets num_beams 4, an_invention \[1\], which are not supported and ignored"):
        GenerationConfig.load(tmp_path)
    config = GenerationConfig.load(tmp_path, quiet=True)
    with pytest.warns(UserWarning, match="num_beams 4"):
        config.warn()


def test_every_key_of_transformers_is_applied_named_or_without_effect(tmp_path):
    """Each setting with a non-default value becomes a rule, a field or a warning, or does not affect the text."""
    keys = [key for key in vars(transformers.GenerationConfig()) if not key.startswith("_")]
    assert not [key for key in keys if (key in (*RULES, *OWN)) + (key in NOT_APPLIED) + (key in BESIDE) != 1]
    for key in NOT_APPLIED:
        write(tmp_path, {key: 7})
        with pytest.warns(UserWarning, match=f"{key} 7, which is not supported"):
            GenerationConfig.load(tmp_path)
    for key in RULES:
        write(tmp_path, {key: "x"})
        with pytest.raises(ValueError, match=f"generation_config.json: {key} must be .*, got 'x'"):
            GenerationConfig.load(tmp_path)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"temperature": "hot"}, "temperature must be a number from 0, got 'hot'"),
        ({"temperature": -1}, "temperature must be a number from 0, got -1"),
        ({"top_k": 1.5}, "top_k must be an integer from 0, got 1.5"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"eos_token_id": ["<end>"]}, "a token id or a list of them"),
        ({"eos_token_id": True}, "eos_token_id must be .*, got True"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
        ({"stop_strings": [""]}, "a string or a list of them"),
        ({"max_new_tokens": 0}, "an integer from 1"),
        ([], "must hold a JSON object"),
    ],
)
def test_wrong_values_are_one_sentence(tmp_path, values, sentence):
    write(tmp_path, values)
    with pytest.raises(ValueError, match=sentence):
        GenerationConfig.load(tmp_path)
