"""Strong decays, up to g = −∞, and the accuracy of the chunked algorithms for weak decays in the same chunk.

Oracle: the token loop in float64. The tolerance is about 16 fp32 roundings of the largest value of each tensor.
"""

import math

import pytest
import torch

import qwen3next as q
from layers.chunk_decay import FORGOTTEN, bounded
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import why_not
from layers.kernels import chunked_recompute as piecewise_delta_rule
from layers.norm import l2_normalise
from layers.segments import Segments
from layers.variants.simple_gla import simple_gla

pytestmark = pytest.mark.oracle

INF = math.inf
TOLERANCE = 2e-6
T = 130  # two chunks and two tokens
RULES = [(gated_delta_rule, backend) for backend in ("chunked", "chunked_recompute", "cpp")] + [(simple_gla, "chunked")]
EVERY_RULE = pytest.mark.parametrize("rule, backend", RULES)

PATTERNS = {
    "several": {3: -1e2, 17: -1e4, 40: -1e6, 41: -30.0, 100: -1e3},
    "infinite at the ends": {0: -INF, 63: -INF, 64: -INF, 127: -INF, 128: -INF, 129: -INF},
    "infinite inside": {5: -INF, 6: -INF, 70: -INF},
    "mixed": {0: -1e9, 1: -INF, 20: -88.0, 21: -104.0, 22: -745.0, 62: -3e38, 90: -INF},
    "every eighth": {i: -(10.0 ** (i % 7)) for i in range(0, T, 8)},
    "all strong": dict.fromkeys(range(T), -1e5),
    "all infinite": dict.fromkeys(range(T), -INF),
    "all middling": {i: -(0.5 + i % 13) for i in range(T)},
}


def inputs(t=T):
    torch.manual_seed(0)
    return {
        "q": l2_normalise(torch.randn(2, t, 2, 16), scale=0.25),
        "k": l2_normalise(torch.randn(2, t, 2, 16)),
        "v": torch.randn(2, t, 4, 16),
        "log_decay": -torch.rand(2, t, 4) * 0.05,
        "beta": torch.rand(2, t, 4),
        "state": torch.randn(2, 4, 16, 16),
    }


def run(rule, x, backend, dtype, segments=None):
    x = {name: value.to(dtype).detach().requires_grad_() for name, value in x.items()}
    o, state = rule(**x, segments=segments, backend=backend)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    ((o * weights).sum() + (state**2).sum()).backward()
    return {"o": o, "last state": state} | {f"gradient of {name}": value.grad for name, value in x.items()}


def compare(rule, x, backend, segments=None):
    if rule is gated_delta_rule and why_not("delta_rule", backend, torch.device("cpu"), torch.float32):
        pytest.skip(f"{backend} cannot run here")
    exact = run(rule, x, "recurrent", torch.float64, segments)
    for name, got in run(rule, x, backend, torch.float32, segments).items():
        error = (got - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-3)
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@EVERY_RULE
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_token_loop(rule, backend, pattern, packed, monkeypatch):
    monkeypatch.setattr(piecewise_delta_rule, "AT_ONCE", 1)  # several pieces
    x, segments = inputs(), None
    for i, g in PATTERNS[pattern].items():
        x["log_decay"][:, i] = g
    if packed:
        ids = torch.tensor([[-1] * 4 + [0] * 30 + [1] * 30 + [2] * (T - 64), [0] * 5 + [1] * (T - 5)])
        segments = Segments.from_document_ids(ids)
    compare(rule, x, backend, segments)


@EVERY_RULE
@pytest.mark.parametrize("g", [-1e2, -1e4, -1e6, -INF])
def test_one_strong_token_at_every_place_of_a_chunk(rule, backend, g):
    """A different position in each row, so that one run covers all positions."""
    x = {name: value[:1].repeat(64, *[1] * (value.ndim - 1)) for name, value in inputs(70).items()}
    x["log_decay"][range(64), range(64)] = g
    compare(rule, x, backend)


@EVERY_RULE
def test_heads_forget_on_their_own(rule, backend):
    x = inputs()
    x["log_decay"][:, ::3, 1] = -INF
    x["log_decay"][0, 10, 2] = -1e6
    compare(rule, x, backend)


def test_what_is_wholly_forgotten_has_no_gradient():
    """e^g is zero there in every dtype, as is the token loop's gradient."""
    g = torch.tensor([-INF, -1e30, FORGOTTEN - 1, -104.0, 0.0], requires_grad=True)
    bounded(g).sum().backward()
    assert g.grad.tolist() == [0, 0, 0, 1, 1]
    assert torch.tensor(FORGOTTEN, dtype=torch.float64).exp() == 0


@pytest.mark.parametrize("backend", ["chunked", "chunked_recompute", "cpp"])
def test_a_model_that_forgets_strongly_runs_in_chunks_as_by_tokens(backend):
    """Large decay projections: log decays from 0 to about −1e4 in the same chunk."""
    if why_not("delta_rule", backend, torch.device("cpu"), torch.float32):
        pytest.skip(f"{backend} cannot run here")
    torch.manual_seed(0)
    model = q.Qwen3Next(q.presets.tiny(num_experts=0, intermediate_size=64)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("in_proj_a.weight"):
                parameter.mul_(3e4)
    ids = torch.randint(0, 256, (1, 130))
    with torch.no_grad():
        model.set_backend("delta_rule", "recurrent")
        exact = model.double()(ids).logits
        model.float().set_backend("delta_rule", backend)
        error = (model(ids).logits - exact).abs().max()
    assert error < 1e-5  # as with weak forgetting: docs/numerics.md
