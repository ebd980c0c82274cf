"""Attention by other ways than all scores at once; and in every sequence of a batch, over what a cache holds.

Functions of "attention" have the signature of `attend` in layers/gated_attention.py. Functions of "attention.sequences"
take the tokens of a call. Where there is a state, it holds their keys and values already.

    q: (b t h d); k, v: (b t kvh d), with zeros at padding.
    segments: where sequences begin and end, and how many tokens each had before this call.
    state: keys and values up to the last token of this call, a row for each sequence; None without a cache.
    hook_scores, hook_pattern: fire where the scores of all rows are made at once. Elsewhere a waiting hook raises
        RuntimeError.
    Returns: (b t h d).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.dispatch.autocast import product_dtype
from layers.dispatch.backends import choose
from layers.dispatch.registry import Results, implements, on_auto
from layers.gated_attention import AttentionState, attend
from layers.hook_point import HookPoint
from layers.kernels.cases import random, with_gradients
from layers.kernels.flash_attention import attend_fused, fused_attention
from layers.kernels.isolation import GradientsApart, one_by_one, wild
from layers.kernels.tiled_attention import attend_in_tiles
from layers.segments import Segments
from layers.state.draft_keys import DraftKeys
from layers.state.kv_cache import KVCache
from layers.state.static_kv_cache import StaticKVCache

Point = HookPoint | None


def case(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Results:
    """70 tokens attend to themselves, the last 40 to all, and the last to all; key heads are shared."""
    d = head_dim or 256
    q, k, v = x = random(((1, 70, 4, d), (1, 70, 2, d), (1, 70, 2, d)), device, dtype)
    return with_gradients(tuple(attend(q[:, -t:], k, v, backend=backend) for t in (70, 40, 1)), x)


def _refuse(points: dict[str, Point]) -> None:
    """Raises: RuntimeError where a hook waits for a tensor that is not made."""
    for point in points.values():
        if point is not None and point.armed:
            point.refuse()


def _chosen(q: Tensor) -> str:
    return choose("attention", "auto", q, head_dim=q.shape[-1])


def _tiles_chosen(q: Tensor, _k: Tensor, _v: Tensor, **_options: Any) -> bool:
    return q.device.type == "cpu" and _chosen(q) == "cpp"


@on_auto("attention", where=_tiles_chosen)
@implements("attention", "sdpa")
def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **points: Point) -> Tensor:
    _refuse(points)
    t, s = q.shape[1], k.shape[1]
    causal = False
    if mask is None and t == s:  # a branch, for torch takes no comparison of traced lengths as a flag
        causal = True  # which aligns the first query with the first key
    elif mask is None and 1 < t < s:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    grouped = k.shape[2] != q.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, time, d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


@implements("attention", "cpp")
def cpp(_q: Tensor, _k: Tensor, _v: Tensor, **_options: Any) -> Tensor:
    raise RuntimeError('The "cpp" backend of attention is part of tiled_attention, and "attend" is not: choose "sdpa".')


def _flash_cannot_mask(q: Tensor, _k: Tensor, _v: Tensor, *, mask: Tensor | None = None, **_points: Point) -> bool:
    return mask is not None and _chosen(q) == "flash"


@on_auto("attention", where=_flash_cannot_mask)
@implements("attention", "sdpa_flash", checked_by=case)
def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **points: Point) -> Tensor:
    _refuse(points)
    return attend_fused("sdpa_flash", q, k, v, mask=mask)


@implements("attention", "flash", checked_by=case)
def flash(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **points: Point) -> Tensor:
    _refuse(points)
    if mask is not None:
        raise RuntimeError('The "flash" backend of attention takes no mask: choose "sdpa_flash".')
    return attend_fused("flash", q, k, v)


def _static(_q: Tensor, _k: Tensor, _v: Tensor, *, state: AttentionState | None, **_options: Any) -> bool:
    return isinstance(state, StaticKVCache)


@on_auto("attention.sequences", where=_static)
def over_static_cache(q: Tensor, _k: Tensor, _v: Tensor, *, state: StaticKVCache, **_options: Any) -> Tensor:
    return state.attend(q)


def _drafting(_q: Tensor, _k: Tensor, _v: Tensor, *, state: object, **_options: Any) -> bool:
    return isinstance(state, DraftKeys)


@on_auto("attention.sequences", where=_drafting)
def over_draft_keys(q: Tensor, _k: Tensor, _v: Tensor, *, state: DraftKeys, **options: Any) -> Tensor:
    _refuse({name: options[name] for name in ("hook_scores", "hook_pattern")})
    return attend(q, torch.cat(state.keys, dim=1), torch.cat(state.values, dim=1), mask=state.mask)


def _tiles_serve(q: Tensor, _k: Tensor, _v: Tensor, **_options: Any) -> bool:
    return q.device.type == "cpu" and not torch.is_grad_enabled()


def _in_tiles(
    backend: str, q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, state: KVCache | None, **points: Point
) -> Tensor:
    _refuse(points)
    return attend_in_tiles(*_as_multiplied(q, k, v), segments=segments, state=state, backend=backend)


on_auto("attention.sequences", where=_tiles_serve)(partial(_in_tiles, "auto"))
implements("attention.sequences", "cpp")(partial(_in_tiles, "cpp"))


@implements("attention.sequences", "sdpa")
def sdpa_in_sequences(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if _tiles_serve(q, k, v):
        return _in_tiles("sdpa", q, k, v, **options)
    return _by_attend("sdpa", q, k, v, **options)


def _fused(
    backend: str, q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, state: KVCache | None, **points: Point
) -> Tensor:
    _refuse(points)
    return fused_attention(backend, *_as_multiplied(q, k, v), segments=segments, state=state)


implements("attention.sequences", "flash")(partial(_fused, "flash"))
implements("attention.sequences", "sdpa_flash")(partial(_fused, "sdpa_flash"))


def _by_attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, state: KVCache | None, **points: Point
) -> Tensor:
    """`attend` of all rows at once, under a mask where they differ; of one sequence at a time where it must be."""
    if q.device.type == "cuda":  # fused kernels do not see autocast
        q, k, v = _as_multiplied(q, k, v)
    if state is None and wild(segments, q, k, v):
        _refuse(points)

        def alone(_: Tensor | None, *parts: Tensor) -> tuple[Tensor, None]:
            return attend(*parts, backend=backend), None

        return one_by_one(segments, None, alone, q, k, v)[0]
    if state is None:
        mask, apart = None if segments.unpadded else segments.attention_mask, GradientsApart(segments)
        q, k, v = apart.inputs(q, k, v)
        return apart.output(attend(q, k, v, mask=mask, backend=backend, **points))
    if segments.packed:
        _refuse(points)
        y = torch.zeros_like(q)
        for n, row, begin, end, past in segments.runs:
            k, v = (x.transpose(1, 2) for x in state.read(0, past + end - begin, row=n, dtype=q.dtype))
            y[row : row + 1, begin:end] = attend(q[row : row + 1, begin:end], k, v, backend=backend)
        return y
    k, v = (x.transpose(1, 2) for x in state.read(0, max(segments.ends), dtype=q.dtype))
    mask = None
    if not segments.uniform_offset:  # rows end at different places
        places = torch.arange(k.shape[1], device=k.device)
        mask = segments.positions[:, None, :, None] >= places
        stale = places >= torch.tensor(segments.ends, device=k.device)[:, None]  # another sequence's, from before
        k, v = (x.masked_fill(stale[..., None, None], 0.0) for x in (k, v))
    return attend(q, k, v, mask=mask, backend=backend, **points)


implements("attention.sequences", "eager")(partial(_by_attend, "eager"))


def _as_multiplied(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, where it is on: kernels that are called by name do not see it."""
    dtype = product_dtype(tensors[0])
    return tuple(x.to(dtype) for x in tensors)
