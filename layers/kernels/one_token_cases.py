"""The cases by which the kernels of layers/triton/ are compared with their definitions: small, but no size is round."""

import torch
from torch import Tensor

from layers.dispatch.registry import Results, function_of
from layers.kernels.cases import random

ROWS = 3


def add_rms_norm(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    x, y, weight = _inputs(((ROWS, 100), (ROWS, 100), (100,)), device, dtype)
    run = function_of("one_token.add_rms_norm", backend)
    return *run(x, y, weight, eps=1e-6, zero_centred=True), run(x, None, weight, eps=1e-6, zero_centred=False)[1]


def convolve(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    channels = 2 * 2 * 24 + 4 * 40
    x, weight, state = _inputs(((ROWS, channels), (channels, 4), (2, ROWS, 3, channels)), device, dtype)
    side = torch.ones(1, dtype=torch.long, device=device)
    found = function_of("one_token.convolve", backend)(x, weight, state, side, key_heads=2, value_heads=4, key_dim=24)
    return *found, state


def delta_rule(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    keys, values, heads, state = (ROWS, 2, 24), (ROWS, 4, 40), (ROWS, 4), (2, ROWS, 4, 24, 40)
    shapes = (keys, keys, values, heads, heads, (ROWS, 160), (4,), (4,), (40,), state)
    q, k, v, b, a, z, a_log, dt_bias, weight, s = _inputs(shapes, device, dtype)
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (q, k))
    s, side = s.float(), torch.zeros(1, dtype=torch.long, device=device)
    run = function_of("one_token.delta_rule", backend)
    return run(q, k, v, b, a, z, a_log, dt_bias, weight, s, side, eps=1e-6), s


def rotate_and_store(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    """A head of 40 numbers, 12 of which are turned, three rows at unequal positions."""
    new, buffer = (ROWS, 2, 40), (ROWS, 2, 20, 40)
    shapes = ((ROWS, 6, 40), new, new, (40,), (40,), (20, 12), (20, 12), buffer, buffer)
    q, k, v, q_weight, k_weight, cos, sin, keys, values = _inputs(shapes, device, dtype)
    place = torch.tensor([0, 7, 19], device=device)
    run = function_of("one_token.rotate_and_store", backend)
    y = run(q, k, v, q_weight, k_weight, cos, sin, keys, values, place, eps=1e-6, zero_centred=True)
    return y, keys, values


def attend(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    """A row of one place, one in the middle of a block and one of more blocks than there are splits."""
    shapes = ((ROWS, 6, 40), (ROWS, 2, 2150, 40), (ROWS, 2, 2150, 40), (ROWS, 240))
    q, keys, values, gate = _inputs(shapes, device, dtype)
    place = torch.tensor([0, 99, 2120], device=device)
    return (function_of("one_token.attend", backend)(q, keys, values, place, gate),)


def route(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    """Logits with many ties: which experts are chosen, and in which order, is compared too."""
    logits, x, weight = _inputs(((ROWS, 60), (ROWS, 100), (1, 100)), device, dtype)
    found = function_of("one_token.route", backend)(logits.round(), x, weight, top_k=7, norm_topk_prob=True)
    return found


def experts(backend: str, device: torch.device, dtype: torch.dtype, _head_dim: int) -> Results:
    shapes = ((ROWS, 100), (ROWS, 3), (ROWS, 1), (9, 2 * 36, 100), (9, 100, 36), (52, 100), (52, 100), (100, 52))
    x, weights, gates, gate_up, down, *shared = _inputs(shapes, device, dtype)
    numbers = torch.tensor([[0, 8, 3], [4, 2, 7], [8, 1, 0]], dtype=torch.int32, device=device)
    run = function_of("one_token.experts", backend)
    return (run(x, weights, numbers, gates, gate_up * 0.1, down * 0.1, tuple(y * 0.1 for y in shared)),)


def _inputs(shapes: tuple[tuple[int, ...], ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random numbers that both sides can hold: what is compared is the kernel, not the rounding of its inputs."""
    return [x.detach().bfloat16().to(dtype) for x in random(shapes, device, torch.float32)]
