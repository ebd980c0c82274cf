"""On CUDA the host waits for the device as often in a deep model as in a shallow one, in training and in prefill.

The kernels of CUDA are replaced by the definitions, and what would make the host wait is counted on the CPU: a value
that is read, a shape that depends on values, a tensor made from a list. Experts: tests/layers/test_moe_cuda.py.
"""

import sys
from collections import Counter

import pytest
import torch
from conftest import small_model
from test_backends import fake_fla  # noqa: F401  a fixture
from test_fused_attention import anywhere, flash  # noqa: F401  fixtures
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from layers.segments import Segments

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.lift_fresh}


class Waits(TorchDispatchMode):
    """Counts operations for which the host would wait, by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.overloadpacket
        by_mask = name in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in WAITS or by_mask:
            self.seen[str(name)] += 1
        return function(*args, **(kwargs or {}))


def waits(layers, rows, use):
    model = small_model(num_hidden_layers=layers, num_experts=0, mtp_num_hidden_layers=1)
    model.set_backend("delta_rule", "fla")
    model.set_backend("attention", "flash")
    model.set_backend("elementwise", "torch")
    counted = Waits()
    with counted:
        use(model, rows())
    return counted.seen


def train(model, segments):
    ids = torch.zeros(segments.batch, segments.length, dtype=torch.long)
    model.loss(ids, segments=segments).total.backward()


def prefill(model, segments):
    with torch.no_grad():
        ids = torch.zeros(segments.batch, segments.length, dtype=torch.long)
        model(ids, segments=segments, cache=model.new_cache(segments.batch, max_len=60))


ROWS = {
    "whole": lambda: Segments.full(torch.zeros(2, 24)),
    "packed": lambda: Segments.from_lengths([[3, 21], [9, 9, 6]]),
    "padded": lambda: Segments.from_lengths([[24], [9]]),
}


@pytest.mark.parametrize("flash", ["flash_attn"], indirect=True)
@pytest.mark.parametrize("use, rows", [*((train, name) for name in ROWS), (prefill, "whole"), (prefill, "padded")])
def test_no_layer_waits(fake_fla, flash, rows, use, monkeypatch):  # noqa: F811
    kernel = sys.modules["flash_attn"].flash_attn_varlen_func

    def uncounted(*args, **options):  # the stand-in reads the boundaries
        with _disable_current_modes():
            return kernel(*args, **options)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", uncounted)
    shallow, deep = (waits(n, ROWS[rows], use) for n in (4, 8))
    assert deep == shallow


def test_a_wait_is_noticed():
    counted = Waits()
    x = torch.ones(3)
    with counted:
        assert bool(x.sum() > 0)
        x[x > 0].sum()
        torch.tensor([1, 2])
    assert sum(counted.seen.values()) == 3
