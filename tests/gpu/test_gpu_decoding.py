"""On a CUDA device: steps by a captured graph against the modules, over everything that a cache can do.

In fp32, with experts that rounding may change, and in bf16 with every expert chosen.
"""

import pytest
import torch
from conftest import small_model

from layers.segments import Segments
from qwen3next.decoding.cuda_graph import graph_of
from recipes.gpu.decode import captures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SIZES = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64, "mtp_num_hidden_layers": 0}
CHANGES = {torch.float32: {}, torch.bfloat16: {"num_experts_per_tok": 8}}
BOUND = {torch.float32: 1e-2, torch.bfloat16: 0.1}  # of the relative error of all logits
BACKENDS = ("torch", "graph")


@pytest.fixture(params=BOUND, ids=str)
def model(request):
    return small_model(dtype=request.param, **SIZES, **CHANGES[request.param]).to(CUDA)


def ids(t, b=2, seed=0):
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(seed)).to(CUDA)


def filled(model, t=70, b=2, **options):
    cache = model.new_cache(b, max_len=1200, **options)
    list(model.prefill(ids(t, b), cache))
    return cache


def steps(model, cache, tokens):
    """Logits after each token (b, t, vocab)."""
    return torch.stack([model.step(token, cache) for token in tokens.split(1, dim=1)], dim=1).float()


def close(model, found, expected):
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= BOUND[model.dtype], error


def both(model, run):
    """What `run` returns with the modules, and with the graph; the latter raises where it cannot be captured."""
    results = []
    for backend in BACKENDS:
        model.set_backend("decode", backend)
        results.append(run())
    return results


@pytest.mark.parametrize("b", [1, 3])
def test_steps(model, b):
    expected, found = both(model, lambda: steps(model, filled(model, b=b), ids(20, b, seed=1)))
    close(model, found, expected)


def test_a_graph_is_captured_once_and_again_as_buffers_grow(model):
    """250 tokens and 800 more: beyond the first buffer several times, and never once a token."""
    model.set_backend("decode", "torch")
    expected = steps(model, filled(model, 250), ids(800, seed=1))
    model.set_backend("decode", "graph")
    cache = filled(model, 250)
    with captures(CUDA) as seconds:
        few = steps(model, cache, ids(4, seed=1))
        assert len(seconds) == 1
        found = torch.cat((few, steps(model, cache, ids(800, seed=1)[:, 4:])), dim=1)
    assert 2 <= len(seconds) <= 12
    assert graph_of(cache) is not None
    close(model, found, expected)


def test_forks_go_on_apart(model):
    """The original, a fork and a fork of that, in turn; none changes the others."""

    def run():
        first = filled(model)
        begun = steps(model, first, ids(5, seed=1))
        (second,) = first.fork()
        (third,) = second.fork()
        found = [begun]
        for n in range(4):
            for i, cache in enumerate((first, second, third)):
                found.append(steps(model, cache, ids(3, seed=10 * n + i)))
        return torch.cat(found, dim=1)

    expected, found = both(model, run)
    close(model, found, expected)


def test_snapshots_and_selected_rows(model):
    def run():
        cache = filled(model, b=3)
        begun = steps(model, cache, ids(4, 3, seed=1))
        cache.snapshot("here")
        more = steps(model, cache, ids(6, 3, seed=2))
        cache.restore("here")
        again = steps(model, cache, ids(6, 3, seed=2))
        close(model, again, more)
        other = cache.select([2, 0])
        return torch.cat((begun[:2], again[:2], steps(model, other, ids(5, 2, seed=3))), dim=1)

    expected, found = both(model, run)
    close(model, found, expected)


def test_rows_of_unequal_lengths(model):
    """Each row has its own position."""

    def run():
        cache = model.new_cache(2, max_len=400)
        mask = torch.ones(2, 70, dtype=torch.long, device=CUDA)
        mask[0, 40:] = 0
        list(model.prefill(ids(70), cache, segments=Segments.from_mask(mask)))
        return steps(model, cache, ids(8, seed=1))

    expected, found = both(model, run)
    close(model, found, expected)


def test_a_prefill_between_steps(model):
    """The graph's states follow what the modules did meanwhile."""

    def run():
        cache = filled(model)
        begun = steps(model, cache, ids(3, seed=1))
        list(model.prefill(ids(30, seed=2), cache))
        return torch.cat((begun, steps(model, cache, ids(3, seed=3))), dim=1)

    expected, found = both(model, run)
    close(model, found, expected)


def test_rollback_with_history_runs_the_modules_and_is_exact(model):
    """A cache that keeps history cannot take the graph; named, it says so."""
    cache = filled(model, history=4)
    first = steps(model, cache, ids(3, seed=1))
    cache.rollback(2)
    again = steps(model, cache, ids(3, seed=1)[:, 1:])
    close(model, again, first[:, 1:])
    model.set_backend("decode", "graph")
    with pytest.raises(RuntimeError, match="history"):
        model.step(ids(1), cache)


def test_changed_weights_are_noticed(model):
    """A weight that is replaced between two steps acts on the next one."""

    def run():
        torch.manual_seed(0)
        cache = filled(model)
        begun = steps(model, cache, ids(2, seed=1))
        weight = model.lm_head.weight
        before = weight.detach().clone()
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(-before)
            changed = steps(model, cache, ids(2, seed=2))
            model.lm_head.weight = torch.nn.Parameter(before)
        return torch.cat((begun, changed), dim=1)

    expected, found = both(model, run)
    close(model, found, expected)
