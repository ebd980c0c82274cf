"""The expert implementation for CUDA: the values of the definition, and no synchronisation with the device.

Tensors on "meta", which have no values, replace those of a GPU: reading one on the host raises an error (`.item()`,
`.tolist()`, a shape that depends on data).
"""

from contextlib import nullcontext

import pytest
import torch

import layers.kernels.experts as kernels
import layers.moe as moe
from layers.experts.int8 import Int8Experts
from layers.moe import Experts, SparseMoE

pytestmark = pytest.mark.oracle


def made(dtype, width=32, intermediate_size=16):
    torch.manual_seed(0)
    experts = Experts(width, intermediate_size, 8)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return experts.to(dtype)


def routed(n, k=3, width=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    logits = torch.randn(n, 8, generator=g)
    weights, indices = logits.softmax(-1).topk(k)
    return torch.randn(n, width, generator=g).to(dtype), weights.to(dtype), indices


@pytest.mark.parametrize("n", [1, 2, 21])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2**-6), (torch.float64, 1e-14)])
def test_a_few_gathered_equal_the_definition(n, dtype, bound):
    """bf16: two roundings of products to 2^-8, for entries of order 1."""
    experts, x = made(dtype), routed(n, dtype=dtype)
    with torch.no_grad():
        expected = moe.in_turn(*x, *experts.parameters())
        assert (kernels.gathered(*x, *experts.parameters()) - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("n", [1, 5, 70])
def test_grouped_counts_without_the_host(n):
    experts, x = made(torch.float32), routed(n)
    with torch.no_grad():
        y, expected = (sum_of(*x, *experts.parameters()) for sum_of in (kernels.grouped, moe.in_turn))
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "n, gpu, dtype",
    [*((n, gpu, torch.bfloat16) for n in (1, 4, 500) for gpu in (8, 9)), (1, 9, torch.float32), (4, 9, torch.float32)],
)
def test_nothing_waits_for_the_device(monkeypatch, n, gpu, dtype):
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())  # the meta device has no autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_args: False)
    monkeypatch.setattr(kernels, "generation", lambda _device: gpu)
    with torch.device("meta"), torch.no_grad():
        layer = SparseMoE(32, experts=8, top_k=3, intermediate_size=16, shared_intermediate_size=16).to(dtype)
        serves = kernels.grouped_serves(torch.empty(1, dtype=dtype), layer.experts.down_proj)
        assert serves == (gpu == 9 and dtype == torch.bfloat16)
        y, stats = layer(torch.empty(1, n, 32, dtype=dtype))
        assert y.shape == (1, n, 32)
        assert stats is not None


@pytest.mark.parametrize("n", [1, 4, 500])
def test_int8_experts_do_not_wait_either(monkeypatch, n):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_args: False)  # the meta device has no autocast
    monkeypatch.setattr(kernels, "generation", lambda _device: 9)
    with torch.device("meta"), torch.no_grad():
        experts, x = Int8Experts(32, 16, 8), torch.empty(n, 32, dtype=torch.bfloat16)
        weights, indices = torch.empty(n, 3), torch.zeros(n, 3, dtype=torch.long)
        assert experts(x, weights, indices).shape == x.shape


@pytest.mark.parametrize("n", [1, 2, 21])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("way", ["_gathered", "_grouped"])
def test_int8_experts_on_a_device_equal_the_loop(way, n, dtype, bound):
    """Roundings of products and sums, for entries of order 1."""
    experts, (x, weights, indices) = Int8Experts(32, 16, 8), routed(n, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    for e in range(8):
        for name, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16))):
            experts.fill(name, e, 0.2 * torch.randn(*shape, generator=g))
    with torch.no_grad():
        expected = moe.loop(x, weights, indices, experts._expert)
        found = getattr(experts, way)(x, weights, indices)
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_tensors_without_values_do_notice():
    """The loop over experts and the single-token path of the CPU read indices on the host."""
    with torch.device("meta"), torch.no_grad():
        experts, x = Experts(32, 16, 8), torch.empty(1, 32)
        weights, indices = torch.empty(1, 3), torch.zeros(1, 3, dtype=torch.long)
        for path in (moe.in_turn, kernels.single):
            with pytest.raises((RuntimeError, NotImplementedError)):
                path(x, weights, indices, *experts.parameters())
