"""On a CUDA device: what "auto" picks there equals the definitions, and the whole model equals itself on the CPU."""

import copy

import pytest
import torch
from conftest import small_model
from test_delta_rule import inputs

import qwen3next as q
from layers.delta_rule import gated_delta_rule
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
