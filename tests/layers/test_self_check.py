"""The self-check detects wrong kernels. The definitions replace the kernels, on the CPU."""

import pytest
import torch

import layers.causal_conv as causal_conv
import layers.delta_rule as delta_rule
import layers.dispatch.backends as backends
import layers.gated_attention as gated_attention
import layers.kernels.attention as attention_kernels
from layers.dispatch import availability, registry, self_check

CPU = torch.device("cpu")
KERNELS = [("delta_rule", "fla"), ("causal_conv", "fla"), ("attention", "flash")]
HEADS = {"delta_rule": 0, "causal_conv": 0, "attention": 64}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Every fast backend can run and is checked as on CUDA; results are not shared between tests."""
    monkeypatch.delenv("QWEN3NEXT_SELF_CHECK", raising=False)
    monkeypatch.setattr(self_check, "failed", lambda *what: self_check.checked(*what, torch.is_grad_enabled()))

    def check(operation, name):
        return lambda *like: None if self_check._running else availability._self_check(operation, name, *like)

    for operation, name in KERNELS:
        found = [
            (
                backends.Implementation(i.name, i.why, head_dims=check(operation, name))
                if operation == "attention"
                else backends.Implementation(i.name, i.why, check(operation, name))
            )
            if i.name == name
            else i
            for i in backends.OPERATIONS[operation]
        ]
        monkeypatch.setitem(backends.OPERATIONS, operation, tuple(found))
    monkeypatch.setattr(self_check, "_results", {})
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


def play(monkeypatch, *, wrong=0.0, gradient_wrong=False, error=None):
    """Replace the kernels by the definitions, with a fault."""

    class Twisted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    def faulty(y):
        if error is not None:
            raise error
        return Twisted.apply(y) if gradient_wrong else y * (1 + wrong)

    def rule(q, k, v, log_decay, beta, *, state, segments):
        o, s = delta_rule.gated_delta_rule(q, k, v, log_decay, beta, state=state, segments=segments, backend="chunked")
        return faulty(o), s

    def conv(x, weight, *, state, segments):
        y, after = causal_conv.causal_conv(x, weight, state=state, segments=segments, backend="torch")
        return faulty(y), after

    def attention(choice, q, k, v, mask=None):
        return faulty(gated_attention.attend(q, k, v, backend="eager"))

    monkeypatch.setitem(registry._functions, ("delta_rule", "fla"), rule)
    monkeypatch.setitem(registry._functions, ("causal_conv", "fla"), conv)
    monkeypatch.setattr(attention_kernels, "attend_fused", attention)


@pytest.mark.parametrize("operation, name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_passes(monkeypatch, operation, name, dtype):
    play(monkeypatch)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert backends.why_not(operation, name, CPU, dtype, head_dim=HEADS[operation]) is None


@pytest.mark.parametrize("operation, name", KERNELS)
@pytest.mark.parametrize("fault", [{"wrong": 0.2}, {"wrong": float("nan")}, {"error": ValueError("no kernel image")}])
def test_a_wrong_kernel_is_refused(monkeypatch, operation, name, fault):
    play(monkeypatch, **fault)
    reason = backends.why_not(operation, name, CPU, torch.bfloat16, head_dim=HEADS[operation])
    expected = "raises ValueError: no kernel image" if "error" in fault else "% from the definition"
    assert f"checked here, {operation} with gradients in bfloat16" in reason
    assert expected in reason
    assert f"(torch {torch.__version__}" in reason
    with pytest.warns(UserWarning, match=f"{name!r} backend of {operation} is not used: checked here"):
        assert backends.choose_for(operation, "auto", CPU, torch.bfloat16, head_dim=HEADS[operation]) != name
    with pytest.raises(RuntimeError, match="cannot run here: checked here"):
        backends.choose_for(operation, name, CPU, torch.bfloat16, head_dim=HEADS[operation])


@pytest.mark.parametrize("operation, name", KERNELS)
def test_wrong_gradients_are_caught_and_the_forward_kept(monkeypatch, operation, name):
    play(monkeypatch, gradient_wrong=True)
    assert "with gradients" in backends.why_not(operation, name, CPU, torch.float32, head_dim=HEADS[operation])
    with torch.no_grad():
        assert backends.why_not(operation, name, CPU, torch.float32, head_dim=HEADS[operation]) is None


def test_checked_once(monkeypatch):
    play(monkeypatch)
    assert backends.why_not("causal_conv", "fla", CPU, torch.float32) is None
    play(monkeypatch, wrong=1.0)
    assert backends.why_not("causal_conv", "fla", CPU, torch.float32) is None


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("t, s", [(1, 70), (40, 70), (70, 70)])
def test_attention_is_checked_at_each_width_and_shape(monkeypatch, width, t, s):
    """A kernel that is wrong at one width, for one token, a continuation or a square is refused at this width alone."""

    def attention(choice, q, k, v, mask=None):
        y = gated_attention.attend(q, k, v, backend="eager")
        return y * 1.2 if (*q.shape[1:4:2], k.shape[1]) == (t, width, s) else y

    monkeypatch.setattr(attention_kernels, "attend_fused", attention)
    for head_dim in (64, 256):
        reason = backends.why_not("attention", "flash", CPU, torch.bfloat16, head_dim=head_dim)
        assert (reason is not None) == (head_dim == width)
    assert f"with heads of {width} is off by" in backends.why_not(
        "attention", "flash", CPU, torch.bfloat16, head_dim=width
    )


@pytest.mark.parametrize("case", ["one token", "packed"])
def test_the_rule_is_checked_for_one_token_and_packed_rows(monkeypatch, case):
    def rule(q, k, v, log_decay, beta, *, state, segments):
        o, after = delta_rule.gated_delta_rule(
            q, k, v, log_decay, beta, state=state, segments=segments, backend="chunked"
        )
        wrong = q.shape[1] == 1 if case == "one token" else segments is not None
        return o * 1.2 if wrong else o, after

    monkeypatch.setitem(registry._functions, ("delta_rule", "fla"), rule)
    assert "is off by" in backends.why_not("delta_rule", "fla", CPU, torch.float32)


def test_a_time_limit_says_nothing_of_a_kernel(monkeypatch):
    """The caller's limit passes on, and the check is made again later."""
    play(monkeypatch, error=TimeoutError("the section's 60 s were over"))
    with pytest.raises(TimeoutError, match="60 s"):
        backends.why_not("causal_conv", "fla", CPU, torch.float32)
    play(monkeypatch)
    assert backends.why_not("causal_conv", "fla", CPU, torch.float32) is None


def test_out_of_memory_says_nothing_of_a_kernel(monkeypatch):
    play(monkeypatch, error=torch.OutOfMemoryError("full"))
    assert backends.why_not("causal_conv", "fla", CPU, torch.float32) is None


def test_where_nothing_is_checked(monkeypatch):
    """Without the device, and if the environment variable is set."""
    monkeypatch.undo()
    cuda = torch.device("cuda")
    assert self_check.failed("causal_conv", "fla", cuda, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_check, "checked", lambda *what: repr(what))
    assert "type='cuda'" in self_check.failed("causal_conv", "fla", cuda, torch.float32)
    monkeypatch.setenv("QWEN3NEXT_SELF_CHECK", "0")
    assert self_check.failed("causal_conv", "fla", cuda, torch.float32) is None
