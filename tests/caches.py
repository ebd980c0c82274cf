"""Helpers of the cache tests: continue a cache, and run cold."""

import torch

from layers.segments import Segments


def run(model, cache, ids):
    """Continue a cache, a few tokens in compiled code; (b, vocab) logits after the last token."""
    cache.last_logits = model.step(ids, cache)
    return cache.last_logits


def cold(model, ids):
    """The same logits from all tokens at once, without a cache."""
    with torch.no_grad():
        return model(ids).logits[:, -1]


def cold_draft(model, ids, token):
    """MTP's logits after `ids` and `token` (b,), from all pairs at once: (b, vocab).

    One token more follows, as a sequence's last has no next one and its pair would not count.
    """
    ids = torch.cat((ids, token[:, None]), dim=1)
    with torch.no_grad():
        hidden = model(ids).hidden
        segments = Segments.full(ids)
        rope = model._rotation(segments.positions, hidden.dtype)
        ahead, _ = model.mtp(hidden, model.embed_tokens(ids.roll(-1, dims=1)), rope, segments)
        return model.lm_head(ahead[:, -2])


def same(a, b, bound=1e-10):
    return (a - b).abs().max() < bound
