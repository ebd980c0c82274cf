"""The cache: memory, forks, snapshots, rows, dtypes."""

import pickle

import pytest
import torch
from caches import cold, run, same
from conftest import small_model
from parity import tokens

import qwen3next as q
from layers.segments import Segments
from layers.state.kv_cache import BLOCK, KVCache


@pytest.fixture(scope="module")
def model():
    return small_model(dtype=torch.float64)


def test_bytes_are_those_of_the_formula(model):
    cache = model.new_cache(batch=2, max_len=1000)
    config = model.config
    assert cache.reserved == cache.nbytes() == 2 * config.bytes_per_sequence(8) + cache_state_excess(config, 2)
    for length in (10, 300):
        run(model, cache, tokens(length - max(cache.lengths)))
        expected = 2 * (length * config.bytes_per_token(8) + config.bytes_per_sequence(8))
        assert cache.nbytes() == expected + cache_state_excess(config, 2)
        assert cache.reserved - cache.nbytes() <= 2 * max(BLOCK, length // 4) * config.bytes_per_token(8) * 1.5
    small = small_model().new_cache(max_len=10**6, kv_dtype="bfloat16")
    assert small.reserved == config.bytes_per_sequence(4)  # the limit does not add to the size of an empty cache
    assert q.HybridCache.estimate(q.presets.qwen3_next_80b_a3b(), 262_144) == 262_144 * 24_576 + 77_266_944


def cache_state_excess(config, batch):
    """The formula counts the recurrent state in fp32; in an fp64 model it is twice as large."""
    memory = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim * 4
    return batch * memory * config.layer_types.count("linear_attention")


def test_growth_changes_nothing(model):
    ids = tokens(700, b=1)
    cache = model.new_cache(max_len=700)
    for begin in range(0, 700, 37):
        last = run(model, cache, ids[:, begin : begin + 37])
    assert same(last, cold(model, ids))
    kv = next(s for s in cache.layers if isinstance(s, KVCache))
    assert kv.capacity == 700


def test_forks_go_on_independently_and_share_until_then(model):
    ids = tokens(40, b=1)
    cache = model.new_cache(max_len=100)
    run(model, cache, ids)
    a, b = cache.fork(2)
    kv = [next(s for s in c.layers if isinstance(s, KVCache)) for c in (cache, a, b)]
    assert len({s.parts(0, 40)[0][0].data_ptr() for s in kv}) == 1
    more = [tokens(n, b=1) for n in (5, 6, 7)]
    for c, m in zip((a, b, cache), more, strict=True):
        assert same(run(model, c, m), cold(model, torch.cat((ids, m), dim=1)))
    assert len({s.parts(0, 40)[0][0].data_ptr() for s in kv}) == 1
    for c, m in zip((cache, a, b), (more[2], more[0], more[1]), strict=True):
        whole = torch.cat((ids, m, more[0]), dim=1)
        assert same(run(model, c, more[0]), cold(model, whole))


def test_forks_of_a_long_document_copy_nothing(model):
    """Each fork adds a block for its own tokens and a recurrent state; the document is stored once."""
    ids, more = tokens(2000, b=1), tokens(300, b=1)
    cache = model.new_cache(max_len=3000)
    run(model, cache, ids)
    forks = cache.fork(6)
    forks += forks[0].fork(2)
    expected = cold(model, torch.cat((ids, more[:, :3]), dim=1))
    for fork in forks:
        assert same(run(model, fork, more[:, :3]), expected)
    memory: dict[int, int] = {}
    for c in (cache, *forks):
        memory |= c.storages()
    each = BLOCK * model.config.bytes_per_token(8) + 2 * model.config.bytes_per_sequence(8)
    assert sum(memory.values()) < cache.reserved + len(forks) * each
    for begin in range(3, 300, 99):  # its own buffer grows after the document
        run(model, forks[7], more[:, begin : begin + 99])
    assert same(forks[7].last_logits, cold(model, torch.cat((ids, more), dim=1)))
    (left,) = cache.fork()
    run(model, cache, more[:, :5])  # the forked cache continues in place
    assert same(run(model, left, more[:, :3]), expected)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_what_others_see_is_never_changed(dtype):
    """Forks, rollbacks and continuations in any order: each cache reads only what was appended to it."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    start = KVCache(1, kv_heads=2, head_dim=4, max_len=4000, dtype=kind, device=torch.device("cpu"))
    states = [(start, torch.zeros(1, 0, 2, 4, dtype=torch.float64))]
    for _ in range(300):
        i = int(torch.randint(len(states), (), generator=rng))
        state, held = states[i]
        n = held.shape[1]
        kind = int(torch.randint(4, (), generator=rng))
        if kind == 0 and len(states) < 6:
            cut = int(torch.randint(n + 1, (), generator=rng))
            states.append((state.share(cut), held[:, :cut]))
            continue
        if kind == 1:
            n = int(torch.randint(n + 1, (), generator=rng))
        new = torch.randn(1, int(torch.randint(1, 60, (), generator=rng)), 2, 4, dtype=torch.float64, generator=rng)
        segments = Segments.full(new).after((n,))
        state.append(new, 2 * new, segments)
        states[i] = (state, torch.cat((held[:, :n], new), dim=1))
        for one, expected in states:
            k, v = one.read(0, expected.shape[1], dtype=torch.float64)
            bound = 0 if dtype == "float64" else expected.abs().max() / 200 if expected.numel() else 0
            assert ((k.transpose(1, 2) - expected).abs() <= bound).all()
            assert ((v.transpose(1, 2) - 2 * expected).abs() <= 2 * bound).all()


def test_snapshots_of_two_ways(model):
    """A later snapshot stays valid after a return to an earlier one and another continuation."""
    doc, left, right = (tokens(n, b=1) for n in (30, 11, 17))
    cache = model.new_cache(max_len=100)
    at_doc = run(model, cache, doc)
    cache.snapshot("doc")
    at_left = run(model, cache, left)
    cache.snapshot("left")
    cache.restore("doc")
    assert same(cache.last_logits, at_doc)
    run(model, cache, right)
    cache.restore("left")
    assert same(cache.last_logits, at_left)
    assert same(run(model, cache, right), cold(model, torch.cat((doc, left, right), dim=1)))
    with pytest.raises(ValueError, match="no snapshot 'other': doc, left"):
        cache.restore("other")


def test_rows(model):
    ids = tokens(20, b=3)
    cache = model.new_cache(batch=3, max_len=40)
    run(model, cache, ids)
    chosen = cache.select([2, 0, 0])
    more = tokens(5, b=3)
    expected = cold(model, torch.cat((ids[[2, 0, 0]], more), dim=1))
    assert same(run(model, chosen, more), expected)
    assert same(run(model, cache, more), cold(model, torch.cat((ids, more), dim=1)))
    with pytest.raises(ValueError, match="numbers below 3"):
        cache.select([3])


@pytest.mark.parametrize(
    ("options", "bound"),
    [({"kv_dtype": "float32"}, 1e-4), ({"kv_dtype": "int8"}, 0.1), ({"state_dtype": "bfloat16"}, 0.3)],
)
def test_less_precision_costs_what_it_should(model, options, bound):
    ids = tokens(60, b=1)
    cache = model.new_cache(max_len=60, **options)
    run(model, cache, ids[:, :50])
    for t in range(50, 60):
        last = run(model, cache, ids[:, t : t + 1])
    gap = (last - cold(model, ids)).abs().max()
    assert 0 < gap < bound


def test_what_cannot_be_run_or_kept_gets_a_sentence(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        model.prefill(torch.zeros(1, 0, dtype=torch.long), model.new_cache())
    with pytest.raises(ValueError, match=r"'int4' is not a supported KV cache dtype: choose .* or int8"):
        model.new_cache(kv_dtype="int4")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_goes_on_as_the_cache_does(model64, protocol):
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = model64.new_cache(2, history=4, mtp=True)
    run(model64, cache, ids[:, :30])
    cache.snapshot("here")
    for t in range(30, 36):
        run(model64, cache, ids[:, t : t + 1])
    again = pickle.loads(pickle.dumps(cache, protocol))
    assert torch.equal(run(model64, again, ids[:, 36:38]), run(model64, cache, ids[:, 36:38]))
    again.rollback(3)
    assert same(again.last_logits, cold(model64, ids[:, :35]))
    again.restore("here")
    assert same(run(model64, again, ids[:, 30:33]), cold(model64, ids[:, :33]))


def test_inference_mode_and_no_grad_may_alternate(model64):
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    for made_in in (True, False):
        for backend in ("auto", "torch"):
            model64.set_backend("decode", backend)
            with torch.inference_mode(made_in):
                cache = model64.new_cache(history=6, mtp=True)
            for begin, end in ((0, 20), (20, 21), (21, 30), (30, 31), (31, 32)):
                with torch.inference_mode(begin % 20 == 0):
                    logits = run(model64, cache, ids[:, begin:end])
                    (fork,) = cache.fork()
                assert same(logits, cold(model64, ids[:, :end]))
                assert same(run(model64, fork, ids[:, end : end + 1]), cold(model64, ids[:, : end + 1]))
            cache.rollback(4)
            assert same(cache.last_logits, cold(model64, ids[:, :28]))


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16", "int8"])
def test_dtypes_of_a_cache_are_right(name):
    """fp64 loses nothing against fp32; the other dtypes lose their rounding."""
    model = small_model()
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    bound = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02, "int8": 0.1}[name]
    for kinds in ({"kv_dtype": name}, {"kv_dtype": name, "state_dtype": name}):
        if name == "int8" and "state_dtype" in kinds:
            with pytest.raises(ValueError, match="'int8' is not a supported dtype"):
                model.new_cache(**kinds)
            continue
        cache = model.new_cache(**kinds)
        run(model, cache, ids[:, :30])
        for t in range(30, 40):
            got = run(model, cache, ids[:, t : t + 1])
            assert same(got, cold(model, ids[:, : t + 1]), bound)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float4_e2m1fn_x2", "int64", "bool", "nothing", torch.float8_e5m2])
def test_dtypes_that_are_none(model64, name, tmp_path):
    with pytest.raises(ValueError, match="is not a supported KV cache dtype"):
        model64.new_cache(kv_dtype=name)
    with pytest.raises(ValueError, match="is not a supported dtype"):
        model64.new_cache(state_dtype=name)
    model64.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a supported dtype"):
        q.load(tmp_path, dtype=name)


def test_a_negative_number_of_logits_is_refused(model64):
    with pytest.raises(ValueError, match="logits_to_keep must not be negative, got -1: 0 keeps all"):
        model64(torch.zeros(1, 3, dtype=torch.long), logits_to_keep=-1)


def test_rewinding_takes_one_row():
    model = small_model()
    cache = model.new_cache(2)
    model(torch.arange(18).view(2, 9), cache=cache)
    with pytest.raises(ValueError, match="2 rows, but rewind_to takes one sequence"):
        cache.rewind_to([1])


def test_on_a_gpu_buffers_grow_at_most_twelve_times_to_128k():
    """Each growth captures the graph of decoding anew; "meta" stands for a GPU."""
    state = KVCache(1, kv_heads=2, head_dim=8, max_len=2**17, dtype=torch.bfloat16, device=torch.device("meta"))
    token, buffers = torch.zeros(1, 1, device="meta"), []
    while state.capacity < 2**17:
        state.reserve(Segments.full(token).after([state.capacity]), in_one=True)  # the first token without a place
        buffers.append(state.capacity)
    assert len(buffers) <= 12
    assert buffers[-1] == 2**17
