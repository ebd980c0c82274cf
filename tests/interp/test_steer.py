"""Steering adds exactly the given vector, in cached decoding as in a forward, and leaves no hooks behind."""

import pytest
import torch
from conftest import small_model

import qwen3next as q
from qwen3next.interp import ActivationCache, steer, steer_state

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
EXACT = {"rtol": 0, "atol": 1e-12}


def test_a_push_is_the_same_with_and_without_a_cache(model64):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    plain = model64(IDS).logits
    with torch.no_grad(), steer(model64, "blocks.1.hook_resid_post", vector, strength=0.5):
        whole = model64(IDS).logits
        cache, parts = model64.new_cache(batch=2, max_len=9), []
        for t in range(9):
            parts.append(model64(IDS[:, t : t + 1], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    push = ("blocks.1.hook_resid_post", lambda x, _: x + 0.5 * vector)
    expected = model64.run_with_hooks(IDS, fwd_hooks=[push]).logits
    torch.testing.assert_close(whole, expected, **EXACT)
    assert torch.equal(model64(IDS).logits, plain)


def test_generation_is_steered():
    """A large vector along the difference of two rows of the head at the last block determines the prediction."""
    model = small_model()
    towards = model.lm_head.weight[11].detach() / (1 + model.norm.weight.detach())
    with steer(model, "blocks.3.hook_resid_post", towards, strength=1000.0):
        steered = q.generate(model, IDS, max_new_tokens=5)
    assert torch.equal(steered[:, 9:], torch.full((2, 5), 11))
    assert not torch.equal(q.generate(model, IDS, max_new_tokens=5), steered)


def test_a_transplanted_state_is_the_other_texts(model64):
    """The state before the first token is zero, so adding another text's state equals continuing that text."""
    _, acts = model64.run_with_cache(IDS)
    there = ActivationCache(acts, model64).state(1, -1)
    cache = model64.new_cache(batch=2, max_len=3)
    with steer_state(model64, cache, 1, there):
        model64(IDS[:, :1], cache=cache)
    _, acts = model64.run_with_cache(IDS[:, :1])
    expected = ActivationCache(acts, model64).state(1, 0, before=there)
    torch.testing.assert_close(cache.layers[1].recurrent, expected, **EXACT)


def test_a_state_is_pushed_at_every_step(model64):
    change = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cache, by_hand = (model64.new_cache(batch=2, max_len=9) for _ in range(2))
    with torch.no_grad():
        with steer_state(model64, cache, 0, change, strength=0.1):
            steered = [model64(IDS[:, t : t + 3], cache=cache).logits for t in (0, 3, 6)]
        for i, t in enumerate((0, 3, 6)):
            by_hand.layers[0].recurrent = by_hand.layers[0].recurrent + 0.1 * change
            torch.testing.assert_close(model64(IDS[:, t : t + 3], cache=by_hand).logits, steered[i], **EXACT)
    assert torch.equal(cache.layers[0].recurrent, by_hand.layers[0].recurrent)


def test_what_does_not_fit_is_refused(model64):
    with pytest.raises(ValueError, match=r"size 64, the vector 3"), steer(model64, "hook_embed", torch.ones(3)):
        model64(IDS)
    with pytest.raises(RuntimeError, match="did not fire"), steer(model64, "hook_embed", torch.ones(64)):
        pass
    cache = model64.new_cache(batch=2, max_len=3)
    with (
        pytest.raises(ValueError, match="has no recurrent state"),
        steer_state(model64, cache, 3, torch.ones(1, 4, 16, 24)),
    ):
        pass
    with pytest.raises(ValueError, match="make them equal"), steer_state(model64, cache, 0, torch.ones(1, 4, 24, 16)):
        pass
