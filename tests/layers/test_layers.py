"""Norms, rotation, feed-forward, attention and experts against independent formulas."""

import math

import numpy as np
import pytest
import torch

from layers.gated_attention import GatedAttention, attend
from layers.gated_deltanet import GatedDeltaNet
from layers.kernels.experts import backend_of_experts
from layers.mlp import SwiGLU, activate
from layers.moe import Experts, SparseMoE, top_experts
from layers.norm import GatedRMSNorm, RMSNorm, l2_normalise
from layers.rope import rotation

pytestmark = pytest.mark.oracle


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_norms():
    x, gate = normal(3, 5), normal(3, 5, seed=1)
    rms = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6)
    for norm, scale in ((RMSNorm(5), 1.5), (RMSNorm(5, zero_centred=False), 0.5)):
        assert norm.weight.detach().tolist() == [float(not norm.zero_centred)] * 5
        torch.nn.init.constant_(norm.weight, 0.5)
        torch.testing.assert_close(norm.double()(x), torch.from_numpy(rms * scale))
    gated = GatedRMSNorm(5).double()
    silu = gate.numpy() / (1 + np.exp(-gate.numpy()))
    torch.testing.assert_close(gated(x, gate), torch.from_numpy(rms * silu))
    torch.testing.assert_close(l2_normalise(x).square().sum(-1), torch.ones(3, dtype=x.dtype), rtol=1e-5, atol=0)


def test_norms_compute_in_fp32_and_cast_where_the_checkpoints_do():
    x = normal(4, 64).bfloat16()
    weight = normal(64, seed=1).bfloat16()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    for zero_centred, expected in (
        (True, (unit * (1 + weight.float())).bfloat16()),
        (False, weight * unit.bfloat16()),
    ):
        norm = RMSNorm(64, zero_centred=zero_centred).bfloat16()
        norm.weight.data.copy_(weight)
        assert torch.equal(norm(x), expected)


def test_rotation_is_a_rotation_by_position():
    """Each pair (i, i + rotary/2) is rotated by position · theta^(−2i/rotary); the rest is unchanged."""
    x, positions = normal(1, 3, 2, 10), torch.tensor([[0, 7, 100_000]])
    y = rotation(positions, rotary_dim=4, theta=1e4, dtype=torch.float64)(x)
    for t, p in enumerate(positions[0].tolist()):
        for i in range(2):
            # fp32 angles, as in the training of the checkpoints: at position 100000 the error is about 3e-3.
            angle = float(torch.tensor(p, dtype=torch.float32) * (1.0 / 1e4 ** (torch.tensor(2 * i) / 4)))
            a, b = x[0, t, :, i], x[0, t, :, i + 2]
            torch.testing.assert_close(y[0, t, :, i], a * math.cos(angle) - b * math.sin(angle), rtol=0, atol=1e-6)
            torch.testing.assert_close(y[0, t, :, i + 2], b * math.cos(angle) + a * math.sin(angle), rtol=0, atol=1e-6)
    assert torch.equal(y[..., 4:], x[..., 4:])


def test_swiglu():
    mlp = SwiGLU(4, 6).double()
    x = normal(2, 4)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (5, 5), (1, 7), (3, 7)])
def test_attention_equals_a_loop(backend, t, s):
    """The queries are the last t of s tokens; two query heads share a key head."""
    q, k, v = normal(2, t, 4, 8), normal(2, s, 2, 8, seed=1), normal(2, s, 2, 8, seed=2)
    y = attend(q, k, v, backend=backend)
    for b in range(2):
        for h in range(4):
            for i in range(t):
                seen = s - t + i + 1
                scores = k[b, :seen, h // 2] @ q[b, i, h] / math.sqrt(8)
                torch.testing.assert_close(y[b, i, h], scores.softmax(0) @ v[b, :seen, h // 2])


@pytest.mark.parametrize("n", [1, 2, 40])
def test_experts_equal_a_loop_over_tokens(n):
    experts = Experts(16, 8, 6)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.3)
    torch.nn.init.normal_(experts.down_proj, std=0.3)
    results = []
    for backend in ("loop", "grouped", "auto"):
        experts.backend = backend
        experts.zero_grad()
        x = normal(n, 16, dtype=torch.float32).requires_grad_()
        weights = normal(n, 2, seed=1, dtype=torch.float32).softmax(-1).requires_grad_()
        indices = normal(n, 6, seed=2).topk(2).indices
        y = experts(x, weights, indices)
        (y * normal(n, 16, seed=3).float()).sum().backward()
        results.append((y, x.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad))
    for i in range(n):
        expected = 0
        for j, e in enumerate(indices[i].tolist()):
            gate, up = (experts.gate_up_proj[e] @ x[i]).chunk(2)
            expected = expected + weights[i, j] * (experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(results[0][0][i], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # one token without gradients uses a separate path
        torch.testing.assert_close(experts(x, weights, indices), results[0][0], rtol=1e-5, atol=1e-6)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_odd_widths(dtype):
    """Rows of no multiple of 16 bytes, which grouped_mm refuses: the fast kernels on a CPU, the loop elsewhere."""
    torch.manual_seed(0)
    experts = Experts(10, 7, 4).to(dtype)
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    x, weights, indices = torch.randn(9, 10, dtype=dtype), torch.rand(9, 2), torch.randint(4, (9, 2))
    found = []
    for backend in ("loop", "auto"):
        experts.backend, own = backend, x.clone().requires_grad_()
        y = experts(own, weights, indices)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), [own, *experts.parameters()])))
    for exact, other in zip(*found, strict=True):
        assert (exact - other).float().norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * exact.float().norm()
    assert backend_of_experts("auto", experts.down_proj) == "auto"
    assert backend_of_experts("auto", experts.down_proj.to("meta")) == "loop"


def moe(**changes):
    torch.manual_seed(0)
    layer = SparseMoE(
        16, **({"experts": 6, "top_k": 2, "intermediate_size": 8, "shared_intermediate_size": 12} | changes)
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_router_order(norm_topk_prob):
    """Softmax over all experts, then top-k; normalised only if norm_topk_prob is set."""
    layer, x = moe(norm_topk_prob=norm_topk_prob), normal(1, 3, 16)
    y, _ = layer(x)
    for t in range(3):
        p = (layer.router.weight @ x[0, t]).softmax(0)
        top = p.topk(2)
        weights = top.values / top.values.sum() if norm_topk_prob else top.values
        expected = torch.sigmoid(layer.shared_expert_gate.weight @ x[0, t]) * layer.shared_expert(x[0, t])
        for w, e in zip(weights, top.indices, strict=True):
            gate, up = (layer.experts.gate_up_proj[e] @ x[0, t]).chunk(2)
            expected = expected + w * (layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(y[0, t], expected)


def test_router_stats_leave_padding_out():
    layer, x = moe(), normal(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    _, stats = layer(x, mask=mask)
    _, alone = layer(x[mask][None])
    for a, b in zip(stats, alone, strict=True):
        torch.testing.assert_close(a, b)
    p = (x[mask] @ layer.router.weight.T).softmax(-1)
    share = torch.nn.functional.one_hot(p.topk(2).indices, 6).double().sum(1).mean(0)
    torch.testing.assert_close(stats.balance, 6 * (share * p.mean(0)).sum(), check_dtype=False)
    torch.testing.assert_close(stats.load, share.float() / 2)
    z = (x[mask] @ layer.router.weight.T).logsumexp(-1).square().mean()
    torch.testing.assert_close(stats.z, z, check_dtype=False)


def test_balance_is_top_k_when_even_and_grows_when_not():
    layer = moe()
    torch.nn.init.zeros_(layer.router.weight)
    assert layer(normal(1, 30, 16))[1].balance.item() == pytest.approx(2)
    layer.router.weight.data[:2] = 1.0
    assert layer(normal(1, 30, 16).abs())[1].balance.item() > 5.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: moe(top_k=7), "7 of 6 experts"),
        (lambda: GatedAttention(8, heads=3, kv_heads=2, head_dim=4), "cannot share"),
        (lambda: GatedDeltaNet(8, key_heads=2, value_heads=3, key_dim=4, value_dim=4), "cannot share"),
    ],
)
def test_contradicting_sizes_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_any_strides(dtype):
    """silu(gate) · up, rounded twice in bf16, for any memory layout and for tensors without rows."""
    whole = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = {
        "transposed": (whole.mT, whole.flip(0).mT),
        "every second": (whole[:, ::2], whole[:, 1::2]),
        "expanded": (whole[:1].expand(5, 64), whole[:5]),
        "three axes": (whole.view(4, 16, 64).transpose(0, 1), whole.view(16, 4, 64)),
        "one axis": (whole[0], whole[1]),
    }
    for name, (gate, up) in pairs.items():
        expected = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(activate(gate, up), expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("scale", [1, 2, 0, True, 1.5])
def test_a_scale_may_be_a_whole_number(backend, scale):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = x * scale / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(l2_normalise(x, scale=scale, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_logits_are_ordered_by_number(dtype):
    """Equal to a stable sort, with many ties, zeros of both signs, infinities and subnormal numbers."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (200, 33), generator=g).to(dtype) / 4
    logits[:, ::5] = 0.0
    logits[:, 1::7] = -0.0
    logits[::3, 2] = -torch.inf
    logits[::4, 30] = torch.inf
    logits[::5, 3] = torch.finfo(dtype).tiny / 4
    for k in (1, 4, 33):
        expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(top_experts(logits, k), expected)


def test_equal_experts_are_chosen_alike_whatever_runs():
    """A zero router chooses the first experts, for many tokens and for one, on every backend."""
    torch.manual_seed(0)
    layer = SparseMoE(16, experts=8, top_k=3, intermediate_size=8, shared_intermediate_size=8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.zeros_(layer.router.weight)
    x, seen = torch.randn(2, 5, 16), []
    layer.hook_router_indices.register_forward_hook(lambda module, args, indices: seen.append(indices))
    with torch.no_grad():
        for tokens in (x, x[:, :1], x[:1, :1]):
            layer(tokens)
    for indices in seen:
        assert torch.equal(indices, torch.arange(3).expand_as(indices))
