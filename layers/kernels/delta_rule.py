"""Fast implementations of the gated delta rule: over chunks in torch and in C++ on the CPU, with Triton on CUDA."""

import torch
from torch import Tensor

from layers.chunk_decay import bounded
from layers.cpp import functions as native
from layers.delta_rule import chunked, exact
from layers.dispatch.registry import implements
from layers.kernels import cases
from layers.kernels.chunked_recompute import chunked_recompute as recomputed
from layers.kernels.isolation import over_chunks, wild
from layers.segments import Segments


def _mixes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments) -> bool:
    """Whether chunks that several sequences share would mix them: see layers/kernels/isolation.py.

    Keys longer than 1 are among the causes: what a chunk of them writes may grow from token to token without bound.
    """
    if wild(segments, q, v) or wild(segments, log_decay.exp(), beta, largest=3.0):
        return True
    return segments.packed and wild(segments, torch.linalg.vector_norm(k.detach(), dim=-1), largest=1.01)


_over_chunks = over_chunks("delta_rule", _mixes)
implements("delta_rule", "chunked")(_over_chunks(chunked))


@implements("delta_rule", "chunked_recompute")
@_over_chunks
def chunked_recompute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """`chunked` a few chunks at a time, with its gradient written out; products in bf16 where v is."""
    log_decay, beta, state = exact(k, v, bounded(log_decay), beta, state)
    products = v.dtype if v.dtype == torch.bfloat16 else state.dtype
    resets = None if segments is None else segments.resets
    o, state = recomputed(q.to(products), k.to(products), v.to(products), log_decay, beta, state, resets)
    return o.to(v.dtype), state


@implements("delta_rule", "cpp")
@_over_chunks
def cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """One state at a time in a core's caches."""
    log_decay, beta, state = exact(k, v, bounded(log_decay), beta, state)
    q, k, log_decay, beta, state = (x.float().contiguous() for x in (q, k, log_decay, beta, state))
    return native.delta_rule(q, k, v, log_decay, beta, None if segments is None else segments.resets, state)


@implements("delta_rule", "fla", checked_by=cases.delta_rule)
def fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernels, whose chunks end with the sequence."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    b, h, dtype, cu_seqlens = v.shape[0], v.shape[2], v.dtype, None
    q, k, log_decay = q.to(dtype), k.to(dtype), bounded(log_decay)
    # The fused kernel has no backward; the chunked one is built for many tokens.
    single = v.shape[1] == 1 and not torch.is_grad_enabled()
    if segments is not None:
        cu_seqlens = segments.cu_seqlens  # the same tensor in every layer: FLA keeps what it works out from it
        q, k, v, log_decay, beta = (x.flatten(0, 1)[None] for x in (q, k, v, log_decay, beta))
        state = None if state is None else segments.to_segments(state)
    kernel = fused_recurrent_gated_delta_rule if single else chunk_gated_delta_rule
    o, final = kernel(
        q,
        k,
        v,
        g=log_decay.float(),
        beta=beta.float(),
        scale=1.0,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    if segments is not None:
        o, final = o.unflatten(1, (b, -1))[0], final[segments.last_segments]
    assert final.shape[:2] == (b, h)
    return o, final
