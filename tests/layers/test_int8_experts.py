"""Int8 experts against experts in memory with the dequantised weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from layers.experts.int8 import PACKED_ROWS, Int8Experts, dequantise, int8_linear, quantise_rows
from layers.moe import Experts

pytestmark = pytest.mark.oracle

WIDTH, INNER, COUNT, K = 64, 32, 6, 2


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(dtype=torch.float32, width=WIDTH, inner=INNER):
    """Int8 experts, and experts in memory with the dequantised weights."""
    int8, whole = Int8Experts(width, inner, COUNT), Experts(width, inner, COUNT, backend="loop")
    with torch.no_grad():
        for e in range(COUNT):
            for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
                shape = (width, inner) if name == "down_proj" else (inner, width)
                int8.fill(name, e, normal(*shape, seed=3 * e + i) * 0.2)
            whole.gate_up_proj[e] = dequantise(int8.gate_up_proj[e], int8.gate_up_scale[e])
            whole.down_proj[e] = dequantise(int8.down_proj[e], int8.down_scale[e])
    return int8, whole.to(dtype)


def test_quantised_rows_are_within_half_a_step():
    weight = normal(5, 40) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-43])[:, None]
    q, scale = quantise_rows(weight)
    assert q.abs().amax(1).tolist()[:4] == [127, 127, 127, 0]
    # Half a step, plus the rounding of weight / scale: 127 · 2⁻²⁴ of a step.
    assert ((dequantise(q, scale) - weight).abs()[:4] <= scale[:4, None] * (0.5 + 1e-5)).all()
    again, same = quantise_rows(dequantise(q, scale))
    assert torch.equal(again[:4], q[:4])
    torch.testing.assert_close(same[:4][:3], scale[:3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = normal(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantise_rows(weight)


def test_error_is_that_of_the_weights():
    weights = [normal(INNER, WIDTH, seed=s) * 10.0**s for s in range(2)]
    experts = Int8Experts(WIDTH, INNER, COUNT)
    assert experts.error == {}
    experts.fill("up_proj", 0, weights[1])  # replaced, so these weights must have no effect
    for e, weight in enumerate(weights):
        experts.fill("up_proj", e, weight)
    wrong = [dequantise(*quantise_rows(w)) - w for w in weights]
    expected = torch.stack(wrong).norm() / torch.stack(weights).norm()
    assert experts.error == {"up_proj": pytest.approx(expected.item(), rel=1e-5)}
    assert 0.001 < experts.error["up_proj"] < 0.02


# fp32: only the order of sums differs. bf16: one more rounding than in the definition, so that the difference is that
# of two bf16 products of the same matrices.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n", [1, 2, PACKED_ROWS, PACKED_ROWS + 1, 60])
@pytest.mark.parametrize("cols", [24, 64])  # the int8 kernel supports only the second
def test_linear_equals_the_dequantised_product(dtype, tolerance, n, cols):
    q, scale = quantise_rows(normal(20, cols))
    x, grad = normal(n, cols, seed=1, dtype=dtype).requires_grad_(), normal(n, 20, seed=2, dtype=dtype)
    y = int8_linear(x, q, scale)
    y.backward(grad)
    assert y.dtype == dtype
    weight = dequantise(q, scale).double()
    for ours, exact in ((y, x.detach().double() @ weight.T), (x.grad, grad.double() @ weight)):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("sizes", [(WIDTH, INNER), (20, 12)])
def test_experts_equal_dequantised_experts(dtype, n, sizes):
    int8, whole = pair(dtype, *sizes)
    weights, indices = normal(n, K, seed=1).softmax(-1).to(dtype), normal(n, COUNT, seed=2).topk(K).indices
    results = []
    for experts in (int8, whole):
        x = normal(n, sizes[0], dtype=dtype).requires_grad_()
        w = weights.clone().requires_grad_()
        y = experts(x, w, indices)
        y.backward(normal(n, sizes[0], seed=4, dtype=dtype))
        with torch.no_grad():
            alone = experts(x, w, indices)
        results.append((y, alone, x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()


def test_autocast_multiplies_in_its_dtype():
    q, scale = quantise_rows(normal(20, 64))
    x = normal(3, 64).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = int8_linear(x, q, scale)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), F.linear(x, dequantise(q, scale)), rtol=0.02, atol=0.2)


def test_scales_keep_fp32_when_the_model_is_cast_and_all_is_saved():
    int8, _ = pair()
    cast = copy.deepcopy(int8).bfloat16()
    for name, buffer in cast.state_dict().items():
        assert torch.equal(buffer, int8.state_dict()[name])
        assert buffer.dtype == (torch.float32 if "scale" in name else torch.int8)
    fresh = Int8Experts(WIDTH, INNER, COUNT)
    fresh.load_state_dict(cast.state_dict())
    assert torch.equal(fresh.down_scale, int8.down_scale)
    assert not list(int8.parameters())
    assert "6 x (64 -> 32 -> 64), int8" in repr(int8)
    with torch.device("meta"):
        assert Int8Experts(WIDTH, INNER, COUNT).to_empty(device="cpu").down_scale.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    experts = Int8Experts(WIDTH, INNER, COUNT)
    with pytest.raises(ValueError, match="choose 'gate_proj'"):
        experts.fill("gate_up_proj", 0, normal(2 * INNER, WIDTH))
    with pytest.raises(ValueError, match=r"\[64, 32\] here"):
        experts.fill("down_proj", 0, normal(INNER, WIDTH))


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_beyond_float16(autocast):
    """A sum of int8 weights times x may exceed 65504 although the scaled sum is small."""
    weight, x = torch.full((2, 2048), 1e-3), torch.full((3, 2048), 2.0)
    q, scale = quantise_rows(weight)
    x = x.requires_grad_() if autocast else x.half().requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = int8_linear(x, q, scale)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), torch.full((3, 2), 4.096), rtol=1e-3, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad.float(), torch.full((3, 2048), 2e-3), rtol=2e-3, atol=0)
