"""Tiled attention against the definition, and independence of how a prompt is cut."""

import pytest
import torch
from conftest import small_model
from parity import tokens

from layers.gated_attention import attend
from layers.kernels.tiled_attention import TILE, tiled_attention
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next import Qwen3Next, presets
from qwen3next.generation import block_parts

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("t", [1, 2, TILE - 1, TILE, TILE + 1, 300])
@pytest.mark.parametrize("past", [0, 1, 63, TILE, 200])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_values(t, past, dtype, bound):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16, dtype=dtype) for h, n in ((6, t), (2, past + t), (2, past + t)))
    expected = attend(*(x.double().transpose(1, 2) for x in (q, k, v)), backend="eager").transpose(1, 2)
    actual = tiled_attention(q, lambda a, b: (k[:, :, a:b], v[:, :, a:b]), past=past)
    assert (actual - expected).abs().max() < bound


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("chunk", [64, 128, 192, 448])
def test_chunked_prefill_is_bitwise_one_shot_in_bf16(chunk, width):
    model = small_model(dtype=torch.bfloat16, hidden_size=width, head_dim=width // 2, moe_intermediate_size=width // 4)
    ids = tokens(700, b=1)
    one, parts = model.new_cache(max_len=701), model.new_cache(max_len=701)
    for cache, size in ((one, 700), (parts, chunk)):
        for _ in model.prefill(ids, cache, chunk_size=size):
            pass
    assert torch.equal(one.last_logits, parts.last_logits)
    for a, b in zip(one.layers, parts.layers, strict=True):
        for name in ("k", "v") if hasattr(a, "k") else ("conv", "recurrent"):
            assert torch.equal(getattr(a, name)[:, :700], getattr(b, name)[:, :700])


def test_chunked_prefill_is_close_in_fp32():
    model = small_model(initializer_range=0.02)
    ids = tokens(500, b=2)
    with torch.no_grad():
        whole = model(ids).logits
        for chunk in (1, 37, 100, 333):
            cache = model.new_cache(batch=2, max_len=500)
            begin = 0 if chunk > 1 else 490
            if begin:
                model(ids[:, :begin], cache=cache)
            parts = [model(ids[:, i : i + chunk], cache=cache).logits for i in range(begin, 500, chunk)]
            assert (torch.cat(parts, dim=1) - whole[:, begin:]).abs().max() <= 1e-5


@pytest.mark.parametrize("past", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_parts_of_a_long_prompt_leave_no_trace(past, dtype, monkeypatch):
    """A block processes 2048 tokens at a time; processing all at once is bit-equal in bf16, and in fp32 to rounding."""
    model = Qwen3Next(presets.tiny(mtp_num_hidden_layers=0)).to(dtype).eval()
    ids = torch.randint(0, 256, (2, past + 4500), generator=torch.Generator().manual_seed(0))
    found = []
    for at_a_time in (block_parts.TOKENS, 10**9):
        monkeypatch.setattr(block_parts, "TOKENS", at_a_time)
        cache = model.new_cache(batch=2, max_len=ids.shape[1])
        if past:
            model(ids[:, :past], cache=cache)
        logits = model(ids[:, past:], cache=cache, logits_to_keep=3).logits
        held = [s.read(0, past + 4500) if isinstance(s, KVCache) else (s.conv, s.recurrent) for s in cache.layers]
        found.append([logits, *(x for state in held for x in state)])
    for a, b in zip(*found, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_parts_of_padded_prompts_with_sandwich_norms_leave_no_trace(monkeypatch):
    """Rows of unequal lengths: only the feed-forward and its norms run in parts."""
    torch.manual_seed(0)
    model = Qwen3Next(presets.tiny(sandwich_norm=True, mtp_num_hidden_layers=0)).eval()
    ids, found = torch.randint(0, 256, (2, 2500)), []
    segments = Segments.from_mask(torch.arange(2500) < torch.tensor([[2500], [2300]]))
    for at_a_time in (block_parts.TOKENS, 10**9):
        monkeypatch.setattr(block_parts, "TOKENS", at_a_time)
        cache = model.new_cache(batch=2, max_len=2500)
        found.append(model(ids, segments=segments, cache=cache, logits_to_keep=1).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
