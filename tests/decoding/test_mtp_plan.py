"""The MTP layer in compiled code: equal to the modules, to the bit alike however steps were divided, never stale."""

import pytest
import torch
from conftest import small_model

from qwen3next.cache.rollback_log import LastCall
from qwen3next.decoding.mtp_plan import WaitingPairs, available_mtp_plan, why_not_draft

TOKEN = torch.tensor([5, 9])


def ids(t, seed=1):
    return torch.randint(0, 97, (2, t), generator=torch.Generator().manual_seed(seed))


def held(cache):
    return torch.stack(cache.mtp.read(0, min(cache.lengths) - 1))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def model(request):
    return small_model(dtype=request.param)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_drafts_are_those_of_the_modules(model, kv_dtype):
    cache = model.new_cache(2, max_len=60, mtp=True, kv_dtype=kv_dtype)
    model.step(ids(9), cache)
    assert available_mtp_plan(model) is not None
    drafts, logits = model.draft_tokens(cache, TOKEN, 3), model.draft(cache, TOKEN)
    model.set_backend("decode", "torch")
    try:
        expected, found = model.draft(cache, TOKEN), model.draft_tokens(cache, TOKEN, 3)
    finally:
        model.set_backend("decode", "auto")
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-10}[model.dtype]
    assert (logits - expected).norm() <= bound * expected.norm()
    assert torch.equal(drafts[:, 0], logits.argmax(-1))
    assert model.dtype == torch.bfloat16 or torch.equal(drafts, found)


def test_what_is_remembered_does_not_depend_on_how_tokens_were_divided(model):
    """Nor on when it is read, nor on the other row."""
    text = ids(24)
    found = []
    for parts in ([24], [1] * 24, [5, 1, 1, 10, 7]):
        cache = model.new_cache(2, max_len=60, mtp=True)
        for n, part in enumerate(text.split(parts, dim=1)):
            model.step(part, cache)
            if n % 2:
                cache.fork()
        assert isinstance(cache.waiting_pairs, WaitingPairs) or len(parts) % 2 == 0
        found.append((held(cache), model.draft_tokens(cache, TOKEN, 3)))
    alone = model.new_cache(1, max_len=60, mtp=True)
    model.step(text[1:], alone)
    for keys, drafts in found[1:]:
        assert torch.equal(keys, found[0][0])
        assert torch.equal(drafts, found[0][1])
    assert torch.equal(held(alone), found[0][0][:, 1:])
    assert torch.equal(model.draft_tokens(alone, TOKEN[1:], 3), found[0][1][1:])


def test_pairs_of_tokens_that_were_taken_back_are_not_written(model):
    """Rows go back by different numbers, and on by others: as caches that never saw the tokens between."""
    text, wrong = ids(20), ids(4, seed=2)
    cache = model.new_cache(2, max_len=60, mtp=True, history=8)
    model.step(text[:, :9], cache)
    model.step_all(wrong, cache)
    cache.take_back([4, 2])
    more = torch.stack((text[0, 9:14], text[1, 9:14]))
    model.step_all(more, cache)
    for row, back in enumerate([4, 2]):
        alone = model.new_cache(1, max_len=60, mtp=True)
        kept = torch.cat((text[row, :9], wrong[row, : 4 - back], more[row]))[None]
        model.step(kept, alone)
        n = alone.lengths[0] - 1
        assert torch.equal(torch.stack(cache.mtp.read(0, n, row=row)), held(alone))
        drafted = model.draft_tokens(cache, TOKEN, 3)[row]
        assert torch.equal(drafted, model.draft_tokens(alone, TOKEN[row : row + 1], 3)[0])


def test_a_change_of_a_weight_acts_on_the_next_draft():
    model = small_model()
    cache = model.new_cache(2, max_len=60, mtp=True)
    model.step(ids(9), cache)
    before = model.draft(cache, TOKEN)
    model.mtp.fc.weight = torch.nn.Parameter(model.mtp.fc.weight.detach() * 2 + 0.1)
    after = model.draft(cache, TOKEN)
    assert not torch.equal(before, after)
    fresh = model.draft(cache.fork()[0], TOKEN)
    assert torch.equal(after, fresh)


def test_hooks_fire_and_the_reason_is_told():
    model, seen = small_model(), []
    cache = model.new_cache(2, max_len=60, mtp=True)
    model.step(ids(9), cache)
    model.draft(cache, TOKEN)
    assert why_not_draft(model) is None
    with model.hooks([("mtp.hook_final_norm", lambda x, hook: seen.append(hook.name))]):
        model.draft_tokens(cache, TOKEN, 2)
        assert "hooks" in why_not_draft(model)
    assert len(seen) == 2
    assert "no MTP layer" in why_not_draft(small_model(mtp_num_hidden_layers=0))


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_what_is_taken_back_is_folded_to_the_bit(model, state_dtype, monkeypatch):
    """The short way from the last call's start gives what the replay from the kept state gives."""
    found = []
    for short in (True, False):
        cache = model.new_cache(2, max_len=60, history=8, state_dtype=state_dtype)
        model.step(ids(9), cache)
        model.step_all(ids(5, seed=3), cache)
        used = []
        after = LastCall.after

        def chosen(self, *arguments, after=after, used=used, short=short):
            point = after(self, *arguments) if short else None
            used.append(point is not None)
            return point

        monkeypatch.setattr(LastCall, "after", chosen)
        cache.take_back([3, 5])
        monkeypatch.undo()
        assert used == [short]
        found.append([x for s in cache.layers if hasattr(s, "conv") for x in (s.conv, s.recurrent)])
        found[-1] += [cache.hidden, model.step(TOKEN[:, None], cache)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
