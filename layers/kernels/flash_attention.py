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
from layers.segments import Segments, SequenceSpan
from layers.state.kv_cache import KVCache

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
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

    def read(run: SequenceSpan) -> tuple[Tensor, Tensor]:  # each (n, kvh, d)
        if state is None:
            return k[run.row, run.begin : run.end], v[run.row, run.begin : run.end]
        end = run.offset + run.end - run.begin
        seen = state.read(0, end, row=run.sequence, dtype=q.dtype)
        return seen.k[0].transpose(0, 1), seen.v[0].transpose(0, 1)

    runs = segments.runs
    keys, values = zip(*map(read, runs), strict=True)
    rows = q.flatten(0, 1)
    if segments.unpadded:
        return _sequences(choice, rows, keys, values, runs).view_as(q)
    # Gathered and put back once: writing into slices in a loop would make the backward quadratic.
    real = segments.mask.flatten().nonzero().flatten()
    y = _sequences(choice, rows[real], keys, values, runs)
    return torch.zeros_like(rows).index_copy(0, real, y).view_as(q)


def _sequences(
    choice: str, q: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...], runs: list[SequenceSpan]
) -> Tensor:
    """Queries (n h d) of all sequences, one behind the other; keys and values a sequence."""
    lengths, seen = [run.end - run.begin for run in runs], [len(x) for x in k]
    if choice == "sdpa_flash":
        parts = zip(q.split(lengths), k, v, strict=True)
        return torch.cat([attend_fused(choice, *(x[None] for x in part))[0] for part in parts])

    def boundaries(counts: list[int]) -> Tensor:
        return torch.tensor([0, *counts], device=q.device).cumsum(0).int()

    return _first(
        _flash(q.device).flash_attn_varlen_func(
            q,
            torch.cat(k),
            torch.cat(v),
            cu_seqlens_q=boundaries(lengths),
            cu_seqlens_k=boundaries(seen),
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
        with sdpa_kernel(FUSED):
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
