"""The cache: what it costs, forks, snapshots, rollback, rows; and a random walk against cold runs."""

import pytest
import torch
from conftest import small_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from parity import tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwen3next as q
from layers.kv_state import BLOCK, KVState
from layers.segments import Segments


@pytest.fixture(scope="module")
def model():
    return small_model(dtype=torch.float64)


def run(model, cache, ids):
    with torch.no_grad():
        cache.last_logits = model(ids, cache=cache, logits_to_keep=1).logits[:, -1]
    return cache.last_logits


def cold(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, -1]


def same(a, b):
    return (a - b).abs().max() < 1e-10


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
    assert small.reserved == config.bytes_per_sequence(4)  # an empty cache is no larger for its limit
    assert q.HybridCache.estimate(q.presets.qwen3_next_80b_a3b(), 262_144) == 262_144 * 24_576 + 77_266_944


def cache_state_excess(config, batch):
    """The formula counts memory in fp32; in an fp64 model it is twice that."""
    memory = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim * 4
    return batch * memory * config.layer_types.count("linear_attention")


def test_growth_changes_nothing(model):
    ids = tokens(700, b=1)
    cache = model.new_cache(max_len=700)
    for begin in range(0, 700, 37):
        last = run(model, cache, ids[:, begin : begin + 37])
    assert same(last, cold(model, ids))
    kv = next(s for s in cache.layers if isinstance(s, KVState))
    assert kv.capacity == 700


def test_forks_go_on_independently_and_share_until_then(model):
    ids = tokens(40, b=1)
    cache = model.new_cache(max_len=100)
    run(model, cache, ids)
    a, b = cache.fork(2)
    kv = [next(s for s in c.layers if isinstance(s, KVState)) for c in (cache, a, b)]
    assert len({s.parts(0, 40)[0][0].data_ptr() for s in kv}) == 1
    more = [tokens(n, b=1) for n in (5, 6, 7)]
    for c, m in zip((a, b, cache), more, strict=True):
        assert same(run(model, c, m), cold(model, torch.cat((ids, m), dim=1)))
    assert len({s.parts(0, 40)[0][0].data_ptr() for s in kv}) == 1
    for c, m in zip((cache, a, b), (more[2], more[0], more[1]), strict=True):
        whole = torch.cat((ids, m, more[0]), dim=1)
        assert same(run(model, c, more[0]), cold(model, whole))


def test_forks_of_a_long_document_copy_nothing(model):
    """Each of them adds a block for its own tokens and a recurrent state; the document is there once."""
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
    for begin in range(3, 300, 99):  # its own buffer grows behind the document
        run(model, forks[7], more[:, begin : begin + 99])
    assert same(forks[7].last_logits, cold(model, torch.cat((ids, more), dim=1)))
    (left,) = cache.fork()
    run(model, cache, more[:, :5])  # the one that was forked goes on in place
    assert same(run(model, left, more[:, :3]), expected)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_what_others_see_is_never_changed(dtype):
    """Any order of continuing, going back and sharing: each state reads what was appended to it."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    start = KVState(1, kv_heads=2, head_dim=4, max_len=4000, dtype=kind, device=torch.device("cpu"))
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
    """A later snapshot survives going back to an earlier one and another way."""
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


def test_rollback_is_bit_exact_or_refused(model):
    ids = tokens(50, b=2)
    cache = model.new_cache(batch=2, max_len=60, history=4)
    run(model, cache, ids[:, :40])
    logits = [run(model, cache, ids[:, t : t + 1]) for t in range(40, 50)]
    cache.rollback(3)
    assert torch.equal(cache.last_logits, logits[6])
    for t in range(47, 50):
        assert torch.equal(run(model, cache, ids[:, t : t + 1]), logits[t - 40])
    before = cache.lengths
    for n in (5, 60, -1):
        with pytest.raises(ValueError, match=r"No state after|Cannot take back"):
            cache.rollback(n)
        assert cache.lengths == before
    cache.rollback(0)
    plain = model.new_cache(batch=2, max_len=60)
    run(model, plain, ids[:, :40])
    with pytest.raises(ValueError, match="larger history"):
        plain.rollback(1)


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


def test_rewind_to(model):
    cache = model.new_cache(max_len=100, history=3)
    ids = tokens(30, b=1)
    assert cache.rewind_to([1, 2]) == 0
    run(model, cache, ids[:, :10])
    cache.snapshot("ten")
    run(model, cache, ids[:, 10:20])
    run(model, cache, ids[:, 20:21])
    text = ids[0].tolist()
    assert cache.rewind_to(text) == 21
    assert cache.rewind_to(text[:20] + [0] * 3) == 20
    assert cache.rewind_to(text[:15]) == 10
    assert cache.lengths == (10,)
    assert cache.rewind_to([*text[:9], 96 - text[9]]) == 0
    assert same(run(model, cache, ids[:, 10:]), cold(model, ids))


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


@pytest.fixture
def filled(model):
    cache = model.new_cache(max_len=100)
    run(model, cache, tokens(30, b=1))
    cache.snapshot("doc")
    run(model, cache, tokens(9, b=1))
    cache.snapshot("asked")
    cache.restore("doc")
    run(model, cache, tokens(5, b=1))
    return cache


def test_a_file_holds_cache_and_snapshots(model, filled, tmp_path):
    path = tmp_path / "doc.safetensors"
    filled.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["doc.safetensors"]
    again = q.HybridCache.load(path, model, history=2)
    assert again.lengths == (35,)
    assert torch.equal(again.last_logits, filled.last_logits)
    more = tokens(6, b=1)
    assert torch.equal(run(model, again, more), run(model, filled, more))
    for name in ("doc", "asked"):
        for cache in (again, filled):
            cache.restore(name)
        assert torch.equal(again.last_logits, filled.last_logits)
        assert torch.equal(run(model, again, more), run(model, filled, more))
    shared = sum(t.numel() * 8 for t in load_file(path).values())
    assert shared < 1.2 * 3 * filled.nbytes()  # three points; keys and values of the document are there once or twice
    again.save(tmp_path / "twice.safetensors")
    assert q.HybridCache.load(tmp_path / "twice.safetensors", model).snapshots.keys() == {"doc", "asked"}
    empty = model.new_cache(batch=2)
    empty.save(path)
    assert q.HybridCache.load(path, model).lengths == (0, 0)


def test_a_model_without_softmax_layers_has_files_too(tmp_path):
    model = small_model(num_hidden_layers=2, layer_types=("linear_attention",) * 2)
    cache = model.new_cache()
    run(model, cache, tokens(9, b=1))
    cache.save(tmp_path / "c.safetensors")
    again = q.HybridCache.load(tmp_path / "c.safetensors", model)
    assert torch.equal(run(model, again, tokens(3, b=1)), run(model, cache, tokens(3, b=1)))


def test_files_of_others_and_damaged_ones_are_refused(model, filled, tmp_path):
    path = tmp_path / "doc.safetensors"
    filled.save(path)
    whole = path.read_bytes()
    for other in (
        small_model(seed=1, dtype=torch.float64),
        small_model(),
        small_model(rope_theta=5.0, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="another model"):
            q.HybridCache.load(path, other)
    stretched = small_model(dtype=torch.float64)
    stretched.extend_context(4.0)
    with pytest.raises(ValueError, match="RoPE scaling"):
        q.HybridCache.load(path, stretched)
    with pytest.raises(ValueError, match="max_len is 20"):
        q.HybridCache.load(path, model, max_len=20)
    for damaged in (whole[:-1], whole[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            q.HybridCache.load(path, model)
    tensors = load_file_bytes(whole, tmp_path)
    tensors["tokens"][0, 3] += 1
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    with pytest.raises(ValueError, match="has been changed"):
        q.HybridCache.load(path, model)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not a cache"):
        q.HybridCache.load(path, model)


def load_file_bytes(content, folder):
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def test_a_killed_save_leaves_the_old_file(model, filled, tmp_path, monkeypatch):
    path = tmp_path / "doc.safetensors"
    filled.save(path)
    before = path.read_bytes()

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3next.cache_files.write", full)
    with pytest.raises(OSError, match="No space"):
        filled.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["doc.safetensors"]


class Walk(RuleBasedStateMachine):
    """Whatever is done to caches, the next logits are those of a cold run of the same tokens."""

    model = small_model(dtype=torch.float64, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))

    @initialize(history=st.integers(0, 3))
    def start(self, history):
        self.caches = [(self.model.new_cache(max_len=120, history=history), [])]
        self.seed = 0

    def new_tokens(self, n):
        self.seed += 1
        return torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(self.seed))

    @rule(n=st.sampled_from([1, 1, 2, 7, 30]), which=st.integers(0, 3))
    def go_on(self, n, which):
        cache, said = self.caches[which % len(self.caches)]
        if len(said) + n <= 120:
            ids = self.new_tokens(n)
            run(self.model, cache, ids)
            said.extend(ids[0].tolist())

    @precondition(lambda self: len(self.caches) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which):
        cache, said = self.caches[which % len(self.caches)]
        self.caches.append((cache.fork()[0], list(said)))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(which=st.integers(0, 3))
    def forget(self, which):
        self.caches.pop(which % len(self.caches))

    @rule(which=st.integers(0, 3), name=st.sampled_from("ab"))
    def snapshot(self, which, name):
        self.caches[which % len(self.caches)][0].snapshot(name)

    @rule(which=st.integers(0, 3), name=st.sampled_from("ab"))
    def restore(self, which, name):
        cache, said = self.caches[which % len(self.caches)]
        if name in cache.snapshots:
            mark = cache.snapshots[name]
            cache.restore(name)
            said[:] = mark.tokens[0].tolist()

    @rule(which=st.integers(0, 3), n=st.sampled_from([1, 2, 7]))
    def rollback(self, which, n):
        cache, said = self.caches[which % len(self.caches)]
        lengths = cache.lengths
        try:
            cache.rollback(n)
        except ValueError:
            assert cache.lengths == lengths
        else:
            del said[len(said) - n :]

    @rule(which=st.integers(0, 3))
    def select(self, which):
        i = which % len(self.caches)
        cache, said = self.caches[i]
        self.caches[i] = (cache.select([0]), said)

    @invariant()
    def next_logits_are_those_of_a_cold_run(self):
        for cache, said in getattr(self, "caches", []):
            assert cache.lengths == (len(said),)
            if said and cache.last_logits is not None:
                assert cache.tokens[0, : len(said)].tolist() == said
                assert same(cache.last_logits, cold(self.model, torch.tensor([said])))


Walk.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestWalk = Walk.TestCase
