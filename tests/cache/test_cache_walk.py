"""A random walk over all cache operations, compared with cold runs at every step."""

import tempfile
from pathlib import Path

import pytest
import torch
from caches import cold, cold_draft, same
from conftest import small_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import qwen3next as q
from layers.segments import Segments

MOST = 120  # tokens per row
HYBRID = {"num_hidden_layers": 2, "layer_types": ("linear_attention", "full_attention")}
KINDS = {
    "hybrid": HYBRID,
    "softmax": {"num_hidden_layers": 2, "layer_types": ("full_attention",) * 2},
    "linear": {"num_hidden_layers": 2, "layer_types": ("linear_attention",) * 2, "mtp_num_hidden_layers": 0},
    "dense": HYBRID | {"num_experts": 0},
    "tied": HYBRID | {"tie_word_embeddings": True, "mtp_num_hidden_layers": 0},
}
which = st.integers(0, 3)


class Walk(RuleBasedStateMachine):
    """After any cache operations the next logits and MTP's draft equal those of a cold run of the same tokens.

    Each cache is paired with `said`, the tokens of each of its rows.
    """

    model: q.Qwen3Next

    @initialize(history=st.integers(0, 5), rows=st.integers(1, 3))
    def start(self, history, rows):
        cache = self.model.new_cache(rows, max_len=MOST, history=history, mtp=self.model.mtp is not None)
        self.caches = [(cache, [[] for _ in range(rows)])]
        self.random = torch.Generator().manual_seed(0)

    def pick(self, n):
        return self.caches[n % len(self.caches)]

    def new_tokens(self, *shape):
        return torch.randint(0, 97, shape, generator=self.random)

    def feed(self, cache, said, ids, segments, chunk):
        for run in segments.runs:
            said[run.sequence].extend(ids[run.row, run.begin : run.end].tolist())
        for _ in self.model.prefill(ids, cache, chunk, segments=segments):
            pass

    @rule(which=which, n=st.sampled_from([1, 1, 1, 2, 7, 30, 80]), chunk=st.sampled_from([5, 64, 4096]))
    def go_on(self, which, n, chunk):
        cache, said = self.pick(which)
        if max(map(len, said)) + n <= MOST:
            ids = self.new_tokens(len(said), n)
            self.feed(cache, said, ids, Segments.full(ids), chunk)

    @rule(which=which, lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3), way=st.sampled_from("lrp"))
    def go_on_unequally(self, which, lengths, way):
        """Prompts padded on the left or right, or packed into one row."""
        cache, said = self.pick(which)
        lengths = lengths[: len(said)]
        if not any(lengths) or max(len(s) + n for s, n in zip(said, lengths, strict=True)) > MOST:
            return
        if way == "p" and min(lengths):
            segments = Segments.from_lengths([lengths])
        else:
            t = max(lengths) + 1
            mask = torch.zeros(len(said), t, dtype=torch.long)
            for r, n in enumerate(lengths):
                mask[r, slice(t - n, t) if way == "l" else slice(0, n)] = 1
            segments = Segments.from_mask(mask)
        self.feed(cache, said, self.new_tokens(segments.batch, segments.length), segments, 4)

    @rule(which=which, rests=st.lists(st.booleans(), min_size=3, max_size=3), steps=st.integers(1, 6))
    def go_on_while_some_rest(self, which, rests, steps):
        """Continue as `stream` does after some rows have stopped."""
        cache, said = self.pick(which)
        resting = [r for r in range(len(said)) if rests[r]]
        if max(map(len, said)) + steps > MOST or (resting and not min(map(len, said))):
            return
        for _ in range(steps):
            token, before = self.new_tokens(len(said), 1), cache.last_logits
            with cache.resting(resting):
                logits = self.model.step(token, cache)
            if before is not None:
                logits[resting] = before[resting]
                cache.last_logits = logits
            for r, row in enumerate(said):
                row.extend([] if r in resting else token[r].tolist())

    @precondition(lambda self: len(self.caches) < 4)
    @rule(which=which)
    def fork(self, which):
        cache, said = self.pick(which)
        self.caches.append((cache.fork()[0], [list(row) for row in said]))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(which=which)
    def forget(self, which):
        self.caches.pop(which % len(self.caches))

    @rule(which=which, name=st.sampled_from("ab"))
    def snapshot(self, which, name):
        self.pick(which)[0].snapshot(name)

    @rule(which=which, name=st.sampled_from("ab"))
    def restore(self, which, name):
        cache, said = self.pick(which)
        if name in cache.snapshots:
            mark = cache.snapshots[name]
            cache.restore(name)
            said[:] = [row[:n] for row, n in zip(mark.tokens.tolist(), mark.lengths, strict=True)]

    @rule(which=which, back=st.lists(st.integers(0, 7), min_size=3, max_size=3), together=st.booleans())
    def rollback(self, which, back, together):
        cache, said = self.pick(which)
        lengths, back = cache.lengths, [back[0]] * len(said) if together else back[: len(said)]
        try:
            cache.rollback(back[0] if together else back)
        except ValueError:
            assert cache.lengths == lengths
        else:
            said[:] = [row[: len(row) - n] for row, n in zip(said, back, strict=True)]

    @rule(which=which, rows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def select(self, which, rows):
        i = which % len(self.caches)
        cache, said = self.caches[i]
        rows = [r % len(said) for r in rows]
        self.caches[i] = (cache.select(rows), [list(said[r]) for r in rows])

    @rule(which=which, history=st.integers(0, 3))
    def save_and_load(self, which, history):
        i = which % len(self.caches)
        cache, said = self.caches[i]
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache")
            again = q.HybridCache.load(Path(folder) / "cache", self.model, max_len=MOST, history=history)
        assert again.snapshots.keys() == cache.snapshots.keys()
        self.caches[i] = (again, said)

    @invariant()
    def what_comes_next_is_what_a_cold_run_says(self):
        for cache, said in getattr(self, "caches", []):
            assert cache.lengths == tuple(map(len, said))
            for r, row in enumerate(said):
                assert cache.tokens[r, : len(row)].tolist() == row
                if row and cache.last_logits is not None:
                    assert same(cache.last_logits[r], cold(self.model, torch.tensor([row]))[0])
            if min(map(len, said)) and cache.hidden is not None and cache.mtp is not None:
                token = torch.arange(len(said))
                for r, draft in enumerate(self.model.draft(cache, token)):
                    assert same(draft, cold_draft(self.model, torch.tensor([said[r]]), token[r : r + 1])[0])


def walk(kind, examples):
    """The same walk over another model family."""
    model = small_model(dtype=torch.float64, **KINDS[kind])
    case = type(f"Walk_{kind}", (Walk,), {"model": model}).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=25, deadline=None)
    return case


TestHybrid = walk("hybrid", 8)
TestSoftmax, TestLinear, TestDense, TestTied = (walk(kind, 3) for kind in KINDS if kind != "hybrid")


@pytest.mark.slow
class TestLongHybrid(walk("hybrid", 40)): ...


@pytest.mark.slow
class TestLongSoftmax(walk("softmax", 20)): ...


@pytest.mark.slow
class TestLongLinear(walk("linear", 20)): ...
