"""RoPE at long positions against arithmetic of 50 digits."""

from decimal import Decimal, localcontext

import pytest
import torch

from layers.rope import Yarn, inverse_frequencies, rotation

pytestmark = pytest.mark.oracle

POSITIONS = [0, 1, 300, 32_767, 262_143, 1_000_000, 1_048_575, 2**24, 2**24 + 1]
DIM = 64
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def cosine(x: Decimal) -> Decimal:
    """The cosine by its series, of an angle reduced modulo 2π."""
    x, term, total, n = x % (2 * PI), Decimal(1), Decimal(1), 0
    while abs(term) > Decimal("1e-40"):
        n += 2
        term *= -x * x / (n * (n - 1))
        total += term
    return total


def exact(theta, share=None, factor=1):
    """cos at POSITIONS (rows) of each frequency f; with `share` s, f is replaced by s f / factor + (1 − s) f."""
    rows = []
    with localcontext() as context:
        context.prec = 60
        frequencies = [Decimal(theta) ** (Decimal(-2 * i) / DIM) for i in range(DIM // 2)]
        if share is not None:
            frequencies = [f / factor * s + f * (1 - s) for f, s in zip(frequencies, share, strict=True)]
        for p in POSITIONS:
            rows.append([float(cosine(p * f)) for f in frequencies])
            rows[-1] += [float(cosine(p * f - PI / 2)) for f in frequencies]  # the sine
    return torch.tensor(rows, dtype=torch.float64)


def turns(theta, dtype, yarn=None):
    found = rotation(torch.tensor([POSITIONS]), rotary_dim=DIM, theta=theta, dtype=dtype, yarn=yarn)
    halves = [x[0, :, 0] for x in found]
    assert all(torch.equal(*x.chunk(2, dim=-1)) for x in halves)
    return torch.cat([x.chunk(2, dim=-1)[0] for x in halves], dim=-1)


@pytest.mark.parametrize("theta", [1e4, 1e6, 1e7])
def test_exact_to_fp32_rounding(theta):
    want = exact(theta)
    assert (turns(theta, torch.float32) - want).abs().max() <= 2**-25 * 1.01  # half a step of fp32 below 1
    assert (turns(theta, torch.float64) - want).abs().max() < 1e-8  # 2²⁴ times the rounding of a frequency in fp64
    assert (turns(theta, torch.bfloat16) - want).abs().max() <= 2**-9 * 1.01


def test_yarn_likewise():
    yarn = Yarn(factor=4.0, original_max_position_embeddings=262_144)
    share = [Decimal(s) for s in yarn.stretched(DIM, 1e7).tolist()]
    want = exact(1e7, share, 4) * yarn.magnitude
    assert (turns(1e7, torch.float32, yarn) - want).abs().max() <= 2**-24 * 1.01  # beyond 1 the step is twice as large


def test_neighbours_at_long_positions_are_told_apart():
    a, b = turns(1e7, torch.float32)[-2:]
    assert (a - b).abs().max() > 0.5  # the angles differ by a radian at the highest frequency


def test_frequencies_are_not_rounded_to_fp32():
    assert inverse_frequencies(DIM, 1e7).dtype == torch.float64
