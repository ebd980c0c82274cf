"""Losses of long texts, computed in chunks."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model
from parity import tokens


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_scores_are_those_of_one_forward(chunk_size):
    model, ids = small_model(dtype=torch.float64), tokens(90)
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
    done, parts = zip(*model.token_losses(ids, chunk_size=chunk_size), strict=True)
    assert done[-1] == 90
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-10


def test_scores_of_a_continuation():
    model, ids = small_model(dtype=torch.float64), tokens(40)
    whole = torch.cat([losses for _, losses in model.token_losses(ids)], dim=1)
    cache = model.new_cache(batch=2, max_len=40)
    list(model.prefill(ids[:, :25], cache))
    rest = torch.cat([losses for _, losses in model.token_losses(ids[:, 25:], cache=cache, chunk_size=4)], dim=1)
    assert rest.shape == (2, 15)
    assert (rest - whole[:, 24:]).abs().max() < 1e-10


def test_nothing_to_score():
    with pytest.raises(ValueError, match="nothing to score"):
        list(small_model().token_losses(tokens(1)))
