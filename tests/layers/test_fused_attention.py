"""Attention backends of CUDA against attention on the CPU: the kernel, its arguments and its result.

A stand-in with the documented signatures replaces flash-attn; torch's flash kernel runs on the CPU.
"""

import sys
import types

import pytest
import torch
from conftest import small_model
from parity import tokens

import layers.dispatch.availability as availability
import layers.dispatch.backends as backends
import qwen3next as q
from layers.gated_attention import attend
from layers.segments import Segments

pytestmark = pytest.mark.oracle

CUDA = torch.device("cuda")
PACKED = [[3, 9], [12], [1, 1, 6]]


def _eager(q, k, v):
    return attend(q, k, v, backend="eager")


@pytest.fixture
def anywhere(monkeypatch):
    """Allow both fused backends on a CPU."""
    found = []
    for i in backends.OPERATIONS["attention"]:
        fused = i.name in ("flash", "sdpa_flash")
        free = backends.Implementation(i.name, i.why, passed_over=lambda *_: "named alone", head_dims=i.head_dims)
        found.append(free if fused else i)
    monkeypatch.setitem(backends.OPERATIONS, "attention", tuple(found))


@pytest.fixture(params=["flash_attn", "flash_attn_interface", "flash_attn.cute"])
def flash(request, monkeypatch, anywhere):
    """A release of flash-attn: 2 returns the output, 3 and 4 may also return the logsumexp."""
    calls, pair = [], request.param != "flash_attn"

    def flash_attn_func(q, k, v, *, softmax_scale, causal):
        assert causal
        assert softmax_scale == q.shape[-1] ** -0.5
        assert k.shape[2] < q.shape[2]  # the kernel must support grouped heads
        calls.append("whole")
        y = _eager(q, k, v)
        return (y, None) if pair else y

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    ):
        assert causal
        assert softmax_scale == q.shape[-1] ** -0.5
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
        lengths, seen = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert (lengths.max(), seen.max()) == (max_seqlen_q, max_seqlen_k)
        calls.append("varlen")
        parts = zip(q.split(lengths.tolist()), k.split(seen.tolist()), v.split(seen.tolist()), strict=True)
        y = torch.cat([_eager(*(x[None] for x in part))[0] for part in parts])
        return (y, None) if pair else y

    for name, _ in availability.FLASH:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    module = types.ModuleType(request.param)
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, request.param, module)
    availability.flash_module.cache_clear()
    yield calls
    availability.flash_module.cache_clear()


def check(model, backend):
    """Plain, packed and padded forwards with gradients; cached continuations of one and several tokens, ragged rows."""
    packed = Segments.from_lengths(PACKED)
    padded = Segments.from_mask(torch.arange(12) >= torch.tensor([[0], [4], [11]]))
    for segments in (None, packed, padded):
        found = []
        for name in (backend, "eager"):
            model.set_backend("attention", name)
            model.zero_grad()
            loss = model.loss(tokens(12, b=3), segments=segments).total
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for start in (None, padded):
        found = []
        for name in (backend, "eager"):
            model.set_backend("attention", name)
            cache = model.new_cache(3, max_len=40)
            list(model.prefill(tokens(12, b=3), cache, segments=start))
            with torch.no_grad():
                found.append(torch.cat([model(tokens(n, b=3), cache=cache).logits for n in (1, 5, 1)], dim=1))
        torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_flash_serves_the_whole_model(flash):
    check(small_model(dtype=torch.float64), "flash")
    assert set(flash) == {"whole", "varlen"}


def test_torch_s_fused_kernels_serve_the_whole_model(anywhere):
    check(small_model(dtype=torch.float64), "sdpa_flash")


@pytest.mark.parametrize("t, s", [(1, 1), (1, 9), (5, 9), (9, 9), (64, 65)])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_through_torch_s_fused_kernels(anywhere, t, s, masked):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, n, heads, 16, generator=g, requires_grad=True) for n, heads in ((t, 4), (s, 2), (s, 2))]
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)[None, None].expand(2, 1, t, s) if masked else None
    found = []
    for backend in ("sdpa_flash", "eager"):
        y = attend(*x, mask=mask, backend=backend)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_no_math_kernel_in_silence(anywhere, monkeypatch):
    """If torch has no fused kernel, its error is replaced by a clear one; other errors are not changed."""
    x = torch.zeros(1, 3, 2, 16)

    def nothing(*_args, **_options):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", nothing)
    with pytest.raises(RuntimeError, match=r'no fused attention for .* name "sdpa" or "eager"'):
        attend(x, x, x, backend="sdpa_flash")


def test_what_auto_picks_on_cuda(monkeypatch):
    def pick(dtype, head_dim=256):
        return backends.choose_for("attention", "auto", CUDA, dtype, head_dim=head_dim)

    monkeypatch.setattr(availability, "flash_module", lambda gpu: "flash_attn")
    assert [pick(x) for x in (torch.bfloat16, torch.float16)] == ["flash", "flash"]
    assert [pick(torch.bfloat16, d) for d in (8, 20, 512)] == ["flash", "sdpa_flash", "sdpa_flash"]
    assert (pick(torch.float32), pick(torch.float64)) == ("sdpa_flash", "eager")  # the math kernel runs only if named
    assert backends.choose_for("attention", "sdpa", CUDA, torch.float64) == "sdpa"
    with pytest.raises(RuntimeError, match="multiples of 8 up to 256 wide, not 512"):
        backends.choose_for("attention", "flash", CUDA, torch.bfloat16, head_dim=512)
    monkeypatch.setattr(availability, "flash_module", lambda gpu: None)
    assert pick(torch.bfloat16) == "sdpa_flash"
    row = {row.operation: row for row in q.explain(small_model(), device="cuda", dtype="bfloat16")}["attention"]
    assert row.runs == "sdpa_flash"
    assert "flash: no flash-attn for this GPU can be imported: pip install 'qwen3next[flash]'" in row.faster


def test_a_release_is_taken_where_it_was_built_for_the_gpu(monkeypatch):
    installed = {name for name, _ in availability.FLASH}

    def load(name):
        if name not in installed:
            raise ImportError(name)
        return types.SimpleNamespace(flash_attn_func=1, flash_attn_varlen_func=1)

    monkeypatch.setattr(availability.importlib, "import_module", load)
    pick = availability.flash_module.__wrapped__
    assert [pick(gpu) for gpu in (7, 8, 9, 10)] == [None, "flash_attn", "flash_attn_interface", "flash_attn.cute"]
    installed.remove("flash_attn_interface")
    assert pick(9) == "flash_attn.cute"


def test_hooks_inside_are_refused(anywhere):
    model = small_model()
    model.set_backend("attention", "sdpa_flash")
    with pytest.raises(RuntimeError, match="does not exist as the model runs now"), torch.no_grad():
        model.run_with_hooks(tokens(5), fwd_hooks=[("blocks.3.self_attn.hook_pattern", lambda x, hook: None)])
