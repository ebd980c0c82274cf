"""The gated delta rule against an oracle in numpy, and its implementations against each other."""

import numpy as np
import pytest
import torch

from layers.delta_rule import gated_delta_rule
from layers.kernels import chunked_recompute as piecewise_delta_rule
from layers.norm import l2_normalise
from layers.segments import Segments
from layers.variants.simple_gla import simple_gla

pytestmark = pytest.mark.oracle


def inputs(t, *, b=2, key_heads=2, heads=4, k=16, v=24, dtype=torch.float64, seed=0, state=True):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "q": (l2_normalise(normal(b, t, key_heads, k)) * k**-0.5).to(dtype),
        "k": l2_normalise(normal(b, t, key_heads, k)).to(dtype),
        "v": normal(b, t, heads, v).to(dtype),
        "log_decay": -normal(b, t, heads).exp().to(dtype),
        "beta": normal(b, t, heads).sigmoid().to(dtype),
        "state": normal(b, heads, k, v).to(dtype) if state else None,
    }


def oracle(q, k, v, log_decay, beta, state):
    """The recurrence in the paper's form, one head and one token at a time, in numpy."""
    q, k, v, log_decay, beta, state = (x.numpy() for x in (q, k, v, log_decay, beta, state))
    b, t, heads, width = v.shape
    out, final = np.zeros((b, t, heads, width)), state.copy()
    for i in range(b):
        for h in range(heads):
            kh, memory = h * k.shape[2] // heads, state[i, h].copy()
            for s in range(t):
                key, alpha, strength = k[i, s, kh], np.exp(log_decay[i, s, h]), beta[i, s, h]
                # arXiv:2412.06464 eq. 10 transposed: S ← S αᵗ(I − β k kᵀ) + β v kᵀ
                memory = alpha * (np.eye(len(key)) - strength * np.outer(key, key)) @ memory
                memory = memory + strength * np.outer(key, v[i, s, h])
                out[i, s, h] = memory.T @ q[i, s, kh]
            final[i, h] = memory
    return torch.from_numpy(out), torch.from_numpy(final)


BACKENDS = ["recurrent", "chunked", "chunked_recompute"]


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of one chunk, so that small inputs have several pieces."""
    monkeypatch.setattr(piecewise_delta_rule, "AT_ONCE", 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 130])
def test_equals_the_papers_recurrence(t, backend):
    x = inputs(t)
    o, state = gated_delta_rule(**x, backend=backend)
    expected, final = oracle(**x)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1, 63, 64, 65, 200])  # around the chunk size of 64
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "chunked_recompute"])
def test_gradients_equal_recurrent(t, packed, backend, short_pieces):
    """Output, final state and all six gradients, from a non-zero state, in float64, with one and several sequences."""
    ids = (torch.rand(2, t, generator=torch.Generator().manual_seed(1)) < 0.05).cumsum(1)
    ids[0, : t // 9] = -1  # padding
    segments = Segments.from_document_ids(ids) if packed else None
    results = []
    for name in ("recurrent", backend):
        x = {name: value.requires_grad_() for name, value in inputs(t).items()}
        o, state = gated_delta_rule(**x, segments=segments, backend=name)
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype)
        ((o * weights).sum() + (state**2).sum()).backward()
        results.append((o, state, *(value.grad for value in x.values())))
    for recurrent, other in zip(*results, strict=True):
        torch.testing.assert_close(other, recurrent, rtol=1e-10, atol=1e-11)


def test_a_piece_more_or_less_changes_nothing(monkeypatch):
    """The size of pieces does not change a bit of output, state and gradients, in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for at_once in (1, 16, 64):
            monkeypatch.setattr(piecewise_delta_rule, "AT_ONCE", at_once)
            x = {name: value.requires_grad_() for name, value in inputs(300, dtype=dtype).items()}
            o, state = gated_delta_rule(**x, backend="chunked_recompute")
            (o.float().square().sum() + state.sum()).backward()
            results.append((o, state, *(value.grad for value in x.values())))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True)), dtype


def test_products_in_bf16_are_exact_to_bf16(short_pieces):
    """Relative rms error of output, state and gradients against the token loop in float64 on the same rounded inputs.

    bf16 has 8 bits, so a rounding is at most 2e-3 rms; about four of them follow each other.
    """
    rounded = inputs(300, dtype=torch.bfloat16)
    results = []
    for backend, dtype in (("recurrent", torch.float64), ("chunked_recompute", torch.bfloat16)):
        x = {name: value.to(dtype).requires_grad_() for name, value in rounded.items()}
        o, state = gated_delta_rule(**x, backend=backend)
        assert (o.dtype, state.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
        (o.double().square().sum() + state.double().square().sum()).backward()
        results.append((o, state, *(value.grad for value in x.values())))
    for exact, got in zip(*results, strict=True):
        assert (got.double() - exact).norm() < 8e-3 * exact.norm()


def test_chunks_in_fp32_are_as_exact_as_the_loop():
    x32 = inputs(300, dtype=torch.float32)
    exact, _ = gated_delta_rule(**{n: v.double() for n, v in x32.items()}, backend="recurrent")
    for backend in BACKENDS:
        o, state = gated_delta_rule(**x32, backend=backend)
        assert o.dtype == state.dtype == torch.float32
        assert (o - exact).abs().max() < 2e-6  # values of order 1, 1e-7 per rounding


@pytest.mark.parametrize("backend", ["chunked", "chunked_recompute"])
def test_identical_keys_do_not_blow_up(backend):
    """64 equal keys give the worst triangular system; a series for its inverse would overflow."""
    x = inputs(128, dtype=torch.float32, state=False)
    x["k"] = x["k"][:, :1].expand(-1, 128, -1, -1)
    x["beta"], x["log_decay"] = torch.ones_like(x["beta"]), torch.zeros_like(x["log_decay"])
    o, _ = gated_delta_rule(**x, backend=backend)
    expected, _ = gated_delta_rule(**x, backend="recurrent")
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["chunked", "chunked_recompute"])
def test_strong_decay_stays_finite_with_gradients(backend):
    """exp of the upper half of the decay matrix overflows unless masked before the exponential."""
    x = {n: v if v is None else v.float().requires_grad_() for n, v in inputs(130, state=False).items()}
    x["log_decay"] = torch.full((2, 130, 4), -40.0, requires_grad=True)
    o, state = gated_delta_rule(**x, backend=backend)
    (o.sum() + state.sum()).backward()
    assert all(torch.isfinite(v.grad).all() for v in x.values() if v is not None)


def test_state_in_two_steps_equals_one():
    x = inputs(150)
    whole, final = gated_delta_rule(**x)
    first = {n: v[:, :70] if n != "state" else v for n, v in x.items()}
    second = {n: v[:, 70:] for n, v in x.items() if n != "state"}
    a, middle = gated_delta_rule(**first)
    b, last = gated_delta_rule(**second, state=middle)
    torch.testing.assert_close(torch.cat((a, b), 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate_and_padding_writes_nothing(backend, short_pieces):
    x = inputs(100, b=1)
    segments = Segments.from_document_ids(torch.tensor([[-1] * 5 + [0] * 20 + [1] * 3 + [2] * 65 + [-1] * 7]))
    o, state = gated_delta_rule(**x, segments=segments, backend=backend)
    parts = ((5, 25, x["state"]), (25, 28, None), (28, 93, None))
    for begin, end, before in parts:
        alone = {n: v[:, begin:end] for n, v in x.items() if n != "state"}
        expected, final = gated_delta_rule(**alone, state=before, backend="recurrent")
        torch.testing.assert_close(o[:, begin:end], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [gated_delta_rule, simple_gla])
@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_packed_sequences_go_on_from_a_state_each(rule, backend):
    """Also one of a single token, and one without tokens in this call, which keeps its state."""
    x, states = inputs(80, b=2), torch.randn(5, 4, 16, 24, dtype=torch.float64)
    segments = Segments.from_lengths([[70, 1], [40, 30, 10]]).part(0, 70)
    x = {name: tensor[:, :70] for name, tensor in x.items() if name != "state"}
    o, after = rule(**x, state=states, segments=segments, backend=backend)
    for n, row, begin, end in ((0, 0, 0, 70), (2, 1, 0, 40), (3, 1, 40, 70)):
        alone = {name: tensor[row : row + 1, begin:end] for name, tensor in x.items()}
        expected, final = rule(**alone, state=states[n : n + 1], backend="recurrent")
        torch.testing.assert_close(o[row : row + 1, begin:end], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(after[n : n + 1], final, rtol=0, atol=1e-12)
    assert torch.equal(after[[1, 4]], states[[1, 4]])


def test_the_given_state_is_not_modified():
    x = inputs(10)
    before = x["state"].clone()
    gated_delta_rule(**x)
    assert torch.equal(x["state"], before)


def test_bad_input_is_refused():
    x = inputs(4)
    three_heads = {name: x[name][:, :, :3] for name in ("v", "beta", "log_decay")} | {"state": None}
    with pytest.raises(ValueError, match="multiple"):
        gated_delta_rule(**(x | three_heads))
    with pytest.raises(ValueError, match="no backend 'fast'"):
        gated_delta_rule(**x, backend="fast")
    with pytest.raises(RuntimeError, match="cannot run here"):
        gated_delta_rule(**x, backend="fla")
