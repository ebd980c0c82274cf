"""Prefill in chunks of a multiple of 64 gives the bits of one call, for every length of the prompt."""

import pytest
import torch

import qwen3next as q
from layers.kernels.linear import spans
from layers.state.kv_cache import KVCache
from qwen3next.generation import block_parts

# Around multiples of 64 and attention's tiles of 128, with remainders of every kind.
LENGTHS = [1, 63, 64, *range(65, 82), 127, 128, 129, 130, 143, 144, 191, 192, 193, 200, 255, 256, 257, 272, 300]


def prefilled(model, ids, size, past=0):
    cache = model.new_cache(len(ids))
    for part in (ids[:, :past], ids[:, past:]) if past else (ids,):
        for _ in model.prefill(part, cache, chunk_size=size if cache.lengths[0] == past else 4096):
            pass
    found = [cache.last_logits, cache.hidden]
    for state in cache.layers:
        found += state.read(0, ids.shape[1]) if isinstance(state, KVCache) else [state.conv, state.recurrent]
    return found


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    torch.manual_seed(0)
    return q.Qwen3Next(q.presets.tiny(initializer_range=0.06)).to(request.param).eval()


@pytest.mark.parametrize("batch", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_length(model, batch):
    ids = torch.randint(0, 256, (batch, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    for n in LENGTHS:
        whole = prefilled(model, ids[:, :n], 4096)
        for size in (64, 128, 192):
            assert all(map(torch.equal, prefilled(model, ids[:, :n], size), whole)), (n, size)


@pytest.mark.parametrize("past", [64, 192])
def test_behind_whole_chunks(model, past):
    ids = torch.randint(0, 256, (1, past + 300), generator=torch.Generator().manual_seed(1))
    for n in (65, 66, 129, 200, 257):
        whole = prefilled(model, ids[:, : past + n], 4096, past)
        for size in (64, 128):
            assert all(map(torch.equal, prefilled(model, ids[:, : past + n], size, past), whole)), (n, size)


@pytest.mark.parametrize("rest", [1, 2, 15, 16, 17])
def test_parts_that_a_block_cuts_from_one_call(model, rest, monkeypatch):
    """A call longer than a block's part, whose last part would have only a few tokens."""
    monkeypatch.setattr(block_parts, "TOKENS", 128)
    ids = torch.randint(0, 256, (1, 256 + rest), generator=torch.Generator().manual_seed(1))
    in_parts = prefilled(model, ids, 4096)
    monkeypatch.undo()
    assert all(map(torch.equal, in_parts, prefilled(model, ids, 4096)))


def test_spans():
    assert spans(0, 64) == [(0, 0)]
    assert spans(79, 64) == [(0, 79)]
    assert spans(80, 64) == [(0, 64), (64, 80)]
    assert spans(200, 64) == [(0, 64), (64, 128), (128, 200)]
    assert spans(8, 3, 1) == [(0, 3), (3, 6), (6, 8)]
