"""generation_config.json as its authors wrote it, or a sentence."""

import json

import pytest

from qwen3next.generation_config import GenerationConfig


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
        ({"temperature": 0.7, "top_k": None, "eos_token_id": []}, GenerationConfig()),  # not told to sample
        ({"do_sample": True, "repetition_penalty": 1.0, "pad_token_id": 3}, GenerationConfig(temperature=1.0)),
    ],
)
def test_values(tmp_path, values, expected):
    if values is not None:
        write(tmp_path, values)
    assert GenerationConfig.load(tmp_path) == expected


def test_what_is_not_applied_is_said(tmp_path):
    write(tmp_path, {"repetition_penalty": 1.05})
    with pytest.warns(UserWarning, match="repetition_penalty 1.05, which is not applied"):
        GenerationConfig.load(tmp_path)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"temperature": "hot"}, "temperature 'hot': make it a number from 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_k": 1.5}, "top_k 1.5: make it a whole number"),
        ({"top_p": 0}, "top_p 0"),
        ({"eos_token_id": ["<end>"]}, "a token id or a list of them"),
        ({"eos_token_id": True}, "eos_token_id True"),
        ([], "must hold a JSON object"),
    ],
)
def test_wrong_values_are_one_sentence(tmp_path, values, sentence):
    write(tmp_path, values)
    with pytest.raises(ValueError, match=sentence):
        GenerationConfig.load(tmp_path)
