"""Causal attention in tiles of queries and blocks of keys, both on fixed grids: for prefill and decoding on the CPU.

There is no mask over the context, and transient memory does not grow with it. How a prompt was cut and how its keys are
stored does not change the bits.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from layers.cpp import ops as native
from layers.dispatch.backends import choose
from layers.norm import at_least_fp32
from layers.segments import Segments, SequenceSpan
from layers.state.kv_cache import KVCache

FEW = 16  # queries below which calling the C++ kernel, which takes 64 at a time, is not worth it
TILE = 128  # queries; two chunks of the delta rule
BLOCK = 4096  # keys

# Keys and values (b kvh n d) of the places from the first number up to the second, in the dtype of the queries.
Read = Callable[[int, int], tuple[Tensor, Tensor]]


def attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, state: KVCache | None, backend: str
) -> Tensor:
    """`tiled_attention` in every sequence: q (b t h d) over k, v (b t kvh d), or over what the state holds.

    All rows at once where they stand at the same position, else a sequence at a time.
    """
    if state is None and torch.compiler.is_compiling():
        return _whole(q, k, v, None if segments.unpadded else segments.segment_ids, backend)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, time, d)
    if segments.uniform_offset:

        def read_all(first: int, last: int) -> tuple[Tensor, Tensor]:
            if state is None:
                return k[:, :, first:last], v[:, :, first:last]
            return state.read(first, last, dtype=q.dtype)

        return tiled_attention(q, read_all, past=segments.offsets[0], backend=backend).transpose(1, 2)
    y = torch.zeros_like(q)
    for run in segments.runs:

        def read(first: int, last: int, run: SequenceSpan = run) -> tuple[Tensor, Tensor]:
            if state is not None:
                return state.read(first, last, row=run.sequence, dtype=q.dtype)
            here = slice(run.row, run.row + 1), slice(None), slice(run.begin + first, run.begin + last)
            return k[here], v[here]

        rows = slice(run.row, run.row + 1), slice(None), slice(run.begin, run.end)
        y[rows] = tiled_attention(q[rows], read, past=run.offset, backend=backend)
    return y.transpose(1, 2)


@torch.library.custom_op("qwen3next::attend_in_tiles", mutates_args=(), device_types="cpu")
def _whole(q: Tensor, k: Tensor, v: Tensor, number: Tensor | None, backend: str) -> Tensor:
    """`attend_in_tiles` as an operator of torch: a traced graph need not unroll its loops over tiles and sequences."""
    segments = Segments.full(q) if number is None else Segments.from_document_ids(number)
    return attend_in_tiles(q, k, v, segments=segments, state=None, backend=backend).contiguous()


@_whole.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, _number: Tensor | None, _backend: str) -> Tensor:
    return q.new_empty(q.shape)


def tiled_attention(
    q: Float[Tensor, "b h t d"], read: Read, *, past: int, backend: str = "auto"
) -> Float[Tensor, "b h t d"]:
    """softmax(q kᵀ / √d) v for the t tokens after `past` others, without gradients.

    A tile of queries attends to all keys before its tile without a mask, block by block, and to its own tile causally;
    the outputs are joined by their logsumexp. As tiles stand on a grid of absolute positions, a prompt gives the same
    bits in one call or in chunks that are multiples of 64.

    Args:
        backend: "cpp" (fp32, bf16) or "sdpa"; "auto" picks by the number of queries.
    Raises: ValueError for an unknown backend; RuntimeError for one that cannot run here.
    """
    if backend not in ("auto", "sdpa") and choose("attention", backend, q) != "cpp":
        raise RuntimeError(f'The {backend!r} backend of attention is no part of tiled_attention: choose "sdpa".')
    if q.shape[2] == 1:
        return _one(q, read, past + 1, backend)
    b, _, t, d = q.shape
    out = torch.empty_like(q)
    begin = past
    while begin < past + t:
        base = begin // TILE * TILE
        end = min(base + TILE, past + t)
        rows = q[:, :, begin - past : end - past]
        k, v = read(base, end)
        kv_heads = k.shape[1]
        y, lse = _flash(rows, k, v, backend, causal=end - begin)
        # Without a mask, the queries that share a key head are rows like any others.
        y, lse, before = y.reshape(b, kv_heads, -1, d), lse.reshape(b, kv_heads, -1), rows.reshape(b, kv_heads, -1, d)
        for block in range(0, base, BLOCK):
            y_block, lse_block = _flash(before, *read(block, min(block + BLOCK, base)), backend)
            y, lse = _join(y, lse, y_block, lse_block)
        out[:, :, begin - past : end - past] = y.reshape(rows.shape)
        begin = end
    return out


def _one(q: Tensor, read: Read, length: int, backend: str) -> Tensor:
    """A single query, which needs no mask. On "auto" plain products serve many keys, which they read faster."""
    b, d = q.shape[0], q.shape[3]
    blocks = [(i, min(i + BLOCK, length)) for i in range(0, length, BLOCK)]
    k, v = read(*blocks[0])
    rows = q.reshape(b, k.shape[1], -1, d)
    if len(blocks) == 1:
        return _flash(rows, k, v, backend)[0].reshape(q.shape)
    if backend != "auto":
        y, lse = _flash(rows, k, v, backend)
        for block in blocks[1:]:
            y, lse = _join(y, lse, *_flash(rows, *read(*block), backend))
        return y.to(q.dtype).reshape(q.shape)
    scores = [rows @ k.mT, *(rows @ read(*block)[0].mT for block in blocks[1:])]
    pattern = (at_least_fp32(torch.cat(scores, dim=-1)) * d**-0.5).softmax(-1).to(q.dtype).split(BLOCK, dim=-1)
    y = pattern[0] @ v
    for part, block in zip(pattern[1:], blocks[1:], strict=True):
        y = y + part @ read(*block)[1]
    return y.reshape(q.shape)


def _join(y: Tensor, lse: Tensor, y_too: Tensor, lse_too: Tensor) -> tuple[Tensor, Tensor]:
    """The output over two sets of keys, in fp32 or better, from the outputs over each."""
    most = torch.maximum(lse, lse_too)
    w, w_too = (lse - most).exp(), (lse_too - most).exp()
    both = w + w_too
    return y * (w / both)[..., None] + y_too * (w_too / both)[..., None], most + both.log()


def _flash(q: Tensor, k: Tensor, v: Tensor, backend: str, causal: int = 0) -> tuple[Tensor, Tensor]:
    """Output and logsumexp (fp32); `causal`: so many queries, which are the last of the keys."""
    if (backend != "auto" or q.shape[2] >= FEW) and choose("attention", backend, q) == "cpp":
        y, lse = native.attend(q, k, v, bool(causal))
        return y, lse
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = None
    if causal and causal < k.shape[2]:  # the tile was begun by an earlier call
        seen = torch.ones(causal, k.shape[2], dtype=torch.bool).tril(k.shape[2] - causal)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    square = bool(causal) and mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, square, attn_mask=mask)
