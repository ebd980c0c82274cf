"""Linear maps through oneDNN, and bf16 ones made in fp32, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

import layers.kernels.linear as linear_kernels
from layers.cross_entropy import linear_cross_entropy
from layers.dispatch import backends, speeds
from layers.linear import Linear, linear

pytestmark = pytest.mark.oracle


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(multiply, x, weight, bias, out):
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = multiply(*inputs)
    grads = torch.autograd.grad((y * out).sum(), inputs, create_graph=True)
    # Second derivatives, in the direction of the gradients.
    twice = torch.autograd.grad(sum(g.square().sum() for g in grads[:2]), inputs[:2])
    return [y, *grads, *twice]


@pytest.mark.parametrize("shape", [(1, 64), (2, 40), (5, 16), (65, 1), (3, 1)])  # oneDNN runs from 16 rows on
@pytest.mark.parametrize(("k", "n"), [(48, 80), (7, 3), (64, 1)])
def test_values_and_gradients_equal_torchs(shape, k, n):
    """fp32 sums of k terms of order 1, against float64: 1e-6 of their size."""
    x, weight, bias, out = normal(*shape, k), normal(n, k, seed=1), normal(n, seed=2), normal(*shape, n, seed=3)
    got = run(lambda *a: linear(*a, backend="onednn"), x, weight, bias, out)
    wanted = run(F.linear, *(t.double() for t in (x, weight, bias, out)))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias, backend="onednn"), got[0])


def test_rows_do_not_depend_on_those_beside_them():
    """A prompt in blocks is bit-equal to the whole prompt."""
    x, weight = normal(300, 96), normal(80, 96, seed=1)
    whole = linear(x, weight, backend="onednn")
    for size in (64, 100):
        assert torch.equal(torch.cat([linear(part, weight, backend="onednn") for part in x.split(size)]), whole)


def test_any_order_of_rows_and_columns():
    x, weight = normal(96, 40).T, normal(96, 24, seed=1).T
    torch.testing.assert_close(linear(x, weight, backend="onednn"), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_mixed_precision_stays_mixed():
    layer, x = Linear(32, 16), normal(20, 32)
    layer.backend = "onednn"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.bfloat16


def test_who_multiplies():
    assert backends.why_not("linear", "onednn", torch.device("cpu"), torch.float32) is None
    with speeds.using():  # nobody has measured it
        assert backends.choose("linear", "auto", torch.zeros(1)) == "torch"
        assert backends.choose("linear", "onednn", torch.zeros(1)) == "onednn"  # it runs if named
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match="float32 on a CPU, not"):
            linear(normal(20, 4, dtype=dtype), normal(3, 4, dtype=dtype), backend="onednn")
    with pytest.raises(ValueError, match="no backend 'mkl'"):
        linear(normal(20, 4), normal(3, 4), backend="mkl")


BF16 = torch.bfloat16
# Figures that make "auto" take it, whatever the machine.
WIDENED = speeds.Figures(
    "a test", {("linear", "bfloat16", g): {"widened": {64: 4.0}, "torch": {64: 1.0}} for g in (False, True)}
)


@pytest.mark.parametrize("tile", [2**22, 200])
@pytest.mark.parametrize("shape", [(1, 64), (5, 16), (65, 1), (0, 3)])
@pytest.mark.parametrize(("k", "n"), [(48, 80), (7, 3), (64, 1)])
def test_widened_is_rounded_once(monkeypatch, shape, k, n, tile):
    """Values and gradients are those of fp64, rounded to bf16: half a unit of the last place, 2^-8."""
    monkeypatch.setattr(linear_kernels, "TILE", tile)
    x, weight, out = (normal(*s, seed=i, dtype=BF16) for i, s in enumerate([(*shape, k), (n, k), (*shape, n)]))
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    y = linear(*inputs, backend="widened")
    got = [y, *torch.autograd.grad((y * out).sum(), inputs)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    wanted = F.linear(*exact)
    for a, b in zip(got, [wanted, *torch.autograd.grad((wanted * out.double()).sum(), exact)], strict=True):
        assert a.dtype == BF16
        torch.testing.assert_close(a.double(), b, rtol=1.001 * 2**-8, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, backend="widened"), got[0])
        bias = normal(n, seed=5, dtype=BF16)
        assert torch.equal(linear(x, weight, bias, backend="widened"), got[0] + bias)


def test_widened_under_autocast():
    """On "auto" too, for weights in fp32, whose gradients are not rounded to bf16."""
    x, weight = normal(20, 32), normal(16, 32, seed=1).requires_grad_()
    low = [t.detach().to(BF16).double() for t in (x, weight)]
    with speeds.using(WIDENED), torch.autocast("cpu", BF16):
        y = linear(x, weight)
        (grad,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(y.double(), F.linear(*low), rtol=1.001 * 2**-8, atol=1e-5)
    assert y.dtype == BF16
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), low[0].sum(0).expand(16, 32), rtol=1e-6, atol=1e-6)


def test_auto_widens_where_figures_say_so(monkeypatch):
    calls = []
    real = linear_kernels._wide
    monkeypatch.setattr(linear_kernels, "_wide", lambda a, b, dtype: calls.append(len(a)) or real(a, b, dtype))
    x, weight, target = normal(32, 24, dtype=BF16), normal(40, 24, seed=1, dtype=BF16), torch.arange(32)
    with speeds.using():
        linear(x, weight)
        assert not calls
    with speeds.using(WIDENED):
        linear(x, weight)
        linear(x[:15], weight)  # few rows are torch's
        assert calls == [32]
        hidden, head = x.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_cross_entropy(hidden, head, target).backward()
        assert calls == [32, 32, 32, 40]  # logits, and both gradients
        del calls[:]
        with torch.autocast("cpu", BF16):
            linear_cross_entropy(hidden.float().detach().requires_grad_(), head.float().detach(), target).backward()
        assert calls
        linear(x.float(), weight.float())
        linear(x.double(), weight.double())
    with pytest.raises(RuntimeError, match="bfloat16 on a CPU, not"):
        linear(x.float(), weight.float(), backend="widened")
