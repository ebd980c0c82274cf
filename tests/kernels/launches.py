"""The kernels that a decoding step launches, noted in place of being run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import layers.triton.attention
import layers.triton.deltanet
import layers.triton.experts
import layers.triton.norm
import layers.triton.rows
import qwen3next as q
from layers.gated_deltanet import DeltaNetState
from layers.state.kv_cache import KVCache
from qwen3next.decoding.graph_states import GraphStates
from qwen3next.decoding.token_step import TokenStep

MODULES = (
    layers.triton.attention,
    layers.triton.deltanet,
    layers.triton.experts,
    layers.triton.norm,
    layers.triton.rows,
)
# Make a view or take memory, and launch nothing.
FREE = ("view", "empty", "new_empty", "select", "slice", "split", "unsqueeze", "squeeze", "transpose", "t.", "detach",
        "alias", "expand", "unbind", "as_strided", "permute")  # fmt: skip


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    warps: int


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Note launches of our kernels instead of running them."""
    found: list[Launch] = []

    def launch(kernel, grid, like, *tensors, warps=4, **constants):
        assert all(n > 0 for n in grid)
        found.append(Launch(kernel, tensors, constants, warps))

    real = [module.launch for module in MODULES]
    for module in MODULES:
        module.launch = launch
    try:
        yield found
    finally:
        for module, function in zip(MODULES, real, strict=True):
            module.launch = function


class Operations(TorchDispatchMode):
    """Counts operations of torch that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").lstrip("_")
        if not name.startswith(FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def step_on_meta(
    config: q.ModelConfig, dtype: torch.dtype, batch: int = 1, kv_dtype: torch.dtype | None = None
) -> tuple[list[Launch], list[str]]:
    """Our launches and torch's operations in a step of a model, without its numbers."""
    places = 512
    with torch.device("meta"):
        model = q.Qwen3Next(config).to(dtype).eval()
        cache = model.new_cache(batch, max_len=places)
        states = [s for s in cache.layers if isinstance(s, DeltaNetState)]
        graph_states = GraphStates(states) if states else None
        size = (batch, config.num_key_value_heads, places, config.head_dim)
        kv = [(torch.empty(size, dtype=kv_dtype or dtype),) * 2 for s in cache.layers if isinstance(s, KVCache)]
        ids = torch.zeros(batch, 1, dtype=torch.long)
        turns = model._rotation(torch.arange(places)[None], dtype)
        step = TokenStep(model, "triton")
        with noted() as ours, Operations() as theirs:
            step(ids, ids[:, 0], turns, graph_states, kv)
    return ours, theirs.names


def official(*layer_types: str) -> q.ModelConfig:
    """Qwen3-Next-80B-A3B with these layers."""
    return q.presets.qwen3_next_80b_a3b(layer_types=layer_types, num_hidden_layers=len(layer_types))


BOTH = ("linear_attention", "full_attention")


def rows_on_meta(dtype: torch.dtype) -> list[Launch]:
    """Launches of the kernels of rows, forward and backward, at the widths of the official form."""
    rows = layers.triton.rows
    with noted() as found, torch.device("meta"):
        for width, zero_centred, gated in ((2048, True, False), (256, True, False), (128, False, True)):
            x, weight = torch.empty(64, width, dtype=dtype), torch.empty(width, dtype=dtype)
            gate = torch.empty_like(x) if gated else None
            _, rate = rows.rms_norm(x, weight, gate, eps=1e-6, zero_centred=zero_centred)
            rows.rms_norm_backward(x, x, weight, gate, rate, zero_centred=zero_centred)
        y, rate = rows.l2_normalise(x, eps=1e-6, scale=0.5)
        rows.l2_normalise_backward(y, x, rate, scale=0.5)
        rows.swiglu(x, x)
        rows.swiglu_backward(x, x, x)
    return found
