"""Beam search against transformers' on the same weights."""

import pytest
import torch
from conftest import small_model
from transformers import Qwen3NextForCausalLM

from layers.segments import Segments
from qwen3next.generation.beam_search import beam_search
from qwen3next.generation.sampling_rules import SamplingRules

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model and transformers', with sharper logits, so that texts end at different places."""
    folder, ours = tmp_path_factory.mktemp("beams") / "model", small_model(mtp_num_hidden_layers=0)
    with torch.no_grad():
        ours.lm_head.weight *= 2
    ours.save_pretrained(folder)
    return ours, Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("beams, n", [(2, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_equals_transformers(both, beams, n, length_penalty, early_stopping):
    ours, theirs = both
    ids = torch.randint(0, 97, (2, 6), generator=torch.Generator().manual_seed(beams))
    stops = [4, 11, 30]
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=n,
        max_new_tokens=12,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=stops,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    options = {"max_new_tokens": 12, "length_penalty": length_penalty, "early_stopping": early_stopping}
    found = beam_search(ours, ids, beams=beams, n=n, stop_tokens=stops, **options)
    texts = [text for rows in found for _, text in rows]
    for text, row in zip(texts, expected.sequences[:, 6:].tolist(), strict=True):
        assert text == row[: len(text)]
        assert set(row[len(text) :]) <= {0, stops[0]}  # padding
    scores = torch.tensor([score for rows in found for score, _ in rows])
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


def test_padded_prompts_and_penalties_equal_single_runs(both):
    ours, _ = both
    ids, mask = torch.randint(0, 97, (2, 6), generator=torch.Generator().manual_seed(1)), torch.ones(2, 6)
    mask[0, :3] = 0
    rules = SamplingRules(repetition_penalty=1.4, min_new_tokens=3)
    options = {"beams": 3, "n": 2, "max_new_tokens": 8, "rules": rules, "stop_tokens": [4]}
    found = beam_search(ours, ids, segments=Segments.from_mask(mask), **options)
    for rows, prompt in zip(found, (ids[:1, 3:], ids[1:]), strict=True):
        (alone,) = beam_search(ours, prompt, **options)
        assert [text for _, text in alone] == [text for _, text in rows]


def test_one_beam_is_greedy(both):
    ours, _ = both
    ids = torch.tensor([[1, 2, 3]])
    ((score, text),) = beam_search(ours, ids, beams=1, max_new_tokens=7, stop_tokens=[])[0]
    logits = ours(torch.tensor([[1, 2, 3, *text]])).logits.detach()[0, 2:-1]
    assert text == logits.argmax(-1).tolist()
    assert score == pytest.approx(float(logits.log_softmax(-1).amax(-1).mean()), abs=1e-4)


@pytest.mark.parametrize(
    "bad, words",
    [({"beams": 2, "n": 3}, r"beams \(2\) must be at least n"), ({"early_stopping": "soon"}, "early_stop")],
)
def test_bad_options_are_refused(both, bad, words):
    with pytest.raises(ValueError, match=words):
        beam_search(both[0], torch.tensor([[1, 2]]), **bad)
