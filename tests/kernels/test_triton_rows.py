"""The kernels of norms, gates and activations, run by Triton's interpreter, against their definitions.

In bf16 both round at the same places, so they give the same bits but for sums next to the middle between two numbers;
gradients of weights are summed in fp32 here and in bf16 there.
"""

import pytest
import torch

pytest.importorskip("triton")

import interpreted  # noqa: F401  # mends bf16

import layers.triton.rows as kernels
from layers.dispatch import backends
from layers.dispatch.registry import case_of, parts_of
from layers.dispatch.self_check import checked
from layers.mlp import activate
from layers.norm import GatedRMSNorm, RMSNorm, l2_normalise

pytestmark = pytest.mark.oracle

CPU = torch.device("cpu")
PARTS = parts_of("elementwise", "triton")


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """The backend can be named on a CPU."""
    free = [
        backends.Implementation(i.name, i.why, passed_over=lambda *_: "named alone") if i.name == "triton" else i
        for i in backends.OPERATIONS["elementwise"]
    ]
    monkeypatch.setitem(backends.OPERATIONS, "elementwise", tuple(free))


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def compare(call, inputs, *, values, gradients):
    """Relative errors in the norm, of values and of each gradient."""
    found = []
    for backend in ("triton", "torch"):
        x = [y.clone().requires_grad_() for y in inputs]
        y = call(backend, *x)
        factor = random(*y.shape, dtype=y.dtype, seed=9)
        found.append([y.detach(), *torch.autograd.grad((y * factor).sum(), x)])
    for n, (a, b) in enumerate(zip(*found, strict=True)):
        assert a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-20)
        assert error <= (gradients if n else values), n


# bf16: values to the bit but for a few; gradients are rounded at up to three places.
BOUNDS = {
    torch.float32: {"values": 1e-6, "gradients": 2e-6},
    torch.bfloat16: {"values": 5e-4, "gradients": 6e-3},
    torch.float16: {"values": 1e-4, "gradients": 1e-3},
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("zero_centred", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 128), (5, 2048), (40, 4, 50)])
def test_rms_norm(shape, zero_centred, dtype):
    def run(backend, x, weight):
        norm = RMSNorm(shape[-1], zero_centred=zero_centred)
        norm.backend = backend
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    weight = random(shape[-1], dtype=dtype, seed=1)
    compare(run, [random(*shape, dtype=dtype), weight], **BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 24), (2, 9, 4, 128), (3, 300)])
def test_gated_rms_norm(shape, weight_dtype, dtype):
    def run(backend, x, gate, weight):
        norm = GatedRMSNorm(shape[-1])
        norm.backend = backend
        return torch.func.functional_call(norm, {"weight": weight}, (x, gate))

    weight = random(shape[-1], dtype=weight_dtype or dtype, seed=1)
    compare(run, [random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=2), weight], **BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 9, 4, 128)])
@pytest.mark.parametrize("scale", [1.0, 128**-0.5])
def test_l2_normalise(shape, scale, dtype):
    compare(
        lambda backend, x: l2_normalise(x, scale=scale, backend=backend), [random(*shape, dtype=dtype)], **BOUNDS[dtype]
    )


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2, 5, 1024)])
def test_swiglu(shape, dtype):
    inputs = [random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)]
    compare(lambda backend, gate, up: activate(gate, up, backend=backend), inputs, **BOUNDS[dtype])


def test_more_tiles_than_programs(monkeypatch):
    """A program then sums several tiles of rows."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    test_rms_norm((40, 4, 50), True, torch.float32)
    monkeypatch.setattr(kernels, "TILE", 64)
    test_gated_rms_norm((2, 9, 4, 128), None, torch.float32)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_case_of_the_self_check(part, dtype, gradients):
    assert case_of(f"elementwise.{part}", "triton")
    assert checked(f"elementwise.{part}", "triton", CPU, dtype, 0, gradients) is None


@pytest.mark.parametrize("part", PARTS)
def test_wrong_gradients_are_caught(monkeypatch, part):
    name = {"gated_rms_norm": "rms_norm"}.get(part, part) + "_backward"
    right = getattr(kernels, name)

    def wrong(*args, **options):
        found = right(*args, **options)
        first = found if isinstance(found, torch.Tensor) else found[0]
        first.mul_(1.3)
        return found

    monkeypatch.setattr(kernels, name, wrong)
    monkeypatch.setattr("layers.dispatch.self_check._results", {})
    assert "is off by" in checked(f"elementwise.{part}", "triton", CPU, torch.float32, 0, True)


def test_what_the_kernels_do_not_cover_runs_in_torch():
    norm, x = RMSNorm(8).double(), torch.randn(2, 8, dtype=torch.float64)
    norm.backend = "triton"
    other = RMSNorm(8).double()
    other.backend = "torch"
    assert torch.equal(norm(x), other(x))
    gate, up = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    assert torch.equal(activate(gate, up, backend="triton"), activate(gate, up, backend="torch"))
