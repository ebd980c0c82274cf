"""The longest context whose cache fits: computed from the bytes a token, then tried by allocating its buffers."""

from collections.abc import Iterator
from functools import partial

import torch

from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.cache.hybrid import new_cache
from qwen3next.config import ModelConfig
from recipes.gpu.bench import Bench, Job, Row, free_bytes

SPARE = 0.03  # of the free memory


def jobs(bench: Bench) -> Iterator[Job]:
    for kind in (torch.bfloat16, torch.int8):
        yield Job(f"cache alone, {kind}", partial(_tried, bench, bench.full, kind, ""))
    yield Job("model", lambda: [bench.load(margin=0.4)])
    yield Job(
        "beside weights", lambda: _tried(bench, bench.config, torch.bfloat16, f", beside {bench.layers}' weights")
    )


def _tried(bench: Bench, config: ModelConfig, kind: torch.dtype, beside: str) -> Iterator[Row]:
    """A cache of one sequence of so many tokens; nine tenths where that does not fit, and so on."""
    free = free_bytes(bench.device)
    room = int(free * (1 - SPARE)) - config.bytes_per_sequence(2)
    computed = tokens = room // config.bytes_per_token(kind.itemsize)
    while tokens and not _fits(bench, config, kind, tokens):
        tokens = tokens * 9 // 10
    yield {
        "what": f"longest context in {str(kind).removeprefix('torch.')}, {config.num_hidden_layers} layers{beside}",
        "tokens by computation": computed,
        "tokens allocated": tokens,
        "bytes a token": config.bytes_per_token(kind.itemsize),
        "bytes free": free,
        "cache alone": not beside,
    }


def _fits(bench: Bench, config: ModelConfig, kind: torch.dtype, tokens: int) -> bool:
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        cache = new_cache(
            config, batch=1, max_len=tokens, dtype=torch.bfloat16, kv_dtype=kind, device=bench.device, state_dtype=None
        )
        places = Segments(1, tokens, bench.device)
        for state in cache.layers:
            if isinstance(state, KVCache):
                state.reserve(places)
        bench.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True
