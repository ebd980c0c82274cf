"""flash-linear-attention's kernels, run by Triton's interpreter on the CPU, against our definitions.

`make test-kernels` runs this in a separate environment, because triton is large, and transformers uses FLA's kernels
wherever they are installed, with or without a GPU.
"""

import builtins
import sys

import pytest
import torch

triton_tuner = pytest.importorskip("triton.runtime.autotuner")

from triton.language.standard import sum as one_of_triton_s
from triton.runtime.jit import JITFunction

# Triton decides at its import whether its functions (sum, cumsum, cdiv) are interpreted, and tests/conftest.py imports
# it through torch's compiler before this file can set the variable.
if isinstance(one_of_triton_s, JITFunction):
    raise RuntimeError(
        "Triton was imported without its interpreter: run `make test-kernels`, which sets TRITON_INTERPRET."
    )


def _first_config(self, *args, **kwargs):
    """Use the first configuration, without compiler options, because there is no driver to time configurations."""
    compiler = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
    chosen = {name: value for name, value in self.configs[0].all_kwargs().items() if name not in compiler}
    return self.fn.run(*args, **kwargs, **chosen)


triton_tuner.Autotuner.run = _first_config

import fla.modules.convolution
import fla.modules.fused_norm_gate
import fla.ops.gated_delta_rule  # noqa: F401

import layers.dispatch.backends as backends
from layers.causal_conv import causal_conv
from layers.cross_entropy import linear_cross_entropy
from layers.delta_rule import gated_delta_rule
from layers.dispatch.self_check import checked
from layers.norm import GatedRMSNorm, l2_normalise
from layers.segments import Segments

pytestmark = pytest.mark.oracle


class _Int(int):
    def to(self, *_args, **_options):
        return self


def _range(*bounds):
    """In compiled kernels loop counters are tensors with a `.to`; in the interpreter they are plain ints."""
    numbers = (int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)
    return [_Int(i) for i in builtins.range(*numbers)]


for name, module in list(sys.modules.items()):
    if name.startswith("fla.") and module is not None:
        module.__dict__["range"] = _range


@pytest.fixture(autouse=True)
def fla_anywhere(monkeypatch):
    """Allow the backend without CUDA."""
    for operation in ("delta_rule", "causal_conv", "elementwise", "cross_entropy"):
        fla, *others = backends.OPERATIONS[operation]
        monkeypatch.setitem(backends.OPERATIONS, operation, (backends.Implementation(fla.name, fla.why), *others))


PACKED = Segments.from_document_ids(
    torch.tensor([[-1] * 3 + [0] * 50 + [1] * 47, [0] * 5 + [1] * 5 + [2] * 75 + [-1] * 15])
)


def inputs(t, state):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    x = {
        "q": l2_normalise(normal(2, t, 2, 32)) * 32**-0.5,
        "k": l2_normalise(normal(2, t, 2, 32)),
        "v": normal(2, t, 4, 32),
        "log_decay": -normal(2, t, 4).exp(),
        "beta": normal(2, t, 4).sigmoid(),
    }
    return x | ({"state": normal(2, 4, 32, 32)} if state else {})


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("segments", [None, PACKED], ids=["plain", "packed"])
def test_chunked_kernel_values_and_gradients(segments, state):
    """Error relative to the largest entry: fp32, with sums in another order."""
    results = []
    for backend in ("fla", "recurrent"):
        x = {name: value.requires_grad_() for name, value in inputs(100, state).items()}
        o, final = gated_delta_rule(**x, segments=segments, backend=backend)
        if segments is not None:
            o = o * segments.mask[..., None, None]
        (o.square().sum() + final.square().sum()).backward()
        results.append((o, final, *(value.grad for value in x.values())))
    for kernel, definition in zip(*results, strict=True):
        assert (kernel - definition).abs().max() <= 2e-5 * definition.abs().max()


def test_fused_kernel_of_one_token():
    with torch.no_grad():
        kernel = gated_delta_rule(**inputs(1, True), backend="fla")
        definition = gated_delta_rule(**inputs(1, True), backend="recurrent")
    for a, b in zip(kernel, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [1, 2, 20])
def test_convolution_kernel(t):
    g = torch.Generator().manual_seed(0)
    x, weight, state = (torch.randn(*shape, generator=g) for shape in ((2, t, 32), (32, 4), (2, 3, 32)))
    kernel = causal_conv(x, weight, state=state, backend="fla")
    definition = causal_conv(x, weight, state=state, backend="torch")
    for a, b in zip(kernel, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_convolution_kernel_on_packed_rows():
    """Values and gradients; boundaries inside and at the end of rows, and a sequence shorter than the filter."""
    ids = torch.tensor([[0] * 40 + [1] * 2 + [2] * 28, [3] * 70, [4] * 65 + [-1] * 5])
    segments, g, found = Segments.from_document_ids(ids), torch.Generator().manual_seed(0), []
    inputs = [torch.randn(*shape, generator=g) for shape in ((3, 70, 32), (32, 4), (3, 3, 32))]
    for backend in ("fla", "torch"):
        x, weight, state = (y.clone().requires_grad_() for y in inputs)
        y, after = causal_conv(x, weight, state=state, segments=segments, backend=backend)
        segments.real(y).square().sum().backward()
        found.append((segments.real(y), after, x.grad, weight.grad, state.grad))
    for kernel, definition in zip(*found, strict=True):
        torch.testing.assert_close(kernel, definition, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 65])
def test_gated_norm_kernel(rows):
    """Error relative to the largest entry: fp32, with sums in another order."""
    g = torch.Generator().manual_seed(0)
    norm, found = GatedRMSNorm(32), []
    x, gate = (torch.randn(2, rows, 4, 32, generator=g).requires_grad_() for _ in "xg")
    with torch.no_grad():
        norm.weight.add_(torch.randn(32, generator=g) * 0.1)
    for backend in ("fla", "torch"):
        norm.backend = backend
        y = norm(x, gate)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, gate, norm.weight))))
    for kernel, definition in zip(*found, strict=True):
        assert (kernel - definition).abs().max() <= 2e-6 * definition.abs().max()


def test_gated_norm_kernel_rounds_once_in_bf16():
    """More accurate than the definition, which rounds three times, and one or two ulp, 2^-8 to 2^-7, away from it.

    The interpreter truncates where a GPU rounds, so the kernel runs in fp32 on bf16 numbers and torch rounds.
    """
    g = torch.Generator().manual_seed(0)
    x, gate, weight = (torch.randn(*shape, generator=g).bfloat16() for shape in ((200, 32), (200, 32), (32,)))
    found = []
    for backend, dtype in (("fla", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64)):
        norm = GatedRMSNorm(32).to(dtype)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.backend = backend
            found.append(norm(x.to(dtype), gate.to(dtype)))
    kernel, definition, truth = found[0].bfloat16().double(), found[1].double(), found[2]
    errors = [(y - truth).square().mean().sqrt() / truth.square().mean().sqrt() for y in (kernel, definition)]
    apart = ((kernel - definition).abs() / definition.abs().clamp(min=1e-9)).max()
    print(f"relative rms error {errors[0]:.1e} (kernel), {errors[1]:.1e} (definition); apart at most {apart:.1e}")
    assert errors[0] < errors[1]
    assert apart <= 3 * 2**-8


def test_fused_linear_cross_entropy_kernel():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).requires_grad_() for s in ((37, 32), (65, 32)))
    target, found = torch.randint(65, (37,), generator=g), []
    for backend in ("fla", "torch"):
        loss = linear_cross_entropy(hidden, weight, target, backend=backend)
        found.append((loss, *torch.autograd.grad(0.5 * loss, (hidden, weight))))
    for kernel, definition in zip(*found, strict=True):
        assert (kernel - definition).abs().max() <= 1e-5 * definition.abs().max()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("operation", ["delta_rule", "causal_conv"])
def test_the_self_check_passes_right_kernels(operation, gradients):
    assert checked(operation, "fla", torch.device("cpu"), torch.float32, 64, gradients) is None
