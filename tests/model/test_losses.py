"""Losses as sums, the logits' z loss, and MTP losses at several depths against drafts of a cache."""

import pytest
import torch
import torch.nn.functional as F

import qwen3next as q
from layers.cross_entropy import linear_cross_entropy_and_z
from layers.dispatch.registry import definition_of, function_of
from layers.segments import Segments
from qwen3next.losses import sum_of
from qwen3next.mtp_depths import drafted_states


def tiny(**changes) -> q.Qwen3Next:
    torch.manual_seed(0)
    return q.Qwen3Next(q.presets.tiny(initializer_range=0.1, **changes)).double()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(1))


# ---- sums of a whole batch from those of its parts


def test_counts_travel_as_one_vector():
    """As an all-reduce would send them: the vectors of two parts, added, are the counts of both."""
    model, rows = tiny(), ids(2, 20)
    parts = [model.loss_counts(row[None], mtp_depths=2) for row in rows]
    both = model.loss_counts(rows, mtp_depths=2)
    for total in (parts[0].like(parts[0].vector() + parts[1].vector()), sum_of(parts)):
        assert torch.equal(total.targets, both.targets)
        assert torch.equal(total.choices, both.choices)
        assert torch.equal(total.tokens, both.tokens)
    assert both.targets.tolist() == [38, 36, 34]
    assert both.tokens.tolist() == [40] * 4 + [38 + 36]
    assert torch.equal(both.choices.sum(-1), 2 * both.tokens)
    with pytest.raises(ValueError, match="no parts"):
        sum_of([])


def test_counts_are_those_of_the_losses():
    """With gradients or without, and with labels and documents; in a dense model there are only targets."""
    rows = ids(2, 20)
    labels = rows.clone()
    labels[0, 5:9] = -100
    segments = Segments.from_lengths([[12, 8], [15]])
    for model in (tiny(), tiny(num_experts=0), tiny(mtp_num_hidden_layers=0)):
        sums = model.loss_sums(rows[:, :20], segments=segments, labels=labels)
        counts = model.loss_counts(rows[:, :20], segments=segments, labels=labels)
        assert torch.equal(sums.counts.vector(), counts.vector())
        assert sums.targets == counts.targets[0]
        assert not sums.counts.vector().requires_grad


# ---- z loss of the logits


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_z_loss_against_the_definition(rows, monkeypatch):
    monkeypatch.setattr("layers.kernels.cross_entropy.LOGITS", 1)  # several pieces
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    weight, target = torch.randn(50, 16, generator=generator, dtype=torch.float64), torch.arange(rows) % 50
    found = []
    definition = function_of("cross_entropy.z", definition_of("cross_entropy"))
    for of in (linear_cross_entropy_and_z, definition):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, squared = of(x, w, target, z_loss=0.3)
        (2 * loss).backward()
        assert not squared.requires_grad
        found.append((loss, squared, x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hooked", [False, True])
def test_z_loss_in_the_model(hooked):
    """The total is lm + c · mean logsumexp²; lm is what it is without."""
    model, rows = tiny(logit_z_loss_coef=0.25, router_aux_loss_coef=0.0, mtp_num_hidden_layers=0), ids(2, 9)
    if hooked:  # then all logits are made
        model.hook_logits.register_forward_hook(lambda *_: None)
    logits = model(rows).logits[:, :-1].flatten(0, 1)
    lm, z = F.cross_entropy(logits, rows[:, 1:].flatten()), logits.logsumexp(-1).square().mean()
    losses = model.loss(rows)
    torch.testing.assert_close(losses.lm, lm)
    torch.testing.assert_close(losses.logit_z, z)
    torch.testing.assert_close(losses.total, lm + 0.25 * z)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(x, list(model.parameters())) for x in (losses.total, lm + 0.25 * z))
    for name, a, b in zip(names, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


# ---- MTP losses at several depths


def test_depths_are_those_of_decoding():
    """The logits of depth d behind every token equal those of the d-th draft from a cache, if the text is drafted."""
    model, row = tiny(), ids(1, 14)
    with torch.no_grad():
        hidden, _, segments = model.hidden_states(row, None, None, stats=False)
        states, _ = drafted_states(model, hidden, row, segments, 3)
        got = [model.lm_head(x) for x in states]
        for t in range(11):
            cache = model.new_cache(1, 20, mtp=True)
            model(row[:, : t + 1], cache=cache)
            state, before = cache.mtp.share(t), cache.hidden[:, None]
            for depth in range(3):  # as `_drafted`, with the text's tokens in the place of the most likely ones
                token = row[:, t + 1 + depth]
                turn = Segments.full(token[:, None]).after([t + depth])
                rope = model._rotation(turn.positions, before.dtype)
                before, _ = model.mtp(before, model.embed_tokens(token[:, None]), rope, turn, state)
                torch.testing.assert_close(got[depth][0, t], model.lm_head(before)[0, 0], rtol=1e-9, atol=1e-9)


def test_depths_of_packed_documents():
    """Packed equals separate, in losses and gradients, at three depths; a document of two tokens has no third."""
    model, lengths = tiny(router_aux_loss_coef=0.0), [13, 2, 9, 1]
    rows = ids(1, sum(lengths))
    packed = model.loss_sums(rows, segments=Segments.from_lengths([lengths]), mtp_depths=3)
    apart = [model.loss_sums(part, mtp_depths=3) for part in rows.split(lengths, dim=1)]
    assert packed.counts.targets.tolist() == [21, 18, 16, 14]
    for depth in range(3):
        torch.testing.assert_close(packed.mtp[depth], sum(x.mtp[depth] for x in apart))
    got = torch.autograd.grad(sum(packed.mtp), model.mtp.fc.weight)
    expected = torch.autograd.grad(sum(sum(x.mtp) for x in apart), model.mtp.fc.weight)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_one_depth_is_the_plain_loss():
    """The first of three depths by masks equals the only one, which takes the faster path."""
    model, rows = tiny(), ids(2, 20)
    one, three = model.loss_sums(rows), model.loss_sums(rows, mtp_depths=3)
    torch.testing.assert_close(three.mtp[0], one.mtp[0])
    losses = three.losses(model.config)
    torch.testing.assert_close(losses.mtp, sum(x / n for x, n in zip(three.mtp, (36, 34, 32), strict=True)) / 3)


def test_depths_that_cannot_be():
    model = tiny()
    with pytest.raises(ValueError, match="mtp_depths is 0"):
        model.loss(ids(1, 5), mtp_depths=0)
    model.set_backend("attention", "eager")
    with pytest.raises(ValueError, match='backend "auto"'):
        model.loss(ids(1, 5), mtp_depths=2)
