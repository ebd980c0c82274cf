"""One graph for torch.compile and torch.export, in fp32 and bf16, with and without masks, equal to eager execution.

Each case runs this file in a separate process, because torch cannot trace the shape checks that conftest.py puts around
every function.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import layers.kernels.chunked_recompute as piecewise_delta_rule
import qwen3next as q
from layers.segments import Segments

LENGTHS = (2, 17, 63, 64, 65, 300)
IDS = torch.arange(600).view(2, 300) * 31 % 251
# Padding at the left and in the middle, and at the right beyond 200 tokens.
MASK = torch.ones(2, 300, dtype=torch.bool)
MASK[0, 0] = MASK[1, 5:9] = MASK[1, 200:] = False
PACKED = Segments.from_lengths([[30, 40], [50, 15]])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model(dtype: str, **changes: object) -> q.Qwen3Next:
    torch.manual_seed(0)
    return q.Qwen3Next(q.presets.tiny(initializer_range=0.1, **changes)).to(DTYPES[dtype]).eval()


class Logits(nn.Module):
    def __init__(self, inner: q.Qwen3Next):
        super().__init__()
        self.inner = inner

    def forward(self, ids, mask=None):
        return self.inner(ids, segments=None if mask is None else Segments.from_mask(mask)).logits


@torch.no_grad()
def exported(dtype: str, masked: str, strict: str = "") -> None:
    """Traced at 70 tokens; bit-equal, except where eager fp32 products of fewer than 16 rows use another library."""
    whole = Logits(model(dtype))

    def inputs(t: int) -> tuple:
        return (IDS[:, :t].contiguous(), *([MASK[:, :t].contiguous()] if masked else ()))

    shapes = ({1: Dim("t", min=2, max=1 << 16)},) * len(inputs(70))
    program = torch.export.export(whole, inputs(70), dynamic_shapes=shapes, strict=bool(strict)).module()
    for t in LENGTHS:
        real = MASK[:, :t] if masked else torch.ones(2, t, dtype=torch.bool)
        got, expected = program(*inputs(t))[real], whole(*inputs(t))[real]
        torch.testing.assert_close(got, expected, rtol=0, atol=0 if 2 * t >= 16 or dtype == "bf16" else 5e-5)


@torch.no_grad()
def logits(dtype: str, backend: str = "eager") -> None:
    whole = Logits(model(dtype))
    compiled = torch.compile(whole, backend=backend, fullgraph=True)
    for mask in (None, MASK[:, :70].contiguous()):
        real = torch.ones(2, 70, dtype=torch.bool) if mask is None else mask
        got, expected = compiled(IDS[:, :70], mask)[real], whole(IDS[:, :70], mask)[real]
        assert backend == "inductor" or torch.equal(got, expected)
        assert float((got - expected).abs().mean()) < 1e-5 * float(expected.abs().mean()) or dtype == "bf16"
    given = torch.compile(whole.inner, backend=backend, fullgraph=True)(IDS[:, :70], segments=PACKED).logits
    assert torch.equal(given[PACKED.mask], whole.inner(IDS[:, :70], segments=PACKED).logits[PACKED.mask])


def losses(dtype: str, masked: str) -> None:
    """All losses and the gradients of every parameter are bit-equal."""
    whole = model(dtype)
    mask = MASK[:, :70].contiguous() if masked else None

    def loss(ids, mask):
        found = whole.loss(ids, segments=None if mask is None else Segments.from_mask(mask))
        return found.total, found.lm, found.mtp, found.balance, found.z

    def run(function):
        whole.zero_grad()
        parts = function(IDS[:, :70], mask)
        parts[0].backward()
        return [*(x.detach() for x in parts), *(p.grad for p in whole.parameters())]

    compiled = run(torch.compile(loss, backend="aot_eager", fullgraph=True))
    for got, expected in zip(compiled, run(loss), strict=True):
        assert torch.equal(got, expected)


def _small(backends: str) -> q.Qwen3Next:
    """With the backends that are chosen here, or "torch": those of operators that torch has and the delta rule's."""
    whole = model("fp32", num_hidden_layers=2, full_attention_interval=2)
    if backends == "torch":
        for operation, name in {"linear": "torch", "elementwise": "torch", "delta_rule": "chunked_recompute"}.items():
            whole.set_backend(operation, name)
    return whole


def _same_steps(whole: q.Qwen3Next, step, *, mark: bool, tolerance: float = 0) -> None:
    """A step's loss and the gradients of every parameter, at lengths that it was not traced at."""
    for t in (300, 70, 17, 64, 65, 299):
        ids, found = IDS[:, :t].contiguous(), []
        if mark:
            torch._dynamo.mark_dynamic(ids, 1)
        for run in (step, lambda ids: whole.loss(ids).total):
            whole.zero_grad()
            loss = run(ids)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in whole.parameters())])
        for got, expected in zip(*found, strict=True):
            assert float((got - expected).abs().max()) <= tolerance, t


def training_step(backends: str, dynamic: str, backend: str = "aot_eager") -> None:
    """One program serves every length, and another one if rows decide which library multiplies them."""
    whole = _small(backends)
    compiled = torch.compile(
        lambda ids: whole.loss(ids).total, backend=backend, fullgraph=True, dynamic=dynamic == "all" or None
    )
    tolerance = 1e-5 if backend == "inductor" else 0  # which adds in another order
    _same_steps(whole, compiled, mark=dynamic == "marked", tolerance=tolerance)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= {"marked": 2, "all": 2, "found": 3}[dynamic]  # "found" traces the first length as a constant


def joint(backends: str) -> None:
    """The graph of loss and gradients of any length, made once; what docs/export.md calls a training step."""
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export
    from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors, aot_export_joint_with_descriptors
    from torch._guards import tracing

    whole = _small(backends)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = whole

        def forward(self, ids):
            return self.model.loss(ids).total

    ids = IDS.contiguous()
    torch._dynamo.mark_dynamic(ids, 1, min=257, max=1 << 16)
    captured = dynamo_graph_capture_for_export(Loss())(ids)
    with ExitStack() as stack, tracing(captured.meta["tracing_context"]), captured.meta["fake_mode"]:
        made = aot_export_joint_with_descriptors(stack, captured, (ids,))
        step = aot_compile_joint_with_descriptors(made)
    called = {str(node.target) for node in made.graph_module.graph.nodes if node.op == "call_function"}
    assert any("delta_rule_backward" in name for name in called), called
    parameters = dict(whole.named_parameters(prefix="model", remove_duplicate=False))
    given = [parameters[name] for name in made.params_spec]
    _same_steps(whole, lambda ids: step(*given, ids), mark=False)
    # The graph by itself: parameters, tokens and the loss's gradient in; loss and gradients out.
    (loss,), gradients = made.graph_module([*given, IDS[:, :65].contiguous()], [torch.ones(())])
    whole.zero_grad()
    expected = whole.loss(IDS[:, :65]).total
    expected.backward()
    assert torch.equal(loss, expected)
    seen = set()
    for parameter, gradient in zip(given, gradients, strict=False):  # the last is of the tokens
        if gradient is not None:  # a parameter of two names has its gradient under one of them
            assert torch.equal(parameter.grad, gradient)
            seen.add(parameter)
    assert seen == set(whole.parameters())


def operators() -> None:
    """The delta rule in torch: what is traced without numbers has the shapes of what runs. 300 tokens are 3 pieces."""
    b, t, kh, h, k, v = 2, 300, 8, 16, 8, 12
    keys = [F.normalize(torch.randn(b, t, kh, k), dim=-1) for _ in range(2)]
    given = (*keys, torch.randn(b, t, h, v), -torch.rand(b, t, h), torch.rand(b, t, h), torch.randn(b, h, k, v))
    for starts in (None, torch.rand(b, t) < 0.02):
        for keep in (False, True):
            torch.library.opcheck(piecewise_delta_rule._outputs_op, (*given, starts, keep))
        out, after, found = piecewise_delta_rule._outputs(*given, starts, True)
        assert len(found) == 3
        upstream = torch.randn_like(out), torch.randn_like(after)
        torch.library.opcheck(piecewise_delta_rule._gradients_op, (*given[:5], found, starts, *upstream))


SLOW = pytest.mark.slow
CASES = [
    pytest.param("exported", "fp32", "masked"),
    *(pytest.param("exported", *case, marks=SLOW) for case in (("fp32", ""), ("bf16", ""), ("bf16", "masked"))),
    pytest.param("exported", "fp32", "", "strict", marks=SLOW),
    *(pytest.param("logits", dtype, marks=SLOW) for dtype in DTYPES),
    *(pytest.param("losses", dtype, masked, marks=SLOW) for dtype in DTYPES for masked in ("", "masked")),
    pytest.param("training_step", "auto", "marked", marks=SLOW),
    pytest.param("training_step", "auto", "found", marks=SLOW),
    pytest.param("training_step", "auto", "marked", "inductor", marks=SLOW),
    pytest.param("training_step", "torch", "all", marks=SLOW),
    *(pytest.param("joint", backends, marks=SLOW) for backends in ("auto", "torch")),
]


def run(*case: str, **variables: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, __file__, *case], os.environ | {"PYTHONPATH": paths} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("case", [pytest.param(c.values, marks=c.marks, id="-".join(c.values)) for c in CASES])
def test_traced(case):
    run(*case)


@pytest.mark.parametrize(
    "case",
    [
        ("exported", "fp32", ""),
        *(
            pytest.param(case, marks=SLOW)
            for case in (("operators",), ("exported", "bf16", "masked"), ("losses", "fp32", "masked"))
        ),
    ],
    ids="-".join,
)
def test_traced_without_a_compiler(case):
    run(*case, QWEN3NEXT_CPU="none")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
