"""Weights in groups: the definition by single numbers, compiled code against it, gradients, the modules around it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from layers.cpp import build
from layers.cpp.group_ops import dequantise_groups, group_linear, knows_groups
from layers.moe import Experts
from layers.quantised.experts import QuantisedExperts
from layers.quantised.group_weight import GroupWeight, pack, quantise, unpack
from layers.quantised.linear import QuantisedLinear
from layers.quantised.products import FEW, TILE, multiply

pytestmark = pytest.mark.oracle
compiled = pytest.mark.skipif(build.missing() is not None, reason="needs the compiled kernels")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(out, columns, bits, group, *, scale=torch.bfloat16, zero=False, seed=0):
    made = quantise(normal(out, columns, seed=seed), bits, group, scale_dtype=scale)
    points = torch.randint(-9, 17, made.scale.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return GroupWeight(made.codes, made.scale, points if zero else None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_the_definition_number_by_number(bits, zero):
    w = weight(3, 12, bits, 4, zero=zero)
    assert (w.bits, w.shape, w.group_size) == (bits, (3, 12), 4)
    found = w.dequantise()
    for o in range(3):
        for i in range(12):
            code = int(w.codes[o, i]) if bits == 8 else (int(w.codes[o, i // 2]) >> 4 * (i % 2)) & 15
            point = int(w.zero[o, i // 4]) if zero else 8 if bits == 4 else 0
            assert found[o, i] == (code - point) * w.scale[o, i // 4].float()
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)
    assert w.nbytes == sum(x.numel() * x.itemsize for x in (w.codes, w.scale, w.zero) if x is not None)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_rounding_is_to_the_nearest_code(bits, most):
    x = normal(5, 64) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-30])[:, None]
    w = quantise(x, bits, 32, scale_dtype=torch.float32)
    codes = w.codes.int() if bits == 8 else unpack(w.codes).int() - 8
    assert codes.abs().max() <= most
    step = w.scale.repeat_interleave(32, 1)
    inside = x.abs() <= most * step
    assert ((w.dequantise() - x).abs()[inside] <= step[inside] * 0.5001).all()
    assert inside.float().mean() > 0.9
    assert (w.dequantise()[3] == 0).all()
    full = x.abs().view(5, 2, 32).amax(-1) / most  # the scale that reaches the largest weight
    plain = (x.view(5, 2, 32) / full.clamp(min=1e-38)[..., None]).round() * full[..., None]
    assert (w.dequantise() - x).norm() <= (plain.flatten(1) - x).norm() * (1 + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_rounded_is_refused(bad):
    x = normal(3, 32)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantise(x, 4)
    with pytest.raises(ValueError, match="do not consist of groups of 32"):
        quantise(normal(3, 48), 4)


SHAPES = [(512, 32), (512, 128), (512, 512), (96, 32), (40, 8), (12, 12), (1024, 256), (130, 130), (64, 16)]


@compiled
@pytest.mark.parametrize(("columns", "group"), SHAPES)  # around the blocks of 128, 64 and 32 codes
@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_code_equals_the_definition(columns, group, bits):
    """Dequantised values to the bit; products to the rounding of their sums, and a row's to the bit in any company."""
    for scale, zero in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        w = weight(37, columns, bits, group, scale=scale, zero=zero)
        exact = w.dequantise()
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):  # of bf16, the output's rounding
            assert torch.equal(dequantise_groups(w.codes, w.scale, w.zero, dtype), exact.to(dtype))
            x = normal(9, columns, seed=1).to(dtype)
            y = group_linear(x, w.codes, w.scale, w.zero)
            truth = x.double() @ exact.double().T
            assert (y.double() - truth).norm() <= tolerance * truth.norm()
            for n in (1, 2, 3, 8):
                assert torch.equal(group_linear(x[:n], w.codes, w.scale, w.zero), y[:n])


@compiled
def test_fp16_scales_of_every_size():
    values = torch.tensor([6e-8, 6.1e-5, 1.0, 65504.0, -3e-6, 0.0], dtype=torch.float16)
    w = GroupWeight(torch.full((6, 8), 3, dtype=torch.int8), values[:, None])
    assert torch.equal(dequantise_groups(*w.tensors, torch.float32), w.dequantise())


@compiled
def test_wrong_operands_are_refused():
    w, x = weight(4, 64, 4, 32), normal(2, 64)
    for change in (
        {"x": x[:, :63]}, {"x": x.double()}, {"codes": w.codes[:, :-1]}, {"scale": w.scale[:3]},
        {"scale": w.scale.double()}, {"codes": w.codes.int()}, {"zero": w.scale.float()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="group_linear"):
            group_linear(**({"x": x, "codes": w.codes, "scale": w.scale, "zero": None} | change))
    assert not knows_groups(48, 24)
    odd = weight(4, 48, 4, 24)
    with pytest.raises(ValueError, match="no power of two"):
        group_linear(normal(2, 48), odd.codes, odd.scale, None)
    assert torch.allclose(multiply(normal(2, 48), odd), normal(2, 48) @ odd.dequantise().T, atol=1e-5)


@pytest.mark.parametrize("n", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_reach_x_through_the_dequantised_weight(n, dtype, tolerance):
    m = QuantisedLinear(weight(20, 64, 4, 32), normal(20, seed=5))
    x, grad = normal(1, n, 64, seed=1, dtype=dtype).requires_grad_(), normal(1, n, 20, seed=2, dtype=dtype)
    y = m(x)
    y.backward(grad)
    exact = m.in_groups.dequantise().double()
    truth = x.detach().double() @ exact.T + m.bias.detach().double()
    for ours, theirs in ((y, truth), (x.grad, grad.double() @ exact)):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    assert all(not buffer.requires_grad for buffer in m.buffers())
    m.backend = "torch"
    expected = F.linear(x.detach(), exact.to(dtype)) + m.bias.to(dtype)
    assert torch.equal(m(x.detach()), expected)


def test_a_weight_that_is_larger_than_a_tile(monkeypatch):
    w, x = weight(50, 64, 8, 0), normal(30, 64)
    whole = multiply(x, w)
    monkeypatch.setattr("layers.quantised.products.TILE", 64 * 7)
    torch.testing.assert_close(multiply(x, w), whole, rtol=1e-5, atol=1e-5)
    assert TILE > 64 * 50


def test_scales_stay_exact_where_the_model_is_cast():
    m = QuantisedLinear(weight(20, 64, 8, 0, scale=torch.float32))
    before = m.in_groups.dequantise()
    assert torch.equal(m.bfloat16().half().double().in_groups.dequantise(), before)
    assert torch.equal(copy.deepcopy(m).in_groups.dequantise(), before)


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_experts_equal_dequantised_experts(n, dtype, tolerance):
    e, width, inner, k = 6, 64, 32, 2
    ours = QuantisedExperts(quantise(normal(e, 2 * inner, width) * 0.2, 4), quantise(normal(e, width, inner) * 0.2, 8))
    whole = Experts(width, inner, e, backend="loop")
    with torch.no_grad():
        whole.gate_up_proj.copy_(ours.gate_up.dequantise())
        whole.down_proj.copy_(ours.down.dequantise())
    whole = whole.double()
    x, weights = normal(n, width, seed=3, dtype=dtype), normal(n, k, seed=4).softmax(-1).to(dtype)
    indices = torch.stack([torch.randperm(e, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    truth = whole(x.double(), weights.double(), indices)
    with torch.no_grad():
        assert (ours(x, weights, indices).double() - truth).norm() <= tolerance * truth.norm()
    x.requires_grad_()
    y = ours(x, weights, indices)
    y.sum().backward()
    assert (y.double() - truth).norm() <= tolerance * truth.norm()
    other = x.detach().double().requires_grad_()
    whole(other, weights.double(), indices).sum().backward()
    assert (x.grad.double() - other.grad).norm() <= tolerance * other.grad.norm()
