"""Causal softmax attention in fused kernels on CUDA: flash-attn in any of its releases, or torch's own.

torch's math kernel, which holds all scores, is not among them: where no other serves, a sentence says so.

Both align a mask to the last query and the last key, so that t queries continue s − t tokens before them, and both know
query heads that share a key head. Neither shows scores or pattern.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from layers.dispatch.availability import flash_module, generation
from layers.segments import Segments
from layers.state.kv_cache import KVCache

# In this order. cuDNN's comes last: it plans anew for every shape, in decoding for every token.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
NAMES = ("flash", "sdpa_flash")

Heads = Float[Tensor, "b t h d"]
KVHeads = Float[Tensor, "b s kvh d"]


def fused_attention(
    choice: str, q: Heads, k: KVHeads, v: KVHeads, *, segments: Segments, state: KVCache | None = None
) -> Heads:
    """softmax(q kᵀ / √d) v inside each sequence; padding gets zeros.

    Args:
        choice: "flash" or "sdpa_flash".
        k, v: of the tokens of this call, where there is no state.
        state: keys and values of the tokens before, those of this call appended already.
    Raises: RuntimeError where torch has no fused kernel for such tensors.
    """
    if segments.uniform_offset:
        if state is not None:
            k, v = (x.transpose(1, 2) for x in state.read(0, max(segments.ends), dtype=q.dtype))
        return attend_fused(choice, q, k, v)

    # Gathered and put back once: writing into slices in a loop would make the backward quadratic.
    rows, *of_call = (x.flatten(0, 1) for x in (q, k, v))
    if segments.padded:
        rows, *of_call = (x.flatten(0, 1)[segments.real_tokens] for x in (q, k, v))
    keys, values = of_call if state is None else _held(state, segments, q.dtype)
    y = _varlen(choice, rows, keys, values, segments)
    if not segments.padded:
        return y.view_as(q)
    return torch.zeros_like(q.flatten(0, 1)).index_copy(0, segments.real_tokens, y).view_as(q)


def _held(state: KVCache, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of every sequence up to its last token, one sequence behind the other: each (n kvh d)."""
    read = [state.read(0, run.offset + run.end - run.begin, row=run.sequence, dtype=dtype) for run in segments.runs]
    keys, values = (torch.cat([x[0] for x in heads], dim=1) for heads in zip(*read, strict=True))
    return keys.transpose(0, 1), values.transpose(0, 1)


def _varlen(choice: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Real tokens (n h d) of all sequences, one sequence behind the other; likewise their keys and values."""
    runs = segments.runs
    lengths = [run.end - run.begin for run in runs]
    seen = lengths if len(k) == len(q) else [run.offset + n for run, n in zip(runs, lengths, strict=True)]
    if choice == "sdpa_flash":
        parts = zip(q.split(lengths), k.split(seen), v.split(seen), strict=True)
        return torch.cat([attend_fused(choice, *(x[None] for x in part))[0] for part in parts])
    of_queries, of_keys = segments.boundaries
    return _first(
        _flash(q.device).flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=of_queries,
            cu_seqlens_k=of_queries if seen is lengths else of_keys,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(seen),
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
        )
    )


def attend_fused(
    choice: str, q: Heads, k: KVHeads, v: KVHeads, *, mask: Bool[Tensor, "#b 1 t s"] | None = None
) -> Heads:
    """As `attend` of layers/gated_attention.py; "flash" takes no mask."""
    if choice == "flash":
        assert mask is None
        return _first(_flash(q.device).flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=True))
    t, s = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, time, d)
    if mask is not None or q.dtype == torch.float32:  # served by the memory-efficient kernel, which knows no groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    bias = mask if mask is not None else causal_lower_right(t, s) if 1 < t < s else None
    try:
        with sdpa_kernel(FUSED, set_priority=True):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=bias is None and t == s, enable_gqa=k.shape[1] != q.shape[1]
            )
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise RuntimeError(
            f"torch has no fused attention for {tuple(q.shape)} queries and {tuple(k.shape)} keys in {q.dtype} on this "
            'device: name "sdpa" or "eager", which hold all scores.'
        ) from error
    return y.transpose(1, 2)


def _flash(device: torch.device) -> Any:
    name = flash_module(generation(device))
    assert name is not None
    return importlib.import_module(name)


def _first(found: Any) -> Tensor:
    """The output: some releases give the logsumexp besides."""
    return found[0] if isinstance(found, tuple) else found
