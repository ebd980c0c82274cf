"""The causal convolution against a double loop."""

import pytest
import torch
import torch.nn.functional as F

from layers.causal_conv import causal_conv
from layers.cpp.build import missing
from layers.segments import Segments

pytestmark = pytest.mark.oracle


def oracle(x, weight, state):
    """Token by token over (state ‖ x), one sequence."""
    history = torch.cat((state, x))
    taps = weight.shape[1]
    rows = [sum(weight[:, j] * history[t + j] for j in range(taps)) for t in range(len(x))]
    return F.silu(torch.stack(rows)), history[len(history) - taps + 1 :]


def draw(t, b=1, d=6, taps=4):
    g = torch.Generator().manual_seed(t)
    return (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((b, t, d), (d, taps), (b, taps - 1, d)))


@pytest.mark.parametrize("t", [1, 2, 3, 4, 9])
def test_equals_the_loop(t):
    x, weight, state = draw(t, b=2)
    y, after = causal_conv(x, weight, state=state)
    for r in range(2):
        expected, final = oracle(x[r], weight, state[r])
        torch.testing.assert_close(y[r], expected)
        assert torch.equal(after[r], final)


@pytest.mark.parametrize("left", [0, 1, 5])
@pytest.mark.parametrize("lengths", [[6], [1, 2, 6], [4, 1], [3, 3]])
def test_packed_and_padded_equal_separate(lengths, left):
    total = left + sum(lengths) + 2
    x, weight, state = draw(total)
    x.requires_grad_()
    ids = [-1] * left + [n for n, k in enumerate(lengths) for _ in range(k)] + [-1] * 2
    y, after = causal_conv(x, weight, state=state, segments=Segments.from_document_ids(torch.tensor([ids])))
    begin, before = left, state[0]
    for n in lengths:
        expected, final = oracle(x[0, begin : begin + n], weight, before)
        torch.testing.assert_close(y[0, begin : begin + n], expected)
        (got,) = torch.autograd.grad(y[0, begin : begin + n].square().sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
        torch.testing.assert_close(got, wanted)
        begin, before = begin + n, torch.zeros_like(before)
    torch.testing.assert_close(after[0], final)


def test_packed_sequences_go_on_from_a_state_each():
    x, weight, _ = draw(12)
    states = torch.randn(3, 3, 6, dtype=torch.float64)
    y, after = causal_conv(x, weight, state=states, segments=Segments.from_lengths([[7, 1, 4]]))
    for n, (begin, end) in enumerate(((0, 7), (7, 8), (8, 12))):
        expected, final = oracle(x[0, begin:end], weight, states[n])
        torch.testing.assert_close(y[0, begin:end], expected)
        assert torch.equal(after[n], final)


def test_row_of_padding_keeps_its_state():
    x, weight, state = draw(4)
    _, after = causal_conv(x, weight, state=state, segments=Segments.from_mask(torch.zeros(1, 4)))
    assert torch.equal(after, state)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 8, 9, 16, 33])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_any_number_of_taps(taps, backend):
    """Values, state and all gradients, for fewer and more tokens than the kernel size; fp32 sums of <= 33 products."""
    if backend == "cpp" and missing():
        pytest.skip(missing())
    for t in (1, 2, 40):
        x, weight, state = (x.float().requires_grad_() for x in draw(t, b=2, taps=taps))
        y, after = causal_conv(x, weight, state=state, backend=backend)
        expected = [oracle(x[r], weight, state[r]) for r in range(2)]
        wanted = torch.stack([e[0] for e in expected])
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(after, torch.stack([e[1] for e in expected]))
        given = (x, weight) if taps == 1 else (x, weight, state)  # there is no state to differentiate
        got = torch.autograd.grad(y.square().sum(), given)
        for a, b in zip(got, torch.autograd.grad(wanted.square().sum(), given), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_by_itself_is_rounded_as_inside_a_prompt(dtype):
    """To the bit, also where it begins a packed sequence: products and sums in fp32, then one cast."""
    x, weight, state = (part.to(dtype) for part in draw(5, d=64))
    whole, _ = causal_conv(x, weight, state=state, backend="torch")
    for t in range(5):
        y, state = causal_conv(x[:, t : t + 1], weight, state=state, backend="torch")
        assert torch.equal(y[:, 0], whole[:, t])
    packed = Segments.from_document_ids(torch.tensor([[0, 0, 1, 1, 1]]))
    both, _ = causal_conv(x, weight, segments=packed, backend="torch")
    alone = torch.cat([causal_conv(part, weight, backend="torch")[0] for part in x.split((2, 3), dim=1)], dim=1)
    assert torch.equal(both, alone)
