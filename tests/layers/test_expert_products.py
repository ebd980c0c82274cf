"""The kernel for the products of all experts: values and gradients against fp64, for sizes that fit nothing."""

import pytest
import torch

from layers.cpp import build, ops
from layers.kernels.grouped_linear import grouped_linear
from layers.moe import Experts
from layers.quantised.group_weight import GroupWeight, quantise

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="needs the compiled kernels")
# Rows of each expert, and n and k.
SIZES = {
    "round": ((64, 32, 48), 32, 64),
    "odd": ((7, 0, 33, 1), 19, 27),
    "more than a block of rows": ((300, 0, 17), 35, 48),
    "one expert has all": ((0, 50, 0), 16, 31),
    "one number": ((1,), 1, 1),
    "no rows": ((0, 0), 5, 6),
}
BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def inputs(rows, n, k, dtype):
    r = torch.Generator().manual_seed(sum(rows) + n)
    made = [torch.randn(*s, generator=r, dtype=torch.float64) for s in ((sum(rows), k), (len(rows), n, k))]
    grad = torch.randn(sum(rows), n, generator=r, dtype=torch.float64)
    ends = torch.tensor(rows).cumsum(0).int()
    return *(x.to(dtype) for x in made), ends, grad.to(dtype)


def expected(x, weight, ends, grad):
    """In fp64, of the numbers as they were rounded."""
    x, weight, grad = (t.double() for t in (x, weight, grad))
    y, to_x, to_weight = torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(weight)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        y[begin:end] = x[begin:end] @ weight[e].mT
        to_x[begin:end] = grad[begin:end] @ weight[e]
        to_weight[e] = grad[begin:end].mT @ x[begin:end]
        begin = end
    return y, to_x, to_weight


def far(got, wanted):
    """The largest difference, in units of the largest number."""
    scale = wanted.abs().max().item() if wanted.numel() else 1.0
    return (got.double() - wanted).abs().max().item() / max(scale, 1e-30) if wanted.numel() else 0.0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, dtype, threads):
    x, weight, ends, grad = inputs(*SIZES[size], dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = ops.products(x, weight, ends), *ops.products_backward(x, weight, ends, grad, dtype)
        exact = ops.products_backward(x, weight, ends, grad, torch.float32)[1]
    finally:
        torch.set_num_threads(before)
    wanted = expected(x, weight, ends, grad)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert far(a, b) <= BOUND[dtype]
    assert exact.dtype == torch.float32
    assert far(exact, wanted[2]) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_result_does_not_depend_on_the_rows_beside_it(dtype):
    """To the bit, wherever a row lies in its run: no row is read past the end of a run, or summed in another order."""
    x, weight, ends, _ = inputs((37, 50), 24, 40, dtype)
    whole = ops.products(x, weight, ends)
    for row in (0, 36, 37, 60, 86):
        e = int(row >= 37)
        alone = ops.products(x[row : row + 1], weight[e : e + 1], torch.tensor([1], dtype=torch.int32))
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_stays_with_its_expert(dtype):
    """Also where memory that held it is used again for the next expert, with an odd number of rows."""
    x, weight, ends, grad = inputs((20, 7, 9), 16, 48, dtype)
    x[:20], grad[:20] = float("nan"), float("nan")
    results = ops.products(x, weight, ends), *ops.products_backward(x, weight, ends, grad, dtype)
    for found, first in zip(results, (20, 20, 1), strict=True):
        assert found[:first].isnan().all()
        assert not found[first:].isnan().any()
    token = torch.arange(36)
    down = weight.mT.contiguous()
    out = ops.feed_forward(x, token, ends, torch.cat((weight, weight), dim=1), down)
    assert out[:20].isnan().all()
    assert not out[20:].isnan().any()


def test_numbers_that_do_not_lie_side_by_side():
    x, weight, ends, grad = inputs((9, 14), 10, 12, torch.float32)
    odd = x.mT.contiguous().mT, weight.flip(0).flip(0).mT.contiguous().mT, ends
    assert torch.equal(ops.products(*odd), ops.products(x, weight, ends))
    for a, b in zip(
        ops.products_backward(*odd, grad.mT.contiguous().mT, torch.float32),
        ops.products_backward(x, weight, ends, grad, torch.float32),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ends": torch.tensor([3, 2], dtype=torch.int32)}, "ends must rise to 5"),
        ({"ends": torch.tensor([3, 9], dtype=torch.int32)}, "ends must rise to 5"),
        ({"ends": torch.tensor([-1, 5], dtype=torch.int32)}, "ends must rise to 5"),
        ({"ends": torch.tensor([3, 5])}, "ends must be int32"),
        ({"weight": torch.zeros(2, 4, 7)}, "x must be float32 or bfloat16 of shape"),
        ({"weight": torch.zeros(2, 4, 6, dtype=torch.bfloat16)}, "weight must be float32"),
        ({"x": torch.zeros(5, 6, dtype=torch.float64)}, "x must be float32 or bfloat16"),
        ({"weight": torch.zeros(2, 0, 6)}, "weight"),
    ],
)
def test_wrong_arguments(change, words):
    good = {"x": torch.zeros(5, 6), "weight": torch.zeros(2, 4, 6), "ends": torch.tensor([3, 5], dtype=torch.int32)}
    ops.products(**good)
    with pytest.raises(ValueError, match=words):
        ops.products(**(good | change))


def test_experts_in_cpp_are_the_definition():
    """Values and gradients, against fp64; under autocast the weights and their gradients stay fp32."""
    torch.manual_seed(0)
    layer, exact = Experts(24, 10, 5, backend="cpp"), Experts(24, 10, 5, backend="loop").double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    exact.load_state_dict(layer.state_dict())
    x, weights = torch.randn(40, 24), torch.rand(40, 2)
    indices = torch.stack([torch.randperm(5)[:2] for _ in range(40)])
    for bound, autocast in ((1e-5, False), (3e-2, True)):
        results = []
        for made, dtype in ((layer, torch.float32), (exact, torch.float64)):
            a, b = x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and made is layer):
                y = made(a, b, indices)
            results.append((y, *torch.autograd.grad(y.double().square().sum(), (a, b, *made.parameters()))))
        for got, wanted in zip(*results, strict=True):
            assert far(got, wanted) <= bound
        assert all(g.dtype == torch.float32 for g in results[0][1:])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("d, width", [(32, 48), (27, 19), (16, 1)])
@pytest.mark.parametrize("tokens", [1, 40, 400])
def test_the_whole_feed_forward_equals_its_parts(tokens, d, width, dtype, threads):
    """To the bit: with gradients the products run one after another, without as one kernel."""
    r = torch.Generator().manual_seed(tokens)
    layer = Experts(d, width, 3, backend="cpp").to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=r) / p.shape[-1] ** 0.5)
    x = torch.randn(tokens, d, generator=r).to(dtype)
    indices = (torch.rand(tokens, 1, generator=r) < 0.9).long() + torch.tensor([[0, 1]])  # the middle one has most
    weights = torch.rand(tokens, 2, generator=r).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = layer(x, weights, indices)
        with torch.no_grad():
            assert torch.equal(layer(x, weights, indices), parts)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"token": torch.tensor([0, 5, 1])}, "token must hold numbers from 0 to 4"),
        ({"token": torch.tensor([0, -1, 1])}, "token must hold numbers from 0 to 4"),
        ({"ends": torch.tensor([3, 2], dtype=torch.int32)}, "ends must rise to 3"),
        ({"gate_up": torch.zeros(2, 9, 6)}, "gate_up must be float32"),
        ({"down": torch.zeros(2, 6, 4, dtype=torch.bfloat16)}, "down must be float32"),
        ({"down": torch.zeros(6, 4)}, "down"),
    ],
)
def test_wrong_arguments_of_the_whole(change, words):
    good = {"x": torch.zeros(5, 6), "token": torch.tensor([0, 4, 1]), "ends": torch.tensor([1, 3], dtype=torch.int32)}
    good |= {"gate_up": torch.zeros(2, 8, 6), "down": torch.zeros(2, 6, 4)}
    ops.feed_forward(**good)
    with pytest.raises(ValueError, match=words):
        ops.feed_forward(**(good | change))


def test_weights_of_another_dtype_than_their_rows():
    x, weight, ends, grad = inputs((5, 6), 8, 8, torch.float32)
    low = weight.bfloat16().requires_grad_()
    y = grouped_linear(x, low, ends, backend="cpp")
    (got,) = torch.autograd.grad(y, low, grad)
    assert got.dtype == torch.bfloat16
    assert far(got, expected(x, low.detach(), ends, grad)[2]) <= BOUND[torch.bfloat16]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits, group, d, width", [(4, 32, 64, 96), (4, 8, 24, 40), (4, 22, 44, 22), (8, 0, 26, 18)])
def test_weights_in_groups_are_dequantised_to_the_bit(bits, group, d, width, zero, dtype, threads):
    r = torch.Generator().manual_seed(d)
    rows, experts, tokens = (130, 0, 1, 16), 4, 40
    token = torch.randint(0, tokens, (sum(rows),), generator=r)
    x, ends = torch.randn(tokens, d, generator=r).to(dtype), torch.tensor(rows).cumsum(0).int()
    weights = [
        quantise(torch.randn(experts, *shape, generator=r) / shape[1] ** 0.5, bits, group)
        for shape in ((2 * width, d), (d, width))
    ]
    if zero:
        weights = [
            GroupWeight(w.codes, w.scale, torch.randint(-9, 9, w.scale.shape, generator=r).to(torch.int8))
            for w in weights
        ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = ops.feed_forward_in_groups(x, token, ends, *weights[0].tensors, *weights[1].tensors)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, ops.feed_forward(x, token, ends, *(w.dequantise().to(dtype) for w in weights)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gate_up": torch.zeros(2, 8, 6)}, "gate_up: codes must be int8 or uint8"),
        ({"gate_up": torch.zeros(2, 6, 6, dtype=torch.int8)}, "gate_up: scale must be"),
        ({"down_scale": torch.ones(2, 6, 3)}, "4 columns do not consist of 3 groups"),
        ({"down": torch.zeros(6, 4, dtype=torch.int8)}, "codes and scale must be"),
        ({"down": torch.zeros(2, 6, 4, dtype=torch.uint8)}, "gate_up must be"),
        ({"x": torch.zeros(5, 7)}, "x must be"),
        ({"down_zero": torch.zeros(2, 6, 1)}, "down: zero must be int8"),
    ],
)
def test_wrong_weights_in_groups(change, words):
    good = {"x": torch.zeros(5, 6), "token": torch.tensor([0, 4, 1]), "ends": torch.tensor([1, 3], dtype=torch.int32)}
    for name, shape in (("gate_up", (2, 8, 6)), ("down", (2, 6, 4))):
        good |= {name: torch.zeros(shape, dtype=torch.int8), f"{name}_scale": torch.ones(*shape[:2], 1)}
        good |= {f"{name}_zero": None}
    ops.feed_forward_in_groups(*good.values())
    with pytest.raises(ValueError, match=words):
        ops.feed_forward_in_groups(*(good | change).values())
