"""`explain` is correct: every call of an implementation is counted, for each operation and backend."""

import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import small_model
from torch.utils._python_dispatch import TorchDispatchMode

import layers.causal_conv as causal_conv
import layers.cross_entropy as cross_entropy
import layers.delta_rule as delta_rule
import layers.dispatch.availability as availability
import layers.dispatch.backends as backends
import layers.dispatch.registry as registry
import layers.gated_attention as gated_attention
import layers.gradients as gradients
import layers.kernels.cross_entropy as cross_entropy_kernels
import layers.kernels.delta_rule as rule_kernels
import layers.kernels.experts as experts
import layers.kernels.linear as linear_kernels
import layers.kernels.tiled_attention as tiled_attention
import layers.linear as linear
import layers.mlp as mlp
import layers.moe as moe
import layers.norm as norm
import qwen3next as q
import qwen3next.decoding.plan as decode
from layers.cpp import attention_ops, conv_ops, expert_ops, operators, row_ops, rule_ops

CPU = torch.device("cpu")
# The C++ functions with their operation.
NATIVE = {
    "delta_rule": ("delta_rule",),
    "attention": ("attend",),
    "elementwise": ("normalise", "silu", "swiglu"),
    "causal_conv": ("convolve",),
    "experts": ("products", "feed_forward"),
    "sorting": ("permute", "combine", "combine_backward", "each_once"),  # by both backends of experts in C++
}
TORCH_OPERATORS = {
    "mkldnn::_linear_pointwise": ("linear", "onednn"),
    "aten::mm": ("linear", "torch"),  # with weights alone: all others here are batched
    "aten::addmm": ("linear", "torch"),
    "aten::_scaled_dot_product_flash_attention_for_cpu": ("attention", "sdpa"),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": ("attention", "sdpa"),
}
PYTHON = {
    ("delta_rule", "chunked_recompute"): (rule_kernels, "recomputed"),
    ("delta_rule", "chunked"): (delta_rule, "unit_lower_inverse"),
    ("delta_rule", "recurrent"): (delta_rule, "recurrent"),  # in the registry, by name and for a token by itself
    ("causal_conv", "torch"): (gradients.FilterTaps, "apply"),
    ("elementwise", "torch"): (norm, "unit_rms"),
    ("experts", "loop"): (moe, "loop"),
    ("experts", "one token"): (experts, "one_token"),
    ("experts", "sorted"): (registry._functions, ("experts", "sorted")),
    ("experts", "grouped"): (registry._functions, ("experts", "grouped")),
    ("experts", "gathered"): (registry._functions, ("experts", "gathered")),
    ("cross_entropy", "torch"): (cross_entropy_kernels._Summed, "apply"),
    ("attention", "eager"): (torch.Tensor, "softmax"),
}


class Count(TorchDispatchMode):
    """Calls of each backend by operation, including autograd's backward pass."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls = defaultdict(lambda: defaultdict(int))
        for (operation, backend), (owner, name) in PYTHON.items():
            self._wrap(monkeypatch, owner, name, operation, backend)
        monkeypatch.setitem(registry._functions, ("delta_rule", "recurrent"), delta_rule.recurrent)
        call = operators.call

        def native(name, *arguments):
            (operation,) = [key for key, starts in NATIVE.items() if name.startswith(starts)]
            self.calls[operation]["cpp"] += 1
            return call(name, *arguments)

        for module in (attention_ops, conv_ops, expert_ops, row_ops, rule_ops):
            monkeypatch.setattr(module, "call", native)
        kernels = decode.kernels

        def step():
            self.calls["decode"]["cpp"] += 1
            return kernels()

        monkeypatch.setattr(decode, "kernels", step)
        silu = torch.nn.functional.silu

        def activation(x):
            self.calls["elementwise"]["torch"] += 1
            return silu(x)

        monkeypatch.setattr(mlp, "F", SimpleNamespace(silu=activation))

    def _wrap(self, monkeypatch, owner, name, operation, backend):
        real = owner[name] if isinstance(owner, dict) else getattr(owner, name)

        def wrapped(*arguments, **options):
            scores = name != "softmax" or arguments[0].ndim == 4  # a router's have no heads
            self.calls[operation][backend] += scores
            return real(*arguments, **options)

        (monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr)(owner, name, wrapped)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = TORCH_OPERATORS.get(function._schema.name)
        if found is not None:
            self.calls[found[0]][found[1]] += 1
        return function(*args, **(kwargs or {}))

    def ran(self):
        """Backends by operation that ran since the last call."""
        found = {operation: {name for name, n in calls.items() if n} for operation, calls in self.calls.items()}
        self.calls.clear()
        found.pop("sorting", None)
        return found


def runs(operation: str, backend: str, *, grad: bool = False) -> bool:
    with torch.set_grad_enabled(grad):
        return backends.why_not(operation, backend, CPU, torch.float32) is None


CHOICES = [
    (operation, implementation.name)
    for operation, implementations in backends.OPERATIONS.items()
    for implementation in implementations
    if operation not in ("simple_gla", "causal_conv", "decode") and runs(operation, implementation.name)
]


def small() -> q.Qwen3Next:
    model = small_model(num_experts_per_tok=3)
    model.set_backend("decode", "torch")
    return model


@pytest.mark.parametrize("operation, name", CHOICES)
def test_what_was_named_is_all_that_runs(monkeypatch, operation, name):
    model, ids = small(), torch.arange(60).view(1, 60) % 97
    model.set_backend(operation, name)
    told = {row.operation: row for row in q.explain(model)}
    assert told[operation].runs == name
    count = Count(monkeypatch)
    # A single token uses the definition of the delta rule, and its convolution has no named backend.
    one_token = {"delta_rule": {"recurrent"}}
    with count, torch.no_grad():
        cache = model.new_cache(max_len=80)
        model(ids, cache=cache)
        ran = count.ran()
        if operation != "cross_entropy":
            assert ran[operation] == {name}
        assert_told(told, ran)
        for token in (5, 7):
            model.step(torch.tensor([[token]]), cache)
            ran = count.ran()
            if operation != "cross_entropy":
                assert ran[operation] == one_token.get(operation, {name})
            assert_told(told, ran, one_token=True)
    with count:
        if not runs(operation, name, grad=True):
            with pytest.raises(RuntimeError, match="no gradients"):
                model.loss(ids)
            return
        loss = model.loss(ids).total
        forward = count.ran()
        loss.backward()
        backward = count.ran()
    assert forward[operation] == {name}
    assert backward.get(operation, set()) <= {name}
    for ran in (forward, backward):
        assert_told(told, ran, gradients=True)


def assert_told(told, ran, *, one_token=False, gradients=False):
    """Check that the backends that ran are those of `explain`, with its listed exceptions."""
    for operation, names in ran.items():
        row = told[operation]
        said = {row.runs}
        if one_token and "a token by itself takes the token loop" in row.why:
            said = {"recurrent"}
        if one_token and "takes one expert after another" in row.why:
            said = {"one token"}
        if one_token and "a token by itself take torch" in row.why:
            said = {"torch"}
        if "fewer than 16 rows take torch's linear" in row.why:  # of an expert, or of the last token
            said = {"torch", row.runs}
        if one_token and "fewer than 16 queries take sdpa" in row.why:
            said = {"sdpa"}
        if gradients and (other := re.search(r"; with gradients, (\w+)", row.why)):
            said = {other[1]}
        assert names <= said, operation


def test_every_operation_is_counted(monkeypatch):
    """Otherwise the test above could pass for any backend."""
    model, ids = small(), torch.arange(60).view(1, 60) % 97
    count = Count(monkeypatch)
    with count:
        model.loss(ids).total.backward()
        ran = count.ran()
    counted = {"linear", "delta_rule", "causal_conv", "attention", "elementwise", "cross_entropy", "experts"}
    assert {operation for operation, names in ran.items() if names} == counted
    assert counted == {operation for operation, _ in CHOICES} | {"causal_conv"}


@pytest.mark.skipif(availability.missing() is not None, reason="no C++ kernels here")
@pytest.mark.parametrize("choice", [None, ("decode", "torch"), ("linear", "torch"), ("elementwise", "torch")])
def test_a_step_is_what_explain_says(monkeypatch, choice):
    """The step is compiled only if no other operation has a named backend."""
    model = small_model()
    if choice is not None:
        model.set_backend(*choice)
    count = Count(monkeypatch)  # without its mode, which would see every operator and so rules out the compiled step
    with torch.no_grad():
        cache = model.new_cache(max_len=8)
        model(torch.arange(4)[None], cache=cache)
        count.ran()
        model.step(torch.tensor([[5]]), cache)
        ran = count.ran()
    decode_row = q.explain(model)[0]
    assert decode_row.runs == ("cpp" if choice is None else "torch")
    assert ("decode" in ran) == (choice is None)
    assert (set(ran) == {"decode"}) == (choice is None)


def test_experts_on_disk_follow_too(monkeypatch):
    from test_offloaded_experts import model, routed

    _, (layer,), _ = model(1, slots=8)
    holder = small()
    holder.blocks[0].mlp.experts = layer
    count = Count(monkeypatch)
    for products in ("torch", "onednn"):
        for rows in ("torch", "cpp"):
            if not (runs("linear", products) and runs("elementwise", rows)):
                continue
            holder.set_backend("linear", products)
            holder.set_backend("elementwise", rows)
            for n in (1, 40):
                with count, torch.no_grad():
                    layer(*routed(n))
                ran = count.ran()
                assert ran["linear"] == {products}
                assert ran["elementwise"] == {rows}


def test_an_unknown_name_is_refused_everywhere():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    heads = torch.randn(1, 2, 4, 8)
    ends = torch.tensor([4], dtype=torch.int32)
    calls = {
        "linear": lambda dtype: linear.linear(x.to(dtype), weight.to(dtype), backend="nonsense"),
        "linear: product": lambda dtype: linear_kernels.product(x.to(dtype), weight.to(dtype), backend="nonsense"),
        "linear: grouped": lambda dtype: experts.grouped_linear(x.to(dtype), weight[None], ends, backend="nonsense"),
        "elementwise: activate": lambda dtype: mlp.activate(x.to(dtype), x.to(dtype), backend="nonsense"),
        "elementwise: l2": lambda dtype: norm.l2_normalise(x.to(dtype), backend="nonsense"),
        "causal_conv": lambda dtype: causal_conv.causal_conv(x[None].to(dtype), weight.mT, backend="nonsense"),
        "attention: tiled": lambda dtype: tiled_attention.tiled_attention(
            heads.to(dtype), lambda a, b: (heads, heads), past=0, backend="nonsense"
        ),
        "attention: one": lambda dtype: tiled_attention.tiled_attention(
            heads[:, :, :1].to(dtype), lambda a, b: (heads, heads), past=3, backend="nonsense"
        ),
        "attention: attend": lambda dtype: gated_attention.attend(heads, heads, heads, backend="nonsense"),
        "cross_entropy": lambda dtype: cross_entropy.linear_cross_entropy(
            x.to(dtype), weight, torch.zeros(4, dtype=torch.long), backend="nonsense"
        ),
        "linear: in cross_entropy": lambda dtype: cross_entropy.linear_cross_entropy(
            x.to(dtype), weight, torch.zeros(4, dtype=torch.long), linear_backend="nonsense"
        ),
        "delta_rule": lambda dtype: delta_rule.gated_delta_rule(
            heads, heads, heads, heads[..., 0], heads[..., 0], backend="nonsense"
        ),
    }
    for name, call in calls.items():
        operation = name.partition(":")[0]
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match=f"{operation} has no backend 'nonsense': choose 'auto', "):
                call(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="no backend 'nonsense'"):
            call(torch.float32)
    model = small_model()
    for operation in ("linear", "elementwise", "delta_rule", "attention", "experts", "decode", "cross_entropy"):
        with pytest.raises(ValueError, match=f"{operation} has no backend 'nonsense'"):
            model.set_backend(operation, "nonsense")


@torch.no_grad()
def test_tiles_have_no_eager():
    heads = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="'eager' backend of attention is no part of tiled_attention"):
        tiled_attention.tiled_attention(heads, lambda a, b: (heads, heads), past=0, backend="eager")


@torch.no_grad()
@pytest.mark.parametrize("name", ["cpp", "sdpa"])
def test_a_query_behind_many_keys_by_name(name):
    """Like plain products."""
    if not runs("attention", name):
        pytest.skip("no C++ kernels here")
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 9000, 32), torch.randn(2, 2, 9000, 32)

    def read(first, last):
        return keys[:, :, first:last], values[:, :, first:last]

    y = tiled_attention.tiled_attention(query, read, past=8999, backend=name)
    torch.testing.assert_close(y, tiled_attention.tiled_attention(query, read, past=8999), rtol=0, atol=1e-6)


@pytest.mark.skipif(not runs("linear", "onednn"), reason="no oneDNN here")
def test_a_few_rows_go_through_onednn_by_name(monkeypatch):
    count = Count(monkeypatch)
    weight = torch.randn(3, 8)
    with count:
        for rows in (1, 2, 40):
            linear.linear(torch.randn(rows, 8), weight, backend="onednn")
            assert count.ran() == {"linear": {"onednn"}}
        assert linear.linear(torch.randn(0, 8), weight, backend="onednn").shape == (0, 3)
