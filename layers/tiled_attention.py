"""Causal attention in tiles of queries on a fixed grid: no mask over the context, and no trace of how it was cut."""

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 128  # queries; two chunks of the delta rule


def tiled_attention(
    q: Float[Tensor, "b h t d"], k: Float[Tensor, "b kvh s d"], v: Float[Tensor, "b kvh s d"]
) -> Float[Tensor, "b h t d"]:
    """softmax(q kᵀ / √d) v for the last t of s tokens, on the CPU, without gradients.

    A tile of queries looks at all keys before its tile without a mask, and at its own tile causally; the two answers
    are joined by their logsumexp. So transient memory does not grow with s, and as tiles stand on a grid of absolute
    positions, a prompt gives the same bits in one call or in chunks that are multiples of 64.
    """
    b, h, t, d = q.shape
    kv_heads, past = k.shape[1], k.shape[2] - t
    out = torch.empty_like(q)
    begin = past
    while begin < past + t:
        base = begin // TILE * TILE
        end = min(base + TILE, past + t)
        rows = q[:, :, begin - past : end - past]
        own_k, own_v = (x[:, :, base:end].repeat_interleave(h // kv_heads, dim=1) for x in (k, v))
        y, lse = _flash(rows, own_k, own_v, causal=end - begin)
        if base:
            # Without a mask, the queries that share a key head are rows like any others.
            before = rows.reshape(b, kv_heads, -1, d)
            y_before, lse_before = _flash(before, k[:, :, :base], v[:, :, :base])
            lse_before = lse_before.reshape(b, h, -1)
            most = torch.maximum(lse, lse_before)
            w, w_before = (lse - most).exp()[..., None], (lse_before - most).exp()[..., None]
            y = (y * w + y_before.reshape(rows.shape) * w_before) / (w + w_before)
        out[:, :, begin - past : end - past] = y
        begin = end
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: int = 0) -> tuple[Tensor, Tensor]:
    """Output and logsumexp (fp32); `causal`: so many queries, which are the last of the keys."""
    mask = None
    if causal and causal < k.shape[2]:  # the tile was begun by an earlier call
        seen = torch.ones(causal, k.shape[2], dtype=torch.bool).tril(k.shape[2] - causal)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    square = bool(causal) and mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, square, attn_mask=mask)
