"""Many rows in one step: each equals, to the bit, itself alone and one token at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model
from parity import tokens

import qwen3next as q
from layers.cpp import build, cpu
from layers.gated_deltanet import DeltaNetState
from qwen3next.decoding import plan as decode
from qwen3next.decoding import states
from qwen3next.decoding.plan import MOST_TOKENS

needs_cpp = pytest.mark.skipif(build.missing() is not None, reason=f"compiled code cannot run: {build.missing()}")
DTYPES = [torch.float32, torch.bfloat16]


def begun(model, lengths, **options):
    """A cache of one sequence for each length."""
    caches = []
    for n, length in enumerate(lengths):
        caches.append(model.new_cache(max_len=900, **options))
        if length:
            list(model.prefill(tokens(length, b=n + 1)[n:], caches[-1]))
    return caches


def same_state(one, two):
    """Whether two caches hold the same bits, keys and values of the tokens that count included."""
    assert one.lengths == two.lengths
    pairs = [(one.tokens[:, : one.lengths[0]], two.tokens[:, : two.lengths[0]])]
    pairs += [] if one.hidden is None else [(one.hidden, two.hidden)]
    for a, b in zip(one.layers, two.layers, strict=True):
        if isinstance(a, DeltaNetState):
            pairs += [(a.conv, b.conv), (a.recurrent, b.recurrent)]
        else:
            pairs += zip(a.read(0, one.lengths[0]), b.read(0, one.lengths[0]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def drawn(generator, count):
    return torch.randint(0, 97, (count,), generator=generator)


class Walk:
    """Sequences that are stepped together, each with a twin that is stepped alone, one token at a time."""

    def __init__(self, seed, dtype, **options):
        self.random = torch.Generator().manual_seed(seed)
        self.model = small_model(seed % 3, dtype=dtype, head_dim=(32, 24)[seed % 2], linear_value_head_dim=24)
        self.rows = begun(self.model, [self.below(2) * self.below(130) for _ in range(6)], history=6, **options)
        self.rows += begun(self.model, [510, 3])
        self.twins = [row.fork()[0] for row in self.rows]
        self.texts = [self.below(97) for _ in self.rows]

    def below(self, n):
        return int(torch.randint(0, n, (), generator=self.random))

    def step(self):
        """Some rows, in any order, with 1 to 5 tokens each; logits after each token."""
        chosen = torch.randperm(len(self.rows), generator=self.random)[: 1 + self.below(len(self.rows))].tolist()
        new = [drawn(self.random, 1 + self.below(5) * self.below(2)) for _ in chosen]
        everywhere = bool(self.below(2))
        got = self.model.step_many(new, [self.rows[n] for n in chosen], all_logits=everywhere)
        for n, ids, logits in zip(chosen, new, got.split([len(x) if everywhere else 1 for x in new]), strict=True):
            alone = torch.cat([self.model.step(token.view(1, 1), self.twins[n]) for token in ids])
            assert torch.equal(logits, alone if everywhere else alone[-1:]), f"row {n} differs from itself alone"

    def fork(self):
        n, to = self.below(len(self.rows)), self.below(len(self.rows))
        self.rows[to], self.twins[to] = self.rows[n].fork()[0], self.twins[n].fork()[0]

    def snapshot(self):
        n = self.below(len(self.rows))
        for cache in (self.rows[n], self.twins[n]):
            cache.snapshot("here")

    def restore(self):
        for row, twin in zip(self.rows, self.twins, strict=True):
            if "here" in row.snapshots and self.below(2):
                row.restore("here"), twin.restore("here")

    def rollback(self):
        """To a place inside what one call brought, or several."""
        n, back = self.below(len(self.rows)), 1 + self.below(4)
        try:
            self.rows[n].rollback(back)
        except ValueError:
            return
        self.twins[n].rollback(back)

    def run(self, steps):
        for _ in range(steps):
            (self.step, self.step, self.step, self.fork, self.snapshot, self.restore, self.rollback)[self.below(7)]()
        for row, twin in zip(self.rows, self.twins, strict=True):
            assert same_state(row, twin)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_rows_equals_each_alone_and_one_token_at_a_time(seed, dtype):
    Walk(seed, dtype, **({"kv_dtype": "int8"} if seed == 2 else {})).run(40)


def another_rows_state(monkeypatch):
    """Two rows exchange their recurrent states."""
    real = states.States.point_to

    def point_to(self, steps):
        found = real(self, steps)
        if len(steps) > 1:
            array = next(a for a in self._arrays if hasattr(a[0], "before"))
            array[0].before, array[1].before = array[1].before, array[0].before
        return found

    monkeypatch.setattr(states.States, "point_to", point_to)


def rows_in_another_order(monkeypatch):
    """The logits of the first row are given for the last."""
    real = decode.Plan.run

    def run(self, model, steps, **options):
        hidden, logits = real(self, model, steps, **options)
        return hidden, logits.roll(1, 0)

    monkeypatch.setattr(decode.Plan, "run", run)


def one_position_further(monkeypatch):
    """The last row's tokens come one position too late."""
    real = decode._rows

    def rows(steps):
        found = real(steps)
        found[-1].past += len(found) > 1
        return found

    monkeypatch.setattr(decode, "_rows", rows)


@needs_cpp
@pytest.mark.parametrize("plant", [another_rows_state, rows_in_another_order, one_position_further])
def test_the_walk_notices_a_planted_fault(plant, monkeypatch):
    walk = Walk(0, torch.float32)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        walk.run(40)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_to_64_rows(dtype):
    """Of one cache and of separate ones, whatever their number; products group vectors by eight and tokens by 64."""
    model = small_model(dtype=dtype)
    caches = begun(model, [(70, 3, 64, 0)[n % 4] for n in range(64)])
    alone = [cache.fork()[0] for cache in caches]
    ids = tokens(1, b=64)
    expected = torch.cat([model.step(ids[n : n + 1], alone[n]) for n in range(64)])
    for count in (1, 2, 7, 8, 9, 17, 33, 64):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(count))[:count].tolist()
        forks = [caches[n].fork()[0] for n in order]
        assert torch.equal(model.step_many([ids[n] for n in order], forks), expected[order])
    batch = model.new_cache(33, max_len=900)
    list(model.prefill(tokens(65, b=33), batch))
    rows = [batch.select([n]) for n in range(33)]
    new = tokens(3, b=33)
    assert torch.equal(model.step(new, batch), torch.cat([model.step(new[n : n + 1], rows[n]) for n in range(33)]))


@needs_cpp
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_tokens_of_one_call_equal_one_by_one(dtype):
    """Up to MOST_TOKENS, across the border of two blocks of keys; fp64 within its own rounding rules too."""
    model = small_model(dtype=dtype)
    (cache,) = begun(model, [480])
    one, ids = cache.fork()[0], drawn(torch.Generator().manual_seed(0), MOST_TOKENS)
    got = model.step_many([ids], [cache], all_logits=True)
    assert torch.equal(got, torch.cat([model.step(token.view(1, 1), one) for token in ids]))
    assert same_state(cache, one)
    other = model.new_cache(max_len=900)
    with torch.no_grad():
        expected = model(torch.cat((one.tokens[:, :480], ids[None]), dim=1), cache=other).logits[0, -MOST_TOKENS:]
    assert (got - expected).abs().max() < {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float64: 1e-10}[dtype]


@needs_cpp
def test_later_tokens_do_not_reach_earlier_ones():
    """Also not where a later token's values are infinite: a product with a weight of zero would be NaN."""
    model = small_model()
    ids = torch.tensor([5, 6, 7, 8, 96])
    with torch.no_grad():
        model.embed_tokens.weight[96] = torch.inf
    cache, other = model.new_cache(), model.new_cache()
    for each in (cache, other):
        list(model.prefill(torch.arange(70)[None], each))
    got = model.step_many([ids], [cache], all_logits=True)
    assert torch.equal(got[:4], model.step_many([ids[:4]], [other], all_logits=True))
    assert got[:4].isfinite().all()
    assert not got[4].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_rows_of_any_length_and_modules(backend):
    """Long rows run in the modules beside short ones; without compiled code each row runs by itself."""
    model = small_model(dtype=torch.float64)
    model.set_backend("decode", backend)
    caches = begun(model, [9, 0, 70], mtp=True)
    alone = [cache.fork()[0] for cache in caches]
    new = [tokens(3)[0], tokens(MOST_TOKENS + 30)[0], tokens(1)[0]]
    got = model.step_many(new, caches, all_logits=True)
    wanted = []
    for ids, cache in zip(new, alone, strict=True):
        with torch.no_grad():
            wanted.append(model(ids[None], cache=cache).logits[0])
    assert (got - torch.cat(wanted)).abs().max() < 1e-10
    assert [c.lengths for c in caches] == [c.lengths for c in alone]
    last = model.step_many(new[:1], [caches[0].fork()[0]])
    assert last.shape == (1, 97)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_compiled_code_rows_are_exact_too(dtype):
    model = small_model(dtype=dtype)
    model.set_backend("decode", "torch")
    caches = begun(model, [9, 40])
    alone = [cache.fork()[0] for cache in caches]
    new = [tokens(3)[0], tokens(2)[0]]
    got = model.step_many(new, caches, all_logits=True)
    one = [model.step(token.view(1, 1), c) for ids, c in zip(new, alone, strict=True) for token in ids]
    assert torch.equal(got, torch.cat(one))


def test_hooks_fire_row_by_row():
    model, seen = small_model(), []
    caches = begun(model, [9, 4, 5])
    handle = model.hook_dict["blocks.0.linear_attn.hook_beta"].register_forward_hook(
        lambda module, args, x: seen.append((tuple(x.shape), model.hook_call["position"]))
    )
    model.step_many([tokens(1)[0]] * 3, caches)
    handle.remove()
    assert [position for _, position in seen] == [9, 4, 5]
    assert {shape[0] for shape, _ in seen} == {1}
    root = model.register_forward_hook(lambda *_: seen.append("root"))
    model.step_many([tokens(1)[0]] * 3, caches)
    root.remove()
    assert seen[3:] == ["root"] * 3


def test_a_refused_row_changes_no_cache():
    model = small_model()
    caches = begun(model, [9, 4])
    before = [cache.fork()[0] for cache in caches]
    good, full = tokens(1)[0], model.new_cache(max_len=3)
    other = small_model(linear_num_value_heads=6).new_cache()
    for rows, given, message in (
        ([good, good + 97], caches, "Row 1: input_ids are .* outside the vocabulary"),
        ([good, good.double()], caches, "Row 1: tokens must be integers"),
        ([good, good[None]], caches, "Row 1: tokens must be integers of shape"),
        ([good, good[:0]], caches, "Row 1: tokens must be integers"),
        ([good], caches, "1 rows of tokens and 2 caches"),
        ([], [], "0 rows of tokens and 0 caches"),
        ([good, good], [caches[0], caches[0]], "One cache is given for two rows"),
        ([good, tokens(4)[0]], [caches[0], full], "Row 1: The cache holds 3 tokens"),
        ([good, good], [caches[0], other], "Row 1: The cache was made for a model with linear_num_value_heads = 6"),
        ([good, good], [caches[0], model.new_cache(2)], "Row 1: The cache has 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model.step_many(rows, given)
    assert all(same_state(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize("history", [0, 4])
def test_a_call_that_fails_leaves_all_caches(history):
    model = small_model()
    caches = begun(model, [9, 4, 6], history=history)
    before = [cache.fork()[0] for cache in caches]
    calls = []

    def fail(module, args, x):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.blocks[3].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.step_many([tokens(1)[0]] * 3, caches)
    handle.remove()
    assert all(same_state(a, b) for a, b in zip(caches, before, strict=True))
    got, wanted = (model.step_many([tokens(2)[0]] * 3, rows) for rows in (caches, before))
    assert torch.equal(got, wanted)


@needs_cpp
def test_threads_leave_no_trace_in_rows():
    model, before = small_model(dtype=torch.bfloat16), torch.get_num_threads()
    caches, found = begun(model, [70, 3, 30, 9] * 3), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            forks = [cache.fork()[0] for cache in caches]
            found.append(torch.cat([model.step_many([tokens(2)[0]] * 12, forks) for _ in range(3)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], x) for x in found[1:])


WALK = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import conftest, torch
from test_step_many import Walk
for seed, dtype in ((0, torch.float32), (1, torch.bfloat16)):
    Walk(seed, dtype).run(15)
"""


@needs_cpp
@pytest.mark.parametrize(
    "choice", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avx2", "avx512", "avx512_bf16"))]
)
def test_every_choice_of_instructions(choice):
    """In a process of its own, since torch is bounded too. "none" runs the modules."""
    if choice not in cpu.possible():
        pytest.skip(f"this processor cannot execute {choice}")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "QWEN3NEXT_CPU": choice, "JAXTYPING_DISABLE": "1"}
    program = WALK.format(tests=str(here.parent), here=str(here))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_presets_step_together():
    """The usual initialisation, tied embeddings and the MTP layer's keys along with it."""
    model = q.Qwen3Next(q.presets.tiny())
    caches = [model.new_cache(mtp=True) for _ in range(3)]
    for ids in (torch.tensor([1, 2, 3]), torch.tensor([4])):
        assert model.step_many([ids, ids + 1, ids[:1]], caches).shape == (3, model.vocab_size)
    assert [cache.lengths for cache in caches] == [(4,), (4,), (2,)]
    assert model.draft(caches[0], torch.tensor([5])).shape == (1, model.vocab_size)
