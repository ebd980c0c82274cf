"""Rollback: bit-equal after single-token steps, otherwise exact to rounding, or refused."""

import pytest
import torch
from caches import cold, cold_draft, run, same
from conftest import small_model
from parity import tokens

from layers.gated_deltanet import DeltaNetState


@pytest.fixture(scope="module")
def model():
    return small_model(dtype=torch.float64)


def states(cache):
    return [x for s in cache.layers if isinstance(s, DeltaNetState) for x in (s.conv, s.recurrent)]


def test_rollback_is_bit_exact_or_refused(model):
    ids = tokens(50, b=2)
    cache = model.new_cache(batch=2, max_len=60, history=4)
    run(model, cache, ids[:, :40])
    logits = [run(model, cache, ids[:, t : t + 1]) for t in range(40, 50)]
    cache.rollback(3)
    assert torch.equal(cache.last_logits, logits[6])
    for t in range(47, 50):
        assert torch.equal(run(model, cache, ids[:, t : t + 1]), logits[t - 40])
    before = cache.lengths
    for n in (20, 60, -1):
        with pytest.raises(ValueError, match=r"No state after|Cannot take back"):
            cache.rollback(n)
        assert cache.lengths == before
    cache.rollback(0)
    plain = model.new_cache(batch=2, max_len=60)
    run(model, plain, ids[:, :40])
    with pytest.raises(ValueError, match="larger history"):
        plain.rollback(1)


def test_rewind_to(model):
    cache = model.new_cache(max_len=100, history=3)
    ids = tokens(30, b=1)
    assert cache.rewind_to([1, 2]) == 0
    run(model, cache, ids[:, :10])
    cache.snapshot("ten")
    run(model, cache, ids[:, 10:20])
    run(model, cache, ids[:, 20:21])
    text = ids[0].tolist()
    assert cache.rewind_to(text) == 21
    assert cache.rewind_to(text[:20] + [0] * 3) == 20
    assert cache.rewind_to(text[:13] + [0] * 9) == 13  # inside the second call, by replay
    assert cache.rewind_to([*text[:10], 96 - text[10]]) == 10
    assert cache.lengths == (10,)
    assert cache.rewind_to([*text[:9], 96 - text[9]]) == 0
    assert same(run(model, cache, ids[:, 10:]), cold(model, ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_single_tokens_are_taken_back_to_the_bit(dtype, state_dtype):
    """Rollback by many tokens and far into the history: states, logits, and the continuation."""
    model = small_model(dtype=dtype)
    ids = tokens(60, b=2)
    cache = model.new_cache(batch=2, max_len=70, history=20, state_dtype=state_dtype)
    run(model, cache, ids[:, :30])
    seen = {}
    for t in range(30, 60):
        logits = run(model, cache, ids[:, t : t + 1])
        seen[t + 1] = (logits, states(cache))
    for n in (1, 2, 5, 11):
        cache.rollback(n)
        logits, then = seen[cache.lengths[0]]
        assert torch.equal(cache.last_logits, logits)
        assert all(torch.equal(a, b) for a, b in zip(states(cache), then, strict=True))
    for t in range(cache.lengths[0], 60):
        assert torch.equal(run(model, cache, ids[:, t : t + 1]), seen[t + 1][0])


@pytest.mark.parametrize(
    "length", [5, 64, 70, 200, 337, 2052, *(pytest.param(n, marks=pytest.mark.slow) for n in (2049, 2116, 2120, 4100))]
)
def test_the_end_of_a_prompt_can_be_taken_back(model, length):
    ids = tokens(length + 7, b=2)
    whole = model.new_cache(batch=2, max_len=5000)
    cut = model.new_cache(batch=2, max_len=5000, history=4)
    for cache in (whole, cut):
        run(model, cache, ids[:, :length])
    assert all(same(a, b, 1e-13) for a, b in zip(states(whole), states(cut), strict=True))
    cut.rollback(3)
    assert same(cut.last_logits, cold(model, ids[:, : length - 3]))
    again = model.new_cache(batch=2, max_len=5000)
    run(model, again, ids[:, : length - 3])
    assert all(same(a, b, 1e-11) for a, b in zip(states(again), states(cut), strict=True))
    assert same(run(model, cut, ids[:, length:]), cold(model, torch.cat((ids[:, : length - 3], ids[:, length:]), 1)))


@pytest.mark.parametrize("history", [5, 100])
@pytest.mark.parametrize("length", [64, 200, 337, 2052, 2120])
def test_noting_a_prompt_leaves_no_trace_in_bf16(length, history):
    """Calls are cut on the 64-token grid, so a cache with a history is bit-equal to one without."""
    model, ids = small_model(dtype=torch.bfloat16), tokens(length)
    plain, noted = model.new_cache(batch=2), model.new_cache(batch=2, history=history)
    assert torch.equal(run(model, plain, ids), run(model, noted, ids))
    assert all(torch.equal(a, b) for a, b in zip(states(plain), states(noted), strict=True))


def test_rows_go_back_by_numbers_of_their_own(model):
    """Each row rolls back a different number, as after drafts with different numbers of accepted tokens."""
    ids, more = tokens(30, b=3), tokens(6, b=3)
    cache = model.new_cache(batch=3, max_len=60, history=8)
    run(model, cache, ids)
    run(model, cache, more)
    back = [0, 6, 2]
    cache.rollback(back)
    assert cache.lengths == (36, 30, 34)
    kept = [torch.cat((ids[r], more[r, : 6 - n])) for r, n in enumerate(back)]
    for r, row in enumerate(kept):
        assert same(cache.last_logits[r], cold(model, row[None])[0]) or back[r] == 6
    last = tokens(4, b=3)
    got = run(model, cache, last)
    for r, row in enumerate(kept):
        assert same(got[r], cold(model, torch.cat((row, last[r]))[None])[0])
    cache.rollback(4)
    assert cache.lengths == (36, 30, 34)
    with pytest.raises(ValueError, match="one for each of the 3 rows"):
        cache.rollback([1, 1])


def test_memory_is_bounded_by_the_history_and_not_by_what_was_run(model):
    """A few states and the update log between them take less memory than a state per token, even with a large log."""
    cache = model.new_cache(max_len=2000, history=8)
    for _ in range(4):
        run(model, cache, tokens(250, b=1))
    sizes = []
    for _ in range(60):
        run(model, cache, tokens(1, b=1))
        sizes.append(cache._rollback_log.nbytes)
    state = sum(x.nbytes for x in states(cache))
    assert max(sizes[30:]) <= max(sizes[:30]) < 8 * state
    cache.rollback(8)


def test_what_hooks_changed_is_not_replayed(model):
    """Patched updates give states that the log cannot replay, so only the starts of calls can be restored."""
    ids = tokens(20, b=1)
    model.set_backend("delta_rule", "recurrent")
    try:
        cache = model.new_cache(max_len=60, history=8)
        run(model, cache, ids)
        with model.hooks([("blocks.0.linear_attn.hook_written", lambda u, hook: u * 0.5)]):
            run(model, cache, tokens(3, b=1))
        run(model, cache, tokens(2, b=1))
        with pytest.raises(ValueError, match="No state after 22"):
            cache.rollback(3)
        cache.rollback(2)
        cache.rollback(3)
        assert same(cache.last_logits, cold(model, ids))
    finally:
        model.set_backend("delta_rule", "auto")


def test_forks_have_the_same_past(model):
    cache = model.new_cache(max_len=60, history=8)
    ids = tokens(20, b=1)
    run(model, cache, ids)
    for t in range(4):
        run(model, cache, tokens(4, b=1)[:, t : t + 1])
    (fork,) = cache.fork()
    run(model, cache, tokens(5, b=1))
    fork.rollback(4)
    assert same(run(model, fork, tokens(3, b=1)), cold(model, torch.cat((ids, tokens(3, b=1)), dim=1)))
    cache.rollback(5)
    assert same(cache.last_logits, cold(model, torch.cat((ids, tokens(4, b=1)), dim=1)))


@pytest.mark.parametrize("where", ["blocks.3.hook_resid_mid", "blocks.0.linear_attn.hook_o", "hook_final_norm"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_the_cache_as_it_was(model, where, error):
    ids = tokens(20, b=1)
    cache = model.new_cache(max_len=60, history=8, mtp=True)
    run(model, cache, ids)
    draft = model.draft(cache, tokens(1, b=1)[0])

    def fail(*_args, **_options):
        raise error("out of memory")

    for n in (3, 1):
        with model.hooks([(where, fail)]), pytest.raises(error):
            model(tokens(n, b=1), cache=cache)
        assert cache.lengths == (20,)
    assert torch.equal(model.draft(cache, tokens(1, b=1)[0]), draft)
    whole = torch.cat((ids, tokens(4, b=1)), dim=1)
    assert same(run(model, cache, tokens(4, b=1)), cold(model, whole))
    cache.rollback(6)
    assert same(cache.last_logits, cold(model, whole[:, :18]))


def test_the_mtp_layers_part_goes_back_too(model):
    ids, token = tokens(40, b=2), torch.tensor([3, 4])
    cache = model.new_cache(batch=2, max_len=60, history=6, mtp=True)
    run(model, cache, ids[:, :30])
    for t in range(30, 40):
        run(model, cache, ids[:, t : t + 1])
    assert same(model.draft(cache, token), cold_draft(model, ids, token))
    for n in (1, 4):
        cache.rollback(n)
        held = cache.lengths[0]
        assert same(model.draft(cache, token), cold_draft(model, ids[:, :held], token))
    cache.rollback([0, 1])
    assert same(model.draft(cache, token)[1], cold_draft(model, ids[:, :34], token)[1])


@pytest.mark.parametrize("kind", ["full_attention", "linear_attention"])
def test_a_long_call_is_taken_back_in_models_of_one_kind_of_layer(kind):
    model = small_model(dtype=torch.float64, num_hidden_layers=2, layer_types=(kind, kind))
    ids = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache(max_len=400, history=16)
    with torch.no_grad():
        model(ids, cache=cache)
    for back in (5, 11):
        cache.rollback(back)
        assert same(cache.last_logits, cold(model, ids[:, : cache.lengths[0]]))


def test_each_row_goes_back_by_its_own_number(model):
    """Rollback within `history` for tokens in any span of the update log; then again after other tokens."""
    ids = tokens(60, b=3)
    cache = model.new_cache(batch=3, max_len=90, history=16)
    run(model, cache, ids[:, :40])
    for t in range(40, 60):
        run(model, cache, ids[:, t : t + 1])
    said = [ids[r].tolist() for r in range(3)]
    for back in ([0, 16, 7], [3, 0, 5], [1, 1, 1], [0, 0, 2]):
        cache.rollback(back)
        said = [row[: len(row) - n] for row, n in zip(said, back, strict=True)]
        for r, row in enumerate(said):
            assert same(cache.last_logits[r], cold(model, torch.tensor([row]))[0])
        for k in range(4):
            new = torch.tensor([[k], [k + 1], [k + 2]])
            run(model, cache, new)
            said = [[*row, int(x)] for row, x in zip(said, new, strict=True)]
        for r, row in enumerate(said):
            assert same(cache.last_logits[r], cold(model, torch.tensor([row]))[0])
            assert cache.tokens[r, : len(row)].tolist() == row


def test_a_resting_row_keeps_its_history(model):
    """However far the other rows go on; and what is kept for it stays bounded."""
    ids = tokens(40, b=2)
    cache = model.new_cache(batch=2, max_len=60, history=2)
    logits = [run(model, cache, ids[:, t : t + 1]) for t in range(9)]
    kept = []
    for t in range(9, 39):
        with cache.resting([0]):
            logits.append(run(model, cache, ids[:, t : t + 1]))
        kept.append(len(cache._rollback_log.spans))
    assert max(kept) <= 4
    assert cache.lengths == (9, 39)
    cache.rollback(2)
    assert cache.lengths == (7, 37)
    expected = model.new_cache(batch=2, max_len=60)
    run(model, expected, ids[:, :7])
    token = ids[:, :1]
    after = run(model, cache, token)
    assert torch.allclose(after[0], run(model, expected, token)[0], rtol=0, atol=1e-12)
    other = model.new_cache(batch=1, max_len=60)
    run(model, other, ids[1:, :37])
    assert torch.allclose(after[1:], run(model, other, token[1:]), rtol=0, atol=1e-12)
