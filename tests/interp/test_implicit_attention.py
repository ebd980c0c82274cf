"""Gated DeltaNet as a matrix and as a ledger, against the closed formula and the token loop, in fp64."""

import pytest
import torch
from test_delta_rule import inputs

from layers.delta_rule import gated_delta_rule
from layers.interp import implicit_attention as seen
from layers.segments import Segments

pytestmark = pytest.mark.oracle

LENGTHS = [1, 2, 63, 64, 65, 150]  # around the chunk size of 64


def packed(t, seed=1):
    """Two rows of several sequences with padding before, between and after them."""
    g = torch.Generator().manual_seed(seed)
    ids = (torch.rand(2, t, generator=g) < 0.08).cumsum(1)
    ids[:, t // 2 : t // 2 + 3] = -1
    ids[:, t // 2 + 3 :] += 1
    ids[1, : t // 5] = -1
    ids[0, t - t // 7 :] = -1
    return Segments.from_document_ids(ids)


def layout(t, kind):
    return {"plain": None, "packed": packed(t)}[kind]


def formula(q, k, log_decay, beta):
    """A = ((QKᵀ)⊙D) (I + tril(diag(β)(KKᵀ⊙D), −1))⁻¹ diag(β), implemented independently."""
    share = beta.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(share, dim=2).transpose(1, 2) for x in (q, k))
    total, beta = log_decay.transpose(1, 2).cumsum(-1), beta.transpose(1, 2)
    d = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    system = torch.eye(d.shape[-1], dtype=d.dtype) + (beta[..., None] * (k @ k.mT) * d).tril(-1)
    return (q @ k.mT * d) @ torch.linalg.inv(system) * beta[..., None, :]


def token_loop(k, v, log_decay, beta, state, segments):
    """The recalled and the written value of each token, and the state after it, by the definition."""
    share = v.shape[2] // k.shape[2]
    keys, answers, writes, states = k.repeat_interleave(share, dim=2), [], [], []
    for t in range(v.shape[1]):
        real = torch.ones(len(v)) if segments is None else segments.mask[:, t].to(v)
        if segments is not None:
            state = state * (~segments.resets[:, t]).to(v)[:, None, None, None]
        state = state * (log_decay[:, t] * real[:, None]).exp()[..., None, None]
        answer = torch.einsum("bhkv,bhk->bhv", state, keys[:, t]) * real[:, None, None]
        u = beta[:, t, :, None] * (v[:, t] - answer) * real[:, None, None]
        state = state + keys[:, t, ..., None] * u[..., None, :]
        answers.append(answer), writes.append(u), states.append(state)
    return (torch.stack(x, dim=1) for x in (answers, writes, states))


@pytest.fixture
def narrow(monkeypatch):
    """Small blocks, so that these lengths cross block boundaries."""
    monkeypatch.setattr(seen, "COLUMNS", 50)
    monkeypatch.setattr(seen, "PIECE", 70)


@pytest.mark.parametrize("t", LENGTHS)
def test_the_matrix_is_the_closed_formula(t, narrow):
    x = inputs(t, state=False)
    x = {name: x[name] for name in ("q", "k", "log_decay", "beta")}
    a = seen.implicit_attention(**x)
    assert a.shape == (2, 4, t, t)
    assert not a.triu(1).any()  # exactly zero
    torch.testing.assert_close(a, formula(**x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_output_is_a_v_plus_c_s0(t, kind, narrow):
    x, segments = inputs(t), layout(t, kind)
    o, _ = gated_delta_rule(**x, segments=segments, backend="recurrent")
    v, state = x.pop("v"), x.pop("state")
    a, c = seen.implicit_attention(**x, segments=segments), seen.carried(**x, segments=segments)
    again = a @ v.transpose(1, 2) + c @ state
    torch.testing.assert_close(again.transpose(1, 2), o, rtol=0, atol=1e-12)
    if segments is not None:
        across = segments.segment_ids[:, :, None] != segments.segment_ids[:, None, :]
        across |= ~segments.mask[:, None, :]
        real = across & segments.mask[:, :, None]
        assert not a.masked_select(real[:, None]).any()  # exactly no edge between sequences, none from padding


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_recalled_and_written_equal_the_token_loop(t, kind, narrow):
    x, segments = inputs(t), layout(t, kind)
    del x["q"]
    x["beta"][:, ::3] = 0.0  # nothing is written, yet something is recalled
    answers, writes, _ = token_loop(**x, segments=segments)
    torch.testing.assert_close(seen.recalled(**x, segments=segments), answers, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.written(**x, segments=segments), writes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_states_at_chosen_places_equal_the_token_loop(kind, narrow):
    x, segments = inputs(200), layout(200, kind)
    del x["q"]
    *_, states = token_loop(**x, segments=segments)
    places = [150, 0, 1, 69, 70, 71, 199, 70]
    torch.testing.assert_close(
        seen.states_at(**x, positions=places, segments=segments), states[:, places], rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match="0 to 199"):
        seen.states_at(**x, positions=[200])


def test_every_state_follows_from_what_was_written():
    x = inputs(150)
    del x["q"]
    *_, states = token_loop(**x, segments=None)
    u, keys = seen.written(**x), x["k"].repeat_interleave(2, dim=2)
    total = x["log_decay"].cumsum(1)
    for t in (0, 77, 149):
        weights = (total[:, t, None] - total[:, : t + 1]).exp()
        state = torch.einsum("bshk,bshv,bsh->bhkv", keys[:, : t + 1], u[:, : t + 1], weights)
        state = state + total[:, t].exp()[..., None, None] * x["state"]
        torch.testing.assert_close(state, states[:, t], rtol=0, atol=1e-12)


def test_gradients_equal_the_formulas_and_the_loops(narrow):
    x = {name: value.requires_grad_() for name, value in inputs(150).items()}
    names = ("q", "k", "log_decay", "beta")
    weights = torch.randn(2, 4, 150, 150, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = [
        torch.autograd.grad((f(**{n: x[n] for n in names}) * weights).sum(), [x[n] for n in names])
        for f in (seen.implicit_attention, formula)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-11)
    del x["q"]
    _, writes, _ = token_loop(**x, segments=None)
    weights = weights[..., :24].transpose(1, 2)
    expected = torch.autograd.grad((writes * weights).sum(), list(x.values()))
    torch.testing.assert_close(
        torch.autograd.grad((seen.written(**x) * weights).sum(), list(x.values())), expected, rtol=1e-10, atol=1e-11
    )


def test_fast_forgetting_over_many_tokens_stays_finite_and_exact():
    """A running sum of −20 a token reaches −10 000: exp of it is 0, exp of its negative infinite."""
    x = inputs(500, b=1, key_heads=1, heads=1, k=8, v=4, dtype=torch.float32, state=False)
    x["log_decay"] = x["log_decay"].fill_(-20.0)
    x["log_decay"][:, ::2] = -1e-3
    o, _ = gated_delta_rule(**x, backend="recurrent")
    a = seen.implicit_attention(**{n: x[n] for n in ("q", "k", "log_decay", "beta")})
    # fp32: sums within a chunk reach 640, so a decay is known to 640 · 6e-8; over all tokens it would be 3e-4.
    torch.testing.assert_close((a @ x["v"].transpose(1, 2)).transpose(1, 2), o, rtol=0, atol=4e-5)
