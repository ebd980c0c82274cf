"""The backends of cross-entropy against the definition, which holds all logits."""

import pytest
import torch

from layers.cross_entropy import linear_cross_entropy
from layers.dispatch.registry import definition_of, function_of


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])  # around the 256 rows that are taken at a time
@pytest.mark.parametrize("products", ["torch", "auto"])
def test_rows_at_a_time_equal_the_whole(n, products, monkeypatch):
    """fp64: sums of n terms of order 1 in another order."""
    monkeypatch.setattr("layers.kernels.cross_entropy.LOGITS", 1)
    g = torch.Generator().manual_seed(n)
    hidden, weight = (torch.randn(rows, 48, generator=g, dtype=torch.float64) for rows in (n, 97))
    target = torch.randint(97, (n,), generator=g)
    whole = function_of("cross_entropy", definition_of("cross_entropy"))
    found = []
    for sum_of in (linear_cross_entropy, whole):
        x = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = sum_of(*x, target, linear_backend=products)
        found.append((loss, *torch.autograd.grad(loss, x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
