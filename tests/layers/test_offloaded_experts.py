"""Experts read on demand against experts in memory: equal bits, a bounded cache, no unnecessary reads."""

import copy
import pickle
import threading

import pytest
import torch

from layers.experts.cache import ExpertCache
from layers.experts.disk import OffloadedExperts
from layers.moe import Experts

WIDTH, INNER, COUNT, K = 16, 8, 12, 3
SIZE = 3 * WIDTH * INNER * 4  # bytes of an expert in fp32


class Store:
    """Replaces a checkpoint's files: counts reads, and fails on request."""

    def __init__(self, experts):
        self.experts, self.reads, self.broken, self.lock = experts, [], set(), threading.Lock()

    def __call__(self, e, gate_up, down):
        with self.lock:
            self.reads.append(e)
        gate_up.fill_(float("nan"))  # so that a use of incomplete data is visible
        if e in self.broken:
            raise OSError(f"expert {e} cannot be read")
        with torch.no_grad():
            gate_up.copy_(self.experts.gate_up_proj[e])
            down.copy_(self.experts.down_proj[e])
        return gate_up.nbytes + down.nbytes

    def __getstate__(self):
        return self.__dict__ | {"lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, lock=threading.Lock())


def model(layers, *, slots, spare=0, readers=4):
    """Experts in memory, and the same experts with a shared cache."""
    torch.manual_seed(0)
    cache = ExpertCache(slots * SIZE + spare, readers=readers)
    inside = [Experts(WIDTH, INNER, COUNT, backend="loop") for _ in range(layers)]
    for experts in inside:
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    outside = [OffloadedExperts(WIDTH, INNER, COUNT, read=Store(e), cache=cache, dtype=torch.float32) for e in inside]
    return inside, outside, cache


def routed(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(n, WIDTH, generator=g), torch.rand(n, K, generator=g)
    return x, weights, torch.rand(n, COUNT, generator=g).topk(K).indices


@pytest.mark.parametrize("slots", [1, 2, 5, 9, 24])
@pytest.mark.parametrize("readers", [1, 4])
def test_the_same_bits_whatever_the_cache_holds(slots, readers):
    """Decoding and prefill alternately, with caches from one slot up to both layers."""
    inside, outside, cache = model(2, slots=slots, spare=SIZE - 1, readers=readers)
    with torch.no_grad():
        for step, n in enumerate((1, 40, 1, 1, 2, 3, 40, 1, 1, 0)):
            for a, b in zip(inside, outside, strict=True):
                a.backend = "auto" if n == 1 else "loop"  # sums for one token follow the order of its choices
                args = routed(n, seed=step)
                b.read.reads.clear()
                assert torch.equal(a(*args), b(*args))
                assert len(b.read.reads) == len(set(b.read.reads)), "an expert was read twice in one call"
                assert set(b.read.reads) <= set(args[2].flatten().tolist()), "an expert was read that nothing uses"
                assert cache.nbytes <= slots * SIZE


def test_report():
    _, (layer, other), cache = model(2, slots=8)
    x, weights, _ = routed(1)
    with torch.no_grad():
        for indices in ([0, 1, 2], [2, 1, 5], [5, 0, 1]):
            layer(x, weights, torch.tensor([indices]))
            other(x, weights, torch.tensor([[7, 8, 9]]))
    assert layer.read.reads.count(0) == 1
    assert sorted(layer.read.reads) == [0, 1, 2, 5]
    assert sorted(other.read.reads) == [7, 8, 9]
    report = cache.report
    assert (report.hits, report.misses, report.tokens, report.bytes_read) == (11, 7, 3, 7 * SIZE)
    assert report.hit_rate == 11 / 18
    assert report.bytes_per_token == 7 * SIZE / 3
    cache.reset()
    assert cache.report.hit_rate == cache.report.bytes_per_token == 0
    assert cache.nbytes == 7 * SIZE, "experts stay"


def test_the_least_recently_used_goes_first():
    _, (layer,), _ = model(1, slots=4)
    x, weights, _ = routed(1)
    with torch.no_grad():
        for indices in ([0, 1, 2], [3, 1, 2], [4, 1, 2]):  # 4 takes the place of 0
            layer(x, weights, torch.tensor([indices]))
        layer.read.reads.clear()
        layer(x, weights, torch.tensor([[3, 4, 1]]))
        assert layer.read.reads == []
        layer(x, weights, torch.tensor([[0, 1, 3]]))
        assert layer.read.reads == [0]


def test_a_prefill_leaves_other_layers_their_share():
    """Except for slots used by prefetching, two with one reader; plain least-recently-used would keep none."""
    _, (layer, *others), _ = model(3, slots=14, readers=1)
    x, weights, _ = routed(2)
    mine = torch.tensor([[0, 1], [2, 3]])
    with torch.no_grad():
        layer(x, weights[:, :2], mine)
        for _ in range(10):
            for other in others:
                other(*routed(40))  # all 12 experts of a layer
        layer.read.reads.clear()
        layer(x, weights[:, :2], mine)
    assert len(layer.read.reads) <= 2


def test_the_busiest_experts_of_a_prefill_stay():
    _, (layer, _), _ = model(2, slots=4)  # two for each layer
    x, weights = torch.ones(20, WIDTH), torch.ones(20, 1)
    with torch.no_grad():
        layer(x, weights, torch.tensor([*range(12), 3, 3, 3, 7, 7, 7, 7, 7])[:, None])
        layer.read.reads.clear()
        layer(x[:2], weights[:2], torch.tensor([[3], [7]]))
    assert layer.read.reads == []


@pytest.mark.parametrize("n", [1, 30])
def test_gradients_though_slots_are_refilled_before_the_backward_pass(n):
    inside, outside, _ = model(2, slots=2)
    results = []
    for layers in (inside, outside):
        x, weights, indices = routed(n)
        x.requires_grad_()
        weights.requires_grad_()
        y = x
        for _ in range(2):
            for layer in layers:
                y = y + layer(y, weights, indices)
        y.square().sum().backward()
        results.append((y, x.grad, weights.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_only_x_with_a_gradient_costs_copies(monkeypatch):
    _, (layer,), _ = model(1, slots=12)
    copies = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copies.append(t) or t)
    x, weights, indices = routed(4)
    layer(x, weights.requires_grad_(), indices)
    with torch.no_grad():
        layer(x.requires_grad_(), weights, indices)
    assert copies == []


def test_a_failed_read_leaves_nothing_behind():
    (inside,), (layer,), cache = model(1, slots=4)
    args = routed(40)
    with torch.no_grad():
        layer(*args)
        layer.read.broken = {6}
        for _ in range(3):
            with pytest.raises(OSError, match="expert 6"):
                layer(*args)
        assert len(cache._kept) + len(cache._free) == 4, "a slot was lost"
        layer.read.broken = set()
        for seed in range(4):
            assert torch.equal(layer(*routed(9, seed)), inside(*routed(9, seed)))
            assert cache.nbytes == 4 * SIZE


def test_slots_made_in_inference_mode_can_be_filled_by_any_thread():
    (inside,), (layer,), _ = model(1, slots=2)
    args = routed(10)
    with torch.inference_mode():
        layer(*args)
    x = args[0].requires_grad_()
    layer(x, *args[1:]).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    inside(x, *args[1:]).sum().backward()
    assert torch.equal(x.grad, expected)


def test_copies_begin_with_an_empty_cache():
    _, (layer,), cache = model(1, slots=4)
    args = routed(5)
    with torch.no_grad():
        y = layer(*args)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.cache is not cache
            assert other.cache.nbytes == 0
            assert torch.equal(other(*args), y)
    assert "layer 0 of the cache" in repr(layer)
    assert not list(layer.parameters())


def test_caches_that_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="hold no expert"):
        model(1, slots=0, spare=SIZE - 1)
    with pytest.raises(ValueError, match="at least 1"):
        ExpertCache(SIZE, readers=0)
    _, (layer,), cache = model(1, slots=1)
    with pytest.raises(ValueError, match="a cache of their own"):
        OffloadedExperts(WIDTH, INNER, COUNT, read=layer.read, cache=cache, dtype=torch.bfloat16)
