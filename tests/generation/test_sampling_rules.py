"""Sampling rules against transformers' logits processors; logits at their limits."""

import pytest
import torch
from conftest import small_model
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as theirs
from transformers.generation.utils import GenerationMixin

import qwen3next as q
from layers.segments import Segments
from qwen3next.generation.sampling_rules import SamplingRules

pytestmark = pytest.mark.oracle

VOCAB, STOPS = 40, [7, 9]


def processors(prompt: int, **values: object) -> LogitsProcessorList:
    """The logits processors that transformers' generate would apply."""
    config = GenerationConfig(do_sample=True, eos_token_id=STOPS, num_beams=1, **values)
    config._eos_token_tensor = torch.tensor(STOPS)

    class Model(GenerationMixin):
        class config:
            is_encoder_decoder = False

    return GenerationMixin._get_logits_processor(Model(), config, input_ids_seq_length=prompt, device="cpu")


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[3], [1, 2], [4, 1, 2], [7], [9, 9]]},
        {"min_length": 12},
        {"min_new_tokens": 3},
        {"suppress_tokens": [0, 5, 39]},
        {"begin_suppress_tokens": [1, 2]},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 2, "suppress_tokens": [1]},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"typical_p": 0.4},
        {"typical_p": 0.95},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.02},
        {"temperature": 0.6, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
        {"temperature": 2.0, "epsilon_cutoff": 0.03, "eta_cutoff": 0.05, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("new", [0, 1, 4])
def test_equals_transformers(values, new):
    """The possible tokens and their probabilities, on texts from a small vocabulary, which have many repetitions."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.5, 3.0):
        texts = torch.randint(0, 5, (6, 9 + new), generator=generator)
        logits = torch.randn(6, VOCAB, generator=generator) * scale
        want = processors(9, **values)(texts, logits.clone()).softmax(-1)
        warpers = ("temperature", "top_k", "top_p")
        rules = SamplingRules(**{k: v for k, v in values.items() if k not in warpers})
        ours = rules.apply(logits, texts.tolist(), new, STOPS)
        ours = ours / values.get("temperature", 1.0)
        if "top_k" in values:
            ours = theirs.TopKLogitsWarper(values["top_k"])(texts, ours)
            ours = theirs.TopPLogitsWarper(values["top_p"])(texts, ours)
        assert torch.equal(rules.keep(ours).isneginf(), want == 0)
        assert (rules.keep(ours).softmax(-1) - want).abs().max() < 1e-6


def test_presence_and_frequency_count_what_was_generated():
    logits = torch.zeros(1, 6)
    rules = SamplingRules(presence_penalty=0.5, frequency_penalty=0.25)
    assert rules.apply(logits, [[1, 1, 2, 3, 3, 3]], 4, []).tolist() == [[0, 0, -0.75, -1.25, 0, 0]]
    assert rules.apply(logits, [[1, 1]], 0, []).tolist() == [[0] * 6]
    assert logits.tolist() == [[0] * 6]  # unchanged


def test_sample_draws_by_the_rules():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    rules = SamplingRules(min_p=0.1, typical_p=0.9)
    want = theirs.TopKLogitsWarper(8)(None, logits / 0.7)
    want = rules.keep(theirs.TopPLogitsWarper(0.95)(None, want)).softmax(-1)
    options = {"temperature": 0.7, "top_k": 8, "top_p": 0.95, "rules": rules}
    drawn = q.sample(logits.expand(20_000, 12), generator=torch.Generator().manual_seed(1), **options)
    assert (drawn.bincount(minlength=12) / 20_000 - want[0]).abs().max() < 0.015  # four standard deviations


def test_a_stream_obeys_the_rules_row_by_row():
    """Against a loop over single rows and whole texts, with prompts of unequal length."""
    model = small_model()
    ids = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    rules = SamplingRules(
        repetition_penalty=1.5, presence_penalty=0.5, no_repeat_ngram_size=2, begin_suppress_tokens=[5]
    )
    got = q.generate(model, ids, segments=Segments.from_mask(mask), rules=rules, max_new_tokens=10)
    for r, begin in enumerate((0, 3)):
        text = ids[r, begin:].tolist()
        for new in range(10):
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[:, -1]
            text.append(int(rules.apply(logits, [text], new, []).argmax()))
        assert got[r, begin:].tolist() == text


def test_a_stop_waits_for_min_new_tokens():
    model = small_model()
    ids = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(0))
    stop = [int(q.generate(model, ids, max_new_tokens=1)[0, -1])]
    assert q.generate(model, ids, stop_tokens=stop, max_new_tokens=9).shape == (1, 9)
    later = q.generate(model, ids, stop_tokens=stop, max_new_tokens=9, rules=SamplingRules(min_new_tokens=4))
    assert later.shape[1] >= 13
    assert stop[0] not in later[0, 8:12]
    with pytest.raises(ValueError, match="suppress_tokens has token 97: this model's ids are 0 to 96"):
        q.generate(model, ids, rules=SamplingRules(suppress_tokens=[97]))
    with pytest.raises(ValueError, match="No token is left to sample"):
        q.generate(model, ids, rules=SamplingRules(suppress_tokens=range(97)))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_limit_of_small_temperatures_is_the_likeliest(temperature, dtype):
    logits = torch.tensor([[1.0, 20.0, 3.0], [-300.0, -200.0, -torch.inf], [6e4, 5e4, 0.0]], dtype=dtype)
    assert q.sample(logits, temperature=temperature).tolist() == [1, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "value, sentence",
    [(torch.nan, "NaN or infinity"), (torch.inf, "NaN or infinity"), (-torch.inf, "No token is left")],
)
def test_logits_that_are_no_numbers_are_refused(value, sentence, temperature):
    logits = torch.zeros(2, 3)
    logits[1] = value
    with pytest.raises(ValueError, match=sentence):
        q.sample(logits, temperature=temperature)
    logits[1] = torch.tensor([0.0, value, 1.0])
    if value == -torch.inf:
        assert q.sample(logits, temperature=temperature)[1] != 1
    else:
        with pytest.raises(ValueError, match=sentence):
            q.sample(logits, temperature=temperature)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_temperatures_that_are_none(value):
    with pytest.raises(ValueError, match="temperature"):
        q.sample(torch.zeros(1, 3), temperature=value)
