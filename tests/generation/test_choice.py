"""Choosing a token: against transformers' processors, by distribution, and as a function of seed and position alone."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import qwen3next.generation.choice as choosing
from qwen3next.generation.choice import Choice, draw, row_seed, uniform
from qwen3next.generation.sampling_rules import SamplingRules


def logits(vocab=300, seed=0, dtype=torch.float32):
    return (3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)


def kept(scores, **options):
    """The tokens that some number draws."""
    return {draw(scores, number=(i + 0.5) / 4000, **options) for i in range(4000)}


@pytest.mark.parametrize("temperature", [0.5, 1.7])
@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_are_possible_as_with_transformers(temperature, options, dtype):
    """bf16 logits have many equal values. Shares below a 4000th may be missed, so tokens of these are left out."""
    scores = logits(dtype=dtype).float()
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    warpers += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    warpers += [MinPLogitsWarper(options["min_p"])] if "min_p" in options else []
    expected = scores[None].clone()
    for warper in warpers:
        expected = warper(None, expected)
    p = expected.softmax(-1)[0]
    rules = SamplingRules(min_p=options.get("min_p", 0.0))
    rest = {name: value for name, value in options.items() if name != "min_p"}
    found = kept(scores, temperature=temperature, rules=rules, **rest)
    assert found <= set(p.nonzero().flatten().tolist())
    assert found >= set((p > 5e-4).nonzero().flatten().tolist())


def test_shares_are_probabilities():
    scores = logits(vocab=20)
    p = scores.double().softmax(-1)
    counts = torch.zeros(20, dtype=torch.float64)
    for i in range(20000):
        counts[draw(scores, temperature=1.0, number=(i + 0.5) / 20000)] += 1
    assert ((counts / 20000 - p).abs() <= 1e-4).all()


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.99999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])  # equal, nearly equal and unequal tokens
def test_few_sorted_tokens_are_as_good_as_all(monkeypatch, top_p, spread):
    scores = spread * logits(vocab=5000)
    few = choosing._nucleus(scores, top_p)
    monkeypatch.setattr(choosing, "LIKELY", 10**6)
    assert torch.equal(choosing._nucleus(scores, top_p), few)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_no_number_draws_an_impossible_token(number):
    scores = torch.tensor([-math.inf, 1.0, 2.0, -math.inf])
    assert draw(scores, temperature=1.0, number=number) in (1, 2)


def test_bias_is_that_of_transformers():
    scores, bias = logits(), {3: 5.0, 7: -2.0}
    expected = SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])(torch.tensor([[1, 2]]), scores[None])[0]
    torch.testing.assert_close(Choice(logit_bias=bias).scores(scores, [1, 2], new=0), expected)


def test_log_probabilities_are_those_of_untouched_logits():
    scores = logits()
    rules = SamplingRules(suppress_tokens=[int(scores.argmax())])
    picked = Choice(temperature=0.0, rules=rules, logprobs=3).pick(scores, [5], new=1)
    p = scores.log_softmax(-1)
    assert picked.token != int(scores.argmax())
    assert picked.logprob == pytest.approx(float(p[picked.token]))
    values, ids = p.topk(3)
    assert [t for t, _ in picked.top] == ids.tolist()
    assert [x for _, x in picked.top] == pytest.approx(values.tolist())


def test_random_numbers_depend_on_seed_and_position_alone():
    choice, scores = Choice(temperature=1.0), logits()
    texts = [[1] * n for n in range(50)]
    first = [choice.pick(scores, text, new=0, seed=3).token for text in texts]
    torch.rand(7)
    assert [choice.pick(scores, text, new=0, seed=3).token for text in reversed(texts)] == first[::-1]
    assert [choice.pick(scores, text, new=0, seed=4).token for text in texts] != first
    assert len({row_seed(9, row) for row in range(100)} | {9}) == 100


def test_numbers_are_uniform():
    """Chi-squared with 63 degrees of freedom: 130 has a probability of 1e-6."""
    for numbers in ([uniform(1, p) for p in range(6400)], [uniform(s, 5) for s in range(6400)]):
        counts = torch.histc(torch.tensor(numbers), 64, 0, 1)
        assert ((counts - 100) ** 2 / 100).sum() < 130
        assert max(numbers) < 1


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {1: math.inf}}, "logit_bias must hold finite"),
    ],
)
def test_bad_settings_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        Choice(**bad)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="logit_bias has token 300: this model's ids are 0 to 299"):
        Choice(logit_bias={300: 1.0}).check(300)
