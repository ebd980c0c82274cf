"""On a CUDA device: the backends of "auto" equal the definitions, and the whole model equals the one on the CPU."""

import copy

import pytest
import torch
from conftest import small_model
from test_delta_rule import inputs

import qwen3next as q
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import why_not
from layers.gated_attention import attend
from layers.segments import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("t", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("packed", [False, True])
def test_fla_values_and_gradients(t, packed):
    """fp32; tensor cores round products to tf32, so 1e-2 of the largest entry, and far less on the mean."""
    results = []
    ids = (torch.rand(2, t, generator=torch.Generator().manual_seed(1)) < 0.05).cumsum(1).cuda()
    segments = Segments.from_document_ids(ids) if packed else None
    for backend in ("fla", "recurrent"):
        x = inputs(t, k=64, v=64, dtype=torch.float32)
        x = {name: value.cuda().requires_grad_() for name, value in x.items()}
        o, state = gated_delta_rule(**x, segments=segments, backend=backend)
        (o.square().sum() + state.square().sum()).backward()
        results.append((o, state, *(value.grad for value in x.values())))
    for kernel, definition in zip(*results, strict=True):
        assert (kernel - definition).abs().max() <= 1e-2 * definition.abs().max()
        assert (kernel - definition).abs().mean() <= 1e-3 * definition.abs().mean()


def test_the_model_on_the_gpu_equals_the_model_on_the_cpu():
    model = small_model(linear_key_head_dim=32, linear_value_head_dim=32)
    there = copy.deepcopy(model).cuda()
    assert {row.operation: row.runs for row in q.explain(there)}["delta_rule"] == "fla"
    tokens = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (there(tokens.cuda()).logits.cpu() - model(tokens).logits).abs()
    assert apart.mean() < 1e-2
    assert torch.equal(
        q.generate(there, tokens.cuda(), max_new_tokens=1).cpu(), q.generate(model, tokens, max_new_tokens=1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_equals_the_modules(dtype):
    """With a growing buffer, a fork and a rollback to a snapshot; equal up to rounding."""
    model = small_model(dtype=dtype, linear_key_head_dim=32, linear_value_head_dim=32).cuda()
    ids, found = torch.randint(0, 97, (2, 250), generator=torch.Generator().manual_seed(0)).cuda(), []
    for backend in ("torch", "graph"):
        model.set_backend("decode", backend)
        cache = model.new_cache(2, max_len=400)
        list(model.prefill(ids[:, :240], cache))
        cache.snapshot("here")
        logits = [model.step(token, cache) for token in ids[:, 240:].split(1, dim=1)]
        cache.restore("here")
        logits += [model.step(token, cache) for token in ids[:, 200:230].split(1, dim=1)]
        found.append(torch.stack(logits).float())
    assert (found[0] - found[1]).square().mean().sqrt() < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("backend", ["flash", "sdpa_flash"])
@pytest.mark.parametrize("t, s", [(1, 65), (5, 64), (65, 65), (500, 500)])
def test_fused_attention_values_and_gradients(backend, t, s):
    if reason := why_not("attention", backend, torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    g, found = torch.Generator().manual_seed(0), []
    x = [torch.randn(2, n, h, 256, generator=g).cuda().bfloat16() for n, h in ((t, 8), (s, 2), (s, 2))]
    for name, kind in ((backend, torch.bfloat16), ("eager", torch.float32)):
        parts = [y.to(kind).requires_grad_() for y in x]
        y = attend(*parts, backend=name)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), parts)))
    for kernel, definition in zip(*found, strict=True):
        assert (kernel - definition).norm() <= 2e-2 * definition.norm()
