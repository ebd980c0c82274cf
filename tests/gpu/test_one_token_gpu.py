"""The kernels of a decoding step on a CUDA device: each against its definition, and a captured step of them."""

import pytest
import torch
from conftest import small_model

import qwen3next as q
from layers.dispatch.registry import case_of, parts_of
from layers.dispatch.self_check import checked
from qwen3next.decoding.cuda_graph import graph_of
from qwen3next.decoding.graph_states import Loan
from qwen3next.decoding.token_step import why_not_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PARTS = parts_of("one_token", "triton")


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("part", PARTS)
def test_kernels_equal_their_definitions(part, dtype, bound):
    """The definition runs on the CPU, whose products are not tf32. Numbers of experts must be equal."""
    case, cuda = case_of(f"one_token.{part}", "triton"), torch.device("cuda")
    with torch.no_grad():
        found, expected = case("triton", cuda, dtype, 0), case("torch", torch.device("cpu"), dtype, 0)
        assert checked(f"one_token.{part}", "triton", cuda, dtype, 0, False) is None
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a.cpu(), b)
        assert (a.cpu().double() - b.double()).norm() <= bound * b.double().norm()


def steps(model, backend, ids, **options):
    model.set_backend("decode", backend)
    cache = model.new_cache(len(ids), **options)
    list(model.prefill(ids[:, :-9], cache))
    return torch.stack([model.step(x, cache) for x in ids[:, -9:].split(1, dim=1)]).float(), cache


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
def test_a_captured_step_of_kernels_equals_the_modules(batch, dtype, bound):
    """Past the end of a buffer, whose growth means a second capture; fp32 products of the modules may be tf32."""
    model = small_model(dtype=dtype, linear_key_head_dim=32, linear_value_head_dim=32).cuda()
    with torch.no_grad():
        assert why_not_kernels(model, torch.device("cuda", 0), dtype) is None
    assert "of Triton kernels" in next(r.why for r in q.explain(model) if r.operation == "decode")
    ids = torch.randint(0, 97, (batch, 260), generator=torch.Generator().manual_seed(0)).cuda()
    expected, _ = steps(model, "torch", ids, max_len=400)
    found, cache = steps(model, "graph", ids, max_len=400)
    assert graph_of(cache).tokens.backend == "triton"
    assert (found - expected).square().mean().sqrt() < bound


def test_the_official_form_in_one_layer_of_each_kind():
    """Heads, widths and choices of Qwen3-Next-80B-A3B with 16 experts, in bf16."""
    config = q.presets.qwen3_next_80b_a3b(
        layer_types=("linear_attention", "full_attention"), num_hidden_layers=2, num_experts=16, vocab_size=512,
        mtp_num_hidden_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = q.Qwen3Next(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    expected, _ = steps(model, "torch", ids, max_len=600)
    found, cache = steps(model, "graph", ids, max_len=600)
    assert graph_of(cache).tokens is not None
    assert (found - expected).norm() <= 3e-2 * expected.norm()


def test_steps_copy_no_states_and_wait_for_nothing(monkeypatch):
    """torch raises where an operation waits for the device."""
    model = small_model(dtype=torch.bfloat16, linear_key_head_dim=32, linear_value_head_dim=32).cuda()
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0)).cuda()
    _, cache = steps(model, "graph", ids, max_len=100)
    taken = []
    monkeypatch.setattr(Loan, "take", lambda self: taken.append(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            token = model.step(ids[:, :1], cache).argmax(-1, keepdim=True)
            model.step(token, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not taken
