"""Sampling, stopping, seeds, streams, batches of unequal length, continued caches."""

import pytest
import torch
from conftest import small_model

import qwen3next as q
from layers.segments import Segments


@pytest.fixture(scope="module")
def model():
    return small_model()


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def test_greedy_equals_argmax_without_a_cache(model):
    prompt = ids(2, 7)
    text = q.generate(model, prompt, max_new_tokens=6)
    expected = prompt
    for _ in range(6):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(text, expected)


def test_unequal_prompts_equal_single_runs(model):
    for side in ("left", "right"):
        rows, mask = ids(3, 9), torch.zeros(3, 9, dtype=torch.long)
        for r, n in enumerate((2, 9, 5)):
            mask[r, slice(9 - n, 9) if side == "left" else slice(0, n)] = 1
        text = q.generate(model, rows, segments=Segments.from_mask(mask), max_new_tokens=5)
        for r in range(3):
            alone = q.generate(model, rows[r][mask[r] == 1][None], max_new_tokens=5)
            assert torch.equal(text[r, -5:], alone[0, -5:])


def test_seeds(model):
    def draw(seed):
        return q.generate(model, ids(1, 4), max_new_tokens=20, temperature=1.0, seed=seed).tolist()

    assert draw(1) == draw(1) != draw(2)


def test_stop_tokens_end_a_row_and_the_last_row_ends_the_run(model):
    prompt = ids(2, 5)
    free = q.generate(model, prompt, max_new_tokens=8)[:, 5:]
    stop = int(free[0, 2])
    steps = list(q.stream(model, prompt, max_new_tokens=8, stop_tokens=[stop]))
    row = [int(s[0]) for s in steps]
    first = free[0].tolist().index(stop)
    assert row[: first + 1] == free[0, : first + 1].tolist()
    assert all(x == -1 for x in row[first + 1 :])
    text = q.generate(model, prompt, max_new_tokens=8, stop_tokens=[stop])
    assert text[0, 5 + first :].unique().tolist() == [stop]
    alone = list(q.stream(model, prompt[:1], max_new_tokens=8, stop_tokens=[stop]))
    assert len(alone) == first + 1


def test_eos_of_the_config_stops():
    model = small_model()
    prompt = ids(1, 5)
    token = int(q.generate(model, prompt, max_new_tokens=1)[0, -1])
    model.config = model.config.replace(eos_token_id=[token, 96])
    assert q.generate(model, prompt, max_new_tokens=9).shape == (1, 6)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"top_p": 0.4}])
def test_sample_draws_from_the_right_distribution(options):
    """20000 draws against the probabilities computed by hand; 0.015 is four standard deviations."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    p = (logits[0].double() / options.get("temperature", 1.0)).softmax(0)
    order = p.argsort(descending=True)
    keep = order[: options.get("top_k", 12)]
    kept, mass = [], 0.0
    for i in keep.tolist():
        if mass >= options.get("top_p", 1.0):
            break
        kept.append(i)
        mass += float(p[i] / p[keep].sum())
    expected = torch.zeros(12, dtype=torch.double)
    expected[kept] = p[kept] / p[kept].sum()
    drawn = q.sample(logits.expand(20_000, 12), generator=torch.Generator().manual_seed(1), **options)
    assert (drawn.bincount(minlength=12) / 20_000 - expected).abs().max() < 0.015


def test_top_p_keeps_at_least_one():
    assert q.sample(torch.tensor([[0.0, 5.0, 1.0]]), top_p=1e-9).item() == 1


def test_a_prefilled_cache_is_continued(model):
    prompt = ids(1, 130)
    cold = q.generate(model, prompt, max_new_tokens=5)
    for held in (64, 130):
        cache = model.new_cache(max_len=200)
        list(model.prefill(prompt[:, :held], cache, chunk_size=64))
        assert torch.equal(q.generate(model, prompt, cache=cache, max_new_tokens=5), cold)
        assert cache.lengths == (134,)  # the last token was sampled but not run
    longer = torch.cat((cold, ids(1, 3, seed=5)), 1)
    assert torch.equal(
        q.generate(model, longer, cache=cache, max_new_tokens=3), q.generate(model, longer, max_new_tokens=3)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p"),
        ({"segments": Segments.from_mask(torch.tensor([[0, 0, 0, 0]]))}, "prompt is empty"),
    ],
)
def test_bad_options(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        q.generate(model, ids(1, 4), **options)


def test_a_cache_of_other_text_is_refused(model):
    cache = model.new_cache(max_len=20)
    list(model.prefill(ids(1, 5), cache))
    with pytest.raises(ValueError, match="does not start with"):
        q.generate(model, ids(1, 8, seed=1), cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="do not fit"):
        q.generate(model, ids(1, 5), cache=cache, max_new_tokens=30)


@pytest.mark.parametrize("history", [0, 20])
def test_a_row_that_stopped_can_be_continued(history):
    """A stopped row's cache ends before its stop token, as for a single prompt; every row continues from its end."""
    model = small_model(dtype=torch.float64, mtp_num_hidden_layers=1)
    prompt = ids(3, 70)
    free = q.generate(model, prompt, max_new_tokens=12, stop_tokens=[])[:, 70:].tolist()
    stop = next(token for token in free[0][1:6] if token not in free[1] and token not in free[2])
    ended = free[0].index(stop)
    cache = model.new_cache(3, history=history, mtp=True)
    first = q.generate(model, prompt, cache=cache, max_new_tokens=12, stop_tokens=[stop])
    assert cache.lengths == (70 + ended, 81, 81)
    after = model(first[:1, : 70 + ended]).logits[:, -1]
    assert (cache.last_logits[:1] - after).abs().max() < 1e-10
    if history:  # rows roll back from their own ends, also across the position where one stopped
        for back in ([0, 3, 5], [0, 1, 0], [0, 9, 9], [1, 0, 0], [2, 9, 9], [2, 11, 11], [1, 11, 0]):
            branch = cache.fork()[0]
            branch.rollback(back)
            for r, n in enumerate(branch.lengths):
                assert (branch.last_logits[r] - model(first[r : r + 1, :n]).logits[0, -1]).abs().max() < 1e-10
    token, draft = torch.tensor([5, 5, 5]), model.new_cache(1, mtp=True)
    list(model.prefill(first[:1, : 70 + ended], draft))
    assert (model.draft(cache, token)[:1] - model.draft(draft, token[:1])).abs().max() < 1e-10
    turn = torch.cat((first, ids(3, 5, seed=4)), dim=1)
    cold = q.generate(model, turn, max_new_tokens=6)
    assert torch.equal(q.generate(model, turn, cache=cache, max_new_tokens=6), cold)
    if history:
        cache.rollback([2, 4, 0])
        for r, n in enumerate(cache.lengths):
            assert (cache.last_logits[r] - model(cold[r : r + 1, :n]).logits[0, -1]).abs().max() < 1e-10


def test_padded_and_packed_prompts_continue_a_cache(model):
    rows, lengths = ids(3, 9), (2, 9, 5)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for r, n in enumerate(lengths):
        mask[r, 9 - n :] = 1
    padded = Segments.from_mask(mask)
    cold = q.generate(model, rows, segments=padded, max_new_tokens=4)
    packed = torch.cat([rows[r, 9 - n :] for r, n in enumerate(lengths)])[None]
    for held in ((0, 3, 1), (2, 9, 5), (1, 0, 5)):
        for prompt, segments in ((rows, padded), (packed, Segments.from_lengths([lengths]))):
            cache = model.new_cache(3)
            begin = Segments.from_mask(torch.tensor([[1] * n + [0] * (9 - n) for n in held]))
            shifted = torch.stack([rows[r].roll(n - 9) for r, n in enumerate(lengths)])
            model(shifted, segments=begin, cache=cache)
            steps = list(q.stream(model, prompt, segments=segments, cache=cache, max_new_tokens=4))
            assert torch.equal(torch.stack(steps, dim=1), cold[:, 9:])


def test_a_text_that_a_row_does_not_begin_with_is_named(model):
    cache = model.new_cache(2)
    list(model.prefill(ids(2, 5), cache))
    other = ids(2, 8)
    other[:, :5] = ids(2, 5)
    other[1, 3] += 1
    with pytest.raises(ValueError, match="Row 1 of the cache holds 5 tokens that the prompt does not start with"):
        q.generate(model, other % 97, cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="holds 2 sequences, but 3 prompts are given"):
        q.generate(model, ids(3, 8), cache=cache, max_new_tokens=2)
