"""Which implementation runs and why, and the arguments that kernels receive."""

import inspect
import sys
import types

import pytest
import torch
from conftest import small_model

import layers.dispatch.availability as availability
import layers.dispatch.backends as backends
import layers.dispatch.registry as registry
import layers.dispatch.speeds as speeds
import qwen3next as q
from layers.causal_conv import causal_conv
from layers.delta_rule import gated_delta_rule
from layers.segments import Segments

CUDA = torch.device("cuda")


def test_auto_takes_the_fastest_that_can_run(monkeypatch):
    cpu = torch.zeros(1)
    ratios = {
        ("linear", "float32", gradients): {"onednn": {64: 2.0}, "torch": {64: 1.0}} for gradients in (True, False)
    }
    for tables, linear in (((), "torch"), ((speeds.Figures("a test", ratios),), "onednn")):
        for compiler, grad, kernels in ((None, False, "cpp"), (None, True, "cpp"), ("no compiler", False, None)):
            monkeypatch.setattr(availability, "missing", lambda compiler=compiler: compiler)
            with torch.set_grad_enabled(grad), speeds.using(*tables):
                assert {name: backends.choose(name, "auto", cpu) for name in backends.OPERATIONS} == {
                    "decode": "cpp" if compiler is None else "torch",
                    "linear": linear,
                    "delta_rule": kernels or "chunked_recompute",
                    "simple_gla": "chunked",
                    "causal_conv": kernels or "torch",
                    "attention": "cpp" if kernels and not grad else "sdpa",
                    "elementwise": kernels or "torch",
                    "cross_entropy": "torch",
                    "experts": kernels or "grouped",
                }
    monkeypatch.setattr(availability, "fla_missing", lambda: None)
    assert backends.choose_for("delta_rule", "auto", CUDA, torch.float64) == "chunked"  # pieces are sized for a CPU
    assert backends.choose_for("delta_rule", "chunked_recompute", CUDA, torch.float64) == "chunked_recompute"
    assert backends.why_not("delta_rule", "fla", CUDA, torch.bfloat16) is None
    assert "float64" in backends.why_not("delta_rule", "fla", CUDA, torch.float64)
    monkeypatch.setattr(availability, "fla_missing", lambda: "not installed")
    assert backends.why_not("delta_rule", "fla", CUDA, torch.bfloat16) == "not installed"


@pytest.mark.parametrize("operation", ["delta_rule", "simple_gla", "causal_conv"])
def test_implementations_are_registered_and_have_one_signature(operation):
    """Beside options that have a default, which are an implementation's own."""
    signatures = {}
    for implementation in backends.OPERATIONS[operation]:
        parameters = inspect.signature(registry.function_of(operation, implementation.name)).parameters.values()
        signatures[implementation.name] = [(p.name, p.kind) for p in parameters if p.default is p.empty]
    expected = signatures[registry.definition_of(operation)]
    assert signatures == dict.fromkeys(signatures, expected)


def test_a_named_backend_runs_or_raises():
    with pytest.raises(RuntimeError, match="cannot run here: flash-linear-attention's kernels run on CUDA"):
        small_model().set_backend("delta_rule", "fla")
    with pytest.raises(RuntimeError, match=r"no torch\.float64"):
        small_model(dtype=torch.float64).set_backend("experts", "grouped")


def test_explain_says_what_runs_and_what_would_be_faster():
    model = small_model()
    model.set_backend("attention", "eager")
    table = q.explain(model)
    rows = {row.operation: row for row in table}
    assert rows.keys() == backends.OPERATIONS.keys() - {"simple_gla"}  # which only variants have
    assert (rows["attention"].runs, rows["attention"].why[:5]) == ("eager", "named")
    assert "fla: " in rows["delta_rule"].faster
    assert "delta_rule" in str(table)


def test_every_backend_gives_the_same_model():
    tokens = torch.arange(80).view(1, 80)
    model = small_model(dtype=torch.float64)  # rounding out of the way; grouped experts, fp32 only, are tested by layer
    expected = model(tokens).logits
    for operation, names in {
        "delta_rule": ["chunked", "recurrent"],
        "attention": ["eager"],
        "experts": ["loop"],
    }.items():
        for name in names:
            model.set_backend(operation, name)
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-10)


@pytest.fixture
def on_a_hopper(monkeypatch):
    """FLA installed on a Hopper GPU, with the Triton that a test puts there; warnings are fresh."""
    monkeypatch.setattr(availability, "fla_missing", lambda: None)
    monkeypatch.setattr(availability, "generation", lambda device: 9 if device.type == "cuda" else 0)
    backends._warn_once.cache_clear()
    yield lambda triton: monkeypatch.setattr(availability, "release", {"triton": triton}.get)
    backends._warn_once.cache_clear()


@pytest.mark.parametrize(
    "triton, refused",
    [((3, 3, 1), False), ((3, 4, 0), True), ((3, 6, 0), True), ((3, 7, 0), True), ((3, 7, 1), False), ((4, 0), False)],
)
def test_a_triton_that_miscompiles_gradients_is_refused_on_hopper(on_a_hopper, monkeypatch, triton, refused):
    on_a_hopper(triton)
    reason = backends.why_not("delta_rule", "fla", CUDA, torch.bfloat16)
    assert (reason is not None) == refused
    if refused:
        assert f"triton {'.'.join(map(str, triton))} miscompiles" in reason
        assert "pip install 'triton>=3.7.1'" in reason
    with torch.no_grad():  # the forward is right
        assert backends.why_not("delta_rule", "fla", CUDA, torch.bfloat16) is None
    assert backends.why_not("causal_conv", "fla", CUDA, torch.bfloat16) is None
    for other in (8, 10):
        monkeypatch.setattr(availability, "generation", lambda _device, other=other: other)
        assert backends.why_not("delta_rule", "fla", CUDA, torch.bfloat16) is None


def test_a_refused_triton_is_never_replaced_in_silence(on_a_hopper):
    on_a_hopper((3, 6, 0))
    with pytest.raises(RuntimeError, match=r"'fla' backend of delta_rule cannot run here: triton 3\.6\.0 miscompiles"):
        backends.choose_for("delta_rule", "fla", CUDA, torch.bfloat16)
    with pytest.warns(UserWarning, match=r"not used: triton 3\.6\.0.*pip install 'triton>=3\.7\.1'") as seen:
        chosen = [backends.choose_for("delta_rule", "auto", CUDA, torch.bfloat16) for _ in "ab"]
    assert chosen == ["chunked"] * 2
    assert len(seen) == 1
    row = backends.explain_operation("delta_rule", "auto", CUDA, torch.bfloat16)
    assert row.runs == "fla"
    assert "with gradients, chunked, as triton 3.6.0 miscompiles" in row.why
    assert (
        "not with gradients: triton 3.6.0" in backends.explain_operation("delta_rule", "fla", CUDA, torch.bfloat16).why
    )


@pytest.fixture
def fake_fla(monkeypatch):
    """FLA's documented signatures, computed by our reference, to check the meaning of the passed arguments."""
    calls = []

    def kernel(name):
        def run(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
            calls.append(name)
            assert scale == 1.0
            assert output_final_state
            assert g.dtype == beta.dtype == torch.float32
            assert initial_state is None or initial_state.dtype == torch.float32
            if cu_seqlens is None:
                return gated_delta_rule(q, k, v, g, beta, state=initial_state, backend="recurrent")
            assert q.shape[0] == 1
            outputs, states = [], []
            for i, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
                cut = (x[:, begin:end] for x in (q, k, v, g, beta))
                state = None if initial_state is None else initial_state[i : i + 1]
                o, s = gated_delta_rule(*cut, state=state, backend="recurrent")
                outputs.append(o)
                states.append(s)
            return torch.cat(outputs, 1), torch.cat(states)

        return run

    def conv(
        x, weight, bias=None, residual=None, initial_state=None, activation=None, backend="triton", cu_seqlens=None
    ):
        calls.append("causal_conv1d")
        assert activation == "silu"
        n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        assert initial_state.shape == (n, x.shape[2], weight.shape[1])
        state = initial_state[..., 1:].mT
        if cu_seqlens is None:
            return causal_conv(x, weight, state=state, backend="torch")
        assert cu_seqlens.dtype == torch.int64
        assert x.shape[0] == 1
        pieces = zip(x.split(cu_seqlens.diff().tolist(), dim=1), state, strict=True)
        outputs = [causal_conv(piece, weight, state=before[None], backend="torch")[0] for piece, before in pieces]
        return torch.cat(outputs, 1), None

    rule = types.ModuleType("fla.ops.gated_delta_rule")
    rule.chunk_gated_delta_rule, rule.fused_recurrent_gated_delta_rule = kernel("chunk"), kernel("fused")
    convolution = types.ModuleType("fla.modules.convolution")
    convolution.causal_conv1d = conv
    for name, module in {
        "fla": types.ModuleType("fla"),
        "fla.ops": types.ModuleType("fla.ops"),
        "fla.modules": types.ModuleType("fla.modules"),
        "fla.ops.gated_delta_rule": rule,
        "fla.modules.convolution": convolution,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    for implementations in ("delta_rule", "causal_conv"):
        fla, *others = backends.OPERATIONS[implementations]
        here = backends.Implementation(fla.name, fla.why)
        monkeypatch.setitem(backends.OPERATIONS, implementations, (here, *others))
    return calls


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_fla_is_called_as_meant(fake_fla, state, packed):
    from test_delta_rule import inputs

    x = inputs(40, dtype=torch.float32, state=state)
    ids = torch.tensor([[-1] * 3 + [0] * 20 + [1] * 17, [0] * 5 + [1] * 5 + [2] * 25 + [-1] * 5])
    segments = Segments.from_document_ids(ids) if packed else None
    o, final = gated_delta_rule(**x, segments=segments, backend="fla")
    expected, last = gated_delta_rule(**x, segments=segments, backend="recurrent")
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(final, last, rtol=0, atol=1e-6)
    assert fake_fla == ["chunk"]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("left", [0, 4])
def test_fla_s_convolution_takes_packed_rows(fake_fla, state, left):
    """Values, gradients and the inputs to carry; rows that begin with padding take the definition."""
    ids = torch.tensor([[-1] * left + [0] * 20 + [1] * (20 - left), [0] * 5 + [1] * 2 + [2] * 28 + [-1] * 5])
    segments, g, found = Segments.from_document_ids(ids), torch.Generator().manual_seed(0), []
    inputs = [torch.randn(*shape, generator=g) for shape in ((2, 40, 6), (6, 4), (2, 3, 6))]
    for backend in ("fla", "torch"):
        x, weight, before = (y.clone().requires_grad_() for y in inputs)
        y, after = causal_conv(x, weight, state=before if state else None, segments=segments, backend=backend)
        (segments.real(y).square().sum() + after.square().sum()).backward()
        found.append([segments.real(y), after, x.grad, weight.grad, *([before.grad] if state else [])])
    for kernel, definition in zip(*found, strict=True):
        torch.testing.assert_close(kernel, definition, rtol=1e-5, atol=1e-6)
    assert fake_fla == ([] if left else ["causal_conv1d"])


@pytest.fixture
def fake_fla_rows(fake_fla, monkeypatch):
    """FLA's gated norm and fused loss, with its documented precision and reductions."""

    def rms_norm_gated(x, g, weight, bias, activation="swish", eps=1e-6):
        assert bias is None
        assert activation in ("silu", "swish")
        fake_fla.append("rms_norm_gated")
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight.float()
        return (y * torch.nn.functional.silu(g.float())).to(x.dtype)

    class FusedLinearCrossEntropyLoss:
        def __init__(self, ignore_index=-100, reduction="mean"):
            assert reduction == "sum"

        def __call__(self, x, target, weight, bias=None):
            assert x.dtype == weight.dtype
            fake_fla.append("FusedLinearCrossEntropyLoss")
            return torch.nn.functional.cross_entropy((x @ weight.mT).float(), target, reduction="sum")

    norm = types.ModuleType("fla.modules.fused_norm_gate")
    norm.rms_norm_gated = rms_norm_gated
    monkeypatch.setitem(sys.modules, "fla.modules.fused_norm_gate", norm)
    sys.modules["fla.modules"].FusedLinearCrossEntropyLoss = FusedLinearCrossEntropyLoss
    for name in ("elementwise", "cross_entropy"):
        free = (backends.Implementation(i.name, i.why) if i.name == "fla" else i for i in backends.OPERATIONS[name])
        monkeypatch.setitem(backends.OPERATIONS, name, tuple(free))
    return fake_fla


def test_fla_s_gated_norm_and_loss_are_called_as_meant(fake_fla_rows):
    """In fp32, where FLA equals the definition up to rounding; with a hook on the gate the definition runs."""
    model, ids, found, seen = small_model(), torch.arange(40).view(2, 20), [], []
    for name in ("fla", "torch"):
        model.set_backend("elementwise", name)
        model.set_backend("cross_entropy", name)
        model.set_backend("delta_rule", "chunked")
        model.zero_grad()
        losses = model.loss(ids)
        losses.total.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([losses.lm.detach(), losses.mtp.detach(), *grads])
        if name == "fla":
            assert fake_fla_rows.count("rms_norm_gated") == 3
            assert fake_fla_rows.count("FusedLinearCrossEntropyLoss") == 1 + (model.mtp is not None)
            with torch.no_grad():
                point = "blocks.0.linear_attn.hook_gate"
                model.run_with_hooks(ids, fwd_hooks=[(point, lambda x, hook: seen.append(x))])
            assert seen
            assert fake_fla_rows.count("rms_norm_gated") == 5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_auto_picks_of_fla_s_row_kernels(monkeypatch):
    monkeypatch.setattr(availability, "fla_missing", lambda: None)
    pick = backends.choose_for
    assert pick("elementwise", "auto", CUDA, torch.float32) == "fla"
    assert pick("elementwise", "auto", CUDA, torch.bfloat16) == "torch"  # another order of rounding
    assert pick("elementwise", "fla", CUDA, torch.bfloat16) == "fla"
    assert pick("cross_entropy", "auto", CUDA, torch.bfloat16) == "torch"
    row = {row.operation: row for row in q.explain(small_model(), device="cuda", dtype="bfloat16")}["cross_entropy"]
    assert "not been measured: name it" in row.faster


def test_fla_serves_the_whole_model(fake_fla):
    """Prefill uses the chunked kernel and the fused convolution, decoding the fused recurrent kernel."""
    model, tokens = small_model(), torch.arange(20).view(2, 10)
    with torch.no_grad():
        cache = model.new_cache(batch=2, max_len=10)
        got = [model(tokens[:, :9], cache=cache).logits, model(tokens[:, 9:], cache=cache).logits]
        assert fake_fla == ["causal_conv1d", "chunk"] * 3 + ["fused"] * 3
        for operation in ("delta_rule", "causal_conv"):
            backends.OPERATIONS[operation] = backends.OPERATIONS[operation][1:]
        torch.testing.assert_close(torch.cat(got, 1), model(tokens).logits, rtol=0, atol=1e-5)
