"""A model that is given vectors in place of token ids, and caches that are made longer."""

import pytest
import torch
from conftest import small_model
from parity import tokens

from layers.segments import Segments
from qwen3next.inputs import as_tokens


@pytest.mark.parametrize("holes", [False, True])
def test_embeddings_give_what_their_ids_give(holes):
    model, ids = small_model(), tokens(12)
    segments = None
    if holes:
        mask = torch.ones_like(ids)
        mask[0, 3:5] = mask[1, -2:] = 0
        segments = Segments.from_mask(mask)
    embeds = model.embed_tokens(ids).detach().requires_grad_()
    expected = model(ids, segments)
    got = model(inputs_embeds=embeds, segments=segments)
    assert torch.equal(got.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.aux, expected.aux, strict=True))
    got.logits.sum().backward()
    assert bool((embeds.grad.abs().sum(-1) > 0).all()) != holes


def test_a_cache_takes_embeddings_and_knows_that_it_has_no_ids():
    model, ids = small_model(), tokens(12, 1)
    with torch.no_grad():
        embeds = model.embed_tokens(ids)
        cache = model.new_cache(max_len=12, mtp=True)
        model(inputs_embeds=embeds[:, :9], cache=cache)
        got = model(ids[:, 9:], cache=cache).logits
        assert (got - model(ids).logits[:, 9:]).abs().max() <= 1e-5
        again = model.new_cache(max_len=12, mtp=True)
        model(ids, cache=again)
        assert (model.draft(cache, ids[:, 0]) - model.draft(again, ids[:, 0])).abs().max() <= 1e-4
    assert cache.rewind_to(ids[0].tolist()) == 0  # no prefix of ids is known


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "Give input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.ones(2, 64)}, "inputs_embeds must have shape"),
        ({"inputs_embeds": torch.ones(1, 3, 64), "input_ids": torch.ones(1, 4).long()}, "first two sizes equal"),
    ],
)
def test_bad_embeddings_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_tokens(given.get("input_ids"), given.get("inputs_embeds"))


def test_a_longer_cache_goes_on():
    model, ids = small_model(), tokens(20)
    with torch.no_grad():
        cache = model.new_cache(batch=2, max_len=8, history=4)
        model(ids[:, :8], cache=cache)
        cache.snapshot("here")
        with pytest.raises(ValueError, match="larger max_len"):
            model(ids[:, 8:], cache=cache)
        cache.lengthen(20)
        cache.lengthen(10)  # never shorter
        assert cache.max_len == 20
        expected = model(ids).logits[:, 8:]
        assert (model(ids[:, 8:], cache=cache).logits - expected).abs().max() <= 1e-5
        cache.restore("here")
        assert (model(ids[:, 8:], cache=cache).logits - expected).abs().max() <= 1e-5
        assert torch.equal(cache.tokens, ids)
