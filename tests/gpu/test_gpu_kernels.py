"""On a CUDA device: every implementation against its definition in fp64, values and gradients.

Comparisons come from recipes/measure/gpu_parity.py, and from the cases that kernels are registered with: a kernel that
registers a case (`checked_by`) is tested here without a line of its own. What needs more has a file beside this one.
"""

import pytest
import torch

from layers.dispatch.registry import checked_implementations
from layers.dispatch.self_check import failed
from recipes.measure.gpu_parity import LENGTHS, comparisons, unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.oracle,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda c: c.name)
def test_values_and_gradients(comparison):
    """Relative errors in the norm below the self-check's bounds: 1% in fp32 (products in tf32), 5% in bf16."""
    rows = list(comparison.rows(CUDA, LENGTHS))
    if reasons := [row["not run"] for row in rows if "not run" in row]:
        pytest.skip(reasons[0])
    assert rows
    assert [row for row in rows if not row.get("within")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operation, name", checked_implementations())
def test_registered_cases(operation, name, dtype):
    """Without gradients, which some kernels do not have."""
    if reason := unavailable(operation, name, CUDA, dtype):
        pytest.skip(reason)
    with torch.no_grad():
        assert failed(operation, name, CUDA, dtype) is None
