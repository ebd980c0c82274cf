"""Muon against torch's, which parameters it trains, the average of weights, spikes, counted operations."""

import pytest
import torch
from torch import nn

import qwen3next as q
from recipes.training.flops import forward_flops, training_flops
from recipes.training.muon import Muon, matrices, orthogonalised
from recipes.training.optimizers import WeightAverage, gradient_norms, optimizers
from recipes.training.settings import Settings
from recipes.training.skips import REMEMBERED, is_spike


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_muon_is_torchs_on_one_matrix(shape):
    """Three steps with decay, to the bit, in the bf16 that torch's uses; torch's is given the same scale."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    with torch.no_grad():
        ours.copy_(torch.randn(shape))
        theirs.copy_(ours)
    one = Muon([{"params": [ours]}], lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        one.step()
        two.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_experts_and_projections_are_single_matrices():
    """A stack, and rows of several projections, step as the matrices would by themselves."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 10, 8))
    gradient = torch.randn(3, 10, 8)
    parts = [nn.Parameter(piece.clone()) for one in stack.detach() for piece in one.split((4, 6))]
    for part, g in zip(parts, (piece for one in gradient for piece in one.split((4, 6))), strict=True):
        part.grad = g.clone()
    stack.grad = gradient
    Muon([{"params": [stack], "rows": (4, 6)}], lr=0.1, dtype=torch.float32).step()
    Muon([{"params": parts}], lr=0.1, dtype=torch.float32).step()
    torch.testing.assert_close(torch.cat([*parts]).view(3, 10, 8), stack)
    with pytest.raises(ValueError, match="give it to AdamW"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))]}], lr=0.1)


def test_orthogonalised():
    """Singular values come near 1, in their directions."""
    torch.manual_seed(0)
    x = torch.randn(5, 7, 12)
    y = orthogonalised(x, dtype=torch.float32)
    assert torch.linalg.svdvals(y).sub(1).abs().max() < 0.5
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert (y - u @ v).norm() / y.norm() < 0.3


def test_what_muon_trains():
    model = q.Qwen3Next(q.presets.tiny(tie_word_embeddings=False))
    name_of = {id(p): name for name, p in model.named_parameters()}
    rows = {name_of[id(p)]: split for p, split in matrices(model).items()}
    assert rows["blocks.0.linear_attn.in_proj_qkv.weight"] == (64, 64, 128)
    assert rows["blocks.0.mlp.experts.gate_up_proj"] == (128, 128)
    assert rows["blocks.3.self_attn.q_proj.weight"] == rows["mtp.fc.weight"] == ()
    kinds = ("router", "embed_tokens", "lm_head", "conv_weight", "shared_expert_gate", "norm", "A_log", "dt_bias")
    left = [name for name in name_of.values() if name not in rows]
    assert all(any(kind in name for kind in kinds) for name in left), left
    assert not [name for name in rows if any(kind in name for kind in kinds)]
    adam, muon = optimizers(model, Settings(optimizer="muon"))
    trained = [id(p) for o in (adam, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(trained) == sorted(name_of)
    assert len(optimizers(model, Settings())) == 1


def test_the_average_of_weights():
    model = nn.Linear(2, 2)
    average, expected = WeightAverage(model, 0.5), model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.add_(1)
        average.update(model, step)
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.tensors["weight"], expected)
    before = model.weight.detach().clone()
    average.exchange(model)
    torch.testing.assert_close(model.weight.detach(), expected)
    average.exchange(model)
    assert torch.equal(model.weight.detach(), before)


def test_spikes():
    usual = [1.0 + 0.01 * (i % 5) for i in range(REMEMBERED)]
    assert is_spike(2.0, usual, 6.0)
    assert not is_spike(1.05, usual, 6.0)
    assert not is_spike(0.0, usual, 6.0)  # a low loss is none
    assert not is_spike(2.0, usual[: REMEMBERED // 2 - 1], 6.0)
    assert not is_spike(2.0, usual, 0.0)


def test_norms_of_kinds_are_the_whole():
    torch.manual_seed(0)
    model = q.Qwen3Next(q.presets.tiny())
    model.loss(torch.randint(0, 256, (1, 20))).total.backward()
    norms = gradient_norms(model)
    whole = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert sum(x * x for x in norms.values()) ** 0.5 == pytest.approx(whole, rel=1e-5)
    assert {"embed_tokens", "linear_attn", "self_attn", "router", "experts", "shared_expert", "norm", "mtp"} == set(
        norms
    )


def test_counted_operations_of_products():
    """Where every weight is used by every token, 2 operations a weight; attention adds 2 · width · span."""
    config = q.presets.tiny(
        num_experts=0, full_attention_interval=1, mtp_num_hidden_layers=0, tie_word_embeddings=False
    )
    model = q.Qwen3Next(config)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    parts = forward_flops(config, 100)
    assert sum(parts.values()) == 2 * weights + 4 * 2 * 128 * 100
    assert training_flops(config, 100) == 3 * sum(parts.values())
    hybrid = q.presets.tiny(num_experts=0, mtp_num_hidden_layers=0)
    weights = sum(
        m.weight.numel() for m in q.Qwen3Next(hybrid).blocks[0].linear_attn.modules() if isinstance(m, nn.Linear)
    )
    linear = forward_flops(hybrid, 100)["linear_attention"] / 3
    assert 2 * weights < linear < 6 * weights  # at this width the rule is as large as the products
