"""Drafts change the time alone: tokens, log-probabilities and the cache equal those of plain generation."""

import pytest
import torch
from conftest import small_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

import qwen3next as q
from layers.segments import Segments
from qwen3next.generation.choice import Choice
from qwen3next.generation.drafts import DraftLength, Measured, MTPDrafts, PromptLookup, measured
from qwen3next.generation.generate import Generation
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.rounds import Row
from qwen3next.generation.sampling_rules import SamplingRules


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return small_model(dtype=request.param)


def prompts(rows, length=9):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(rows))


WAYS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "nucleus": {"temperature": 0.8, "top_p": 0.8, "top_k": 20, "seed": 6},
    "penalised": {
        "temperature": 0.7,
        "seed": 7,
        "rules": SamplingRules(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, min_new_tokens=5),
    },
    "biased": {"logit_bias": {4: 3.0, 9: 2.5}, "temperature": 1.0, "seed": 8},
}


class Oracle:
    """Drafts what will come, with every third guess wrong."""

    def __init__(self, texts):
        self.texts = texts

    def draft(self, cache, texts, count):
        found = []
        for row, text in enumerate(texts):
            right = self.texts[row][len(text) : len(text) + count]
            found.append([(t + 1) % 97 if (len(text) + j) % 3 == 0 else t for j, t in enumerate(right)])
        return found


def run(model, ids, *, drafter=None, count=3, **options):
    """Tokens and log-probabilities of each row, and the cache."""
    segments = options.pop("segments", None)
    generation = Generation(
        model, ids, segments=segments, max_new_tokens=20, logprobs=2, draft_tokens=count if drafter else 0, **options
    )
    if drafter is not None:
        generation._drafter = drafter
    found = [[] for _ in generation.rows]
    for gained in generation:
        for row, new in zip(found, gained, strict=True):
            row += new
    return found, generation


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_and_log_probabilities_are_those_of_plain_generation(model, way, rows):
    ids = prompts(rows)
    plain, before = run(model, ids, **WAYS[way])
    texts = [row.text for row in before.rows]
    for drafter in (Oracle(texts), MTPDrafts(model), PromptLookup(longest=2, shortest=1)):
        for count in (1, 3):
            found, after = run(model, ids, drafter=drafter, count=count, **WAYS[way])
            assert found == plain
            assert after.cache.lengths == before.cache.lengths
            assert torch.equal(after.cache.last_logits, before.cache.last_logits)
            tokens = torch.zeros(rows, 1, dtype=torch.long)
            assert torch.equal(model.step(tokens, after.cache), model.step(tokens, before.cache.fork()[0]))


def test_rows_that_stop_at_different_places(model):
    """Stop tokens inside a draft; padded prompts; each row equals its own run."""
    ids, mask = prompts(4), torch.ones(4, 9, dtype=torch.long)
    mask[1, :4] = mask[3, :7] = 0
    free, _ = run(model, ids, segments=Segments.from_mask(mask))
    stops = sorted({free[0][4].token, free[2][9].token})
    options = {"segments": Segments.from_mask(mask), "stop_tokens": stops}
    plain, before = run(model, ids, **options)
    assert len({len(row) for row in plain}) > 1
    found, after = run(model, ids, drafter=Oracle([row.text for row in before.rows]), **options)
    assert found == plain
    assert after.cache.lengths == before.cache.lengths
    alone, _ = run(model, ids[3:, 7:], stop_tokens=stops)
    assert [p.token for p in alone[0]] == [p.token for p in plain[3]]


def test_goes_on_after_fork_rollback_snapshot_and_a_file(model, tmp_path):
    ids = prompts(2)
    whole = q.generate(model, ids, max_new_tokens=30)
    cache = model.new_cache(2, max_len=80, history=8, mtp=True)
    part = q.generate(model, ids, cache=cache, max_new_tokens=12, draft_tokens=3)
    assert torch.equal(part, whole[:, :21])
    cache.snapshot("here")
    (fork,) = cache.fork()
    cache.save(tmp_path / "cache")
    loaded = q.HybridCache.load(tmp_path / "cache", model, max_len=80, history=8)
    for way in (fork, loaded, cache):
        assert torch.equal(q.generate(model, part, cache=way, max_new_tokens=18, draft_tokens=3), whole)
    cache.restore("here")
    assert torch.equal(q.generate(model, part, cache=cache, max_new_tokens=18, draft_tokens=2), whole)
    cache.restore("here")
    cache.rollback(0)
    assert torch.equal(q.generate(model, part, cache=cache, max_new_tokens=18, draft_tokens="auto"), whole)


def test_report_counts_by_place(model):
    ids = prompts(1)
    _, before = run(model, ids)
    _, after = run(model, ids, drafter=Oracle([row.text for row in before.rows]))
    report = after.report
    assert report.drafted[0] in (report.rounds, report.rounds - 1)  # the last one may have no room for drafts
    assert report.tokens == 19  # the prompt gives the first
    assert report.accepted[0] > 0
    assert sum(report.accepted) + report.row_rounds == report.tokens
    assert report.mean_length == report.tokens / report.row_rounds > 1


def test_the_mtp_layer_sees_what_plain_generation_remembers(model):
    """Its keys and values after speculation are those of the accepted tokens' true hidden states, up to rounding."""
    ids = prompts(1)
    caches = []
    for drafter in (None, MTPDrafts(model)):
        cache = model.new_cache(1, max_len=60, history=8, mtp=True)
        run(model, ids, drafter=drafter, cache=cache)
        caches.append(cache)
    held = caches[0].lengths[0] - 1
    for a, b in zip(*(c.mtp.read(0, held) for c in caches), strict=True):
        assert close(a, b)
    drafts = [model.draft_tokens(c, torch.tensor([5]), 3) for c in caches]
    assert torch.equal(*drafts)
    assert int(drafts[0][0, 0]) == int(model.draft(caches[0], torch.tensor([5])).argmax())


def test_lookup_takes_the_longest_and_latest_match():
    cache = small_model().new_cache()
    lookup = PromptLookup(longest=3, shortest=1)
    assert lookup.draft(cache, [[1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3, 7, 1, 2, 3]], 4) == [[8, 5, 2, 3]]
    assert lookup.draft(cache, [[1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3, 7, 1, 2, 3, 7]], 2) == [[1, 2]]
    assert lookup.draft(cache, [[4]], 2) == [[]]
    assert PromptLookup(longest=2, shortest=2).draft(cache, [[1, 2, 5, 2]], 2) == [[]]


class Clock:
    """A machine on which a round costs 1 + `slope` a draft, and the first `right` drafts are accepted."""

    def __init__(self, slope, right):
        self.now, self.slope, self.right = 0.0, slope, right

    def __call__(self):
        return self.now

    def spend(self, length, tokens=2000):
        made = 0
        while made < tokens:
            k = length.begin()
            self.now += 1 + self.slope * k
            length.end(k, [min(k, self.right)])
            made += 1 + min(k, self.right)
        return self.now / made


@pytest.mark.parametrize("slope, right, expected", [(0.2, 4, 4), (0.2, 0, 0), (1.5, 4, 0), (0.3, 1, 1), (0.3, 2, 2)])
def test_auto_finds_what_pays(slope, right, expected):
    length = DraftLength(4, adapt=True, clock=(clock := Clock(slope, right)))
    per_token = clock.spend(length)
    assert length.best() == expected
    cheapest = min((1 + slope * k) / (1 + min(k, right)) for k in range(5))
    assert per_token <= 1.05 * cheapest


def test_auto_gets_over_a_time_that_was_measured_on_a_busy_machine():
    """The first round with drafts takes ten times as long; soon drafts are used as if it had not."""
    length = DraftLength(4, adapt=True, clock=(clock := Clock(0.2, 4)))
    for drafts, seconds in ((0, 1), (0, 1), (1, 12)):
        assert length.begin() == drafts
        clock.now += seconds
        length.end(drafts, [drafts])
    clock.spend(length, 4000)
    assert length.best() == 4


def test_auto_finds_in_a_short_text_what_pays():
    """Within 130 tokens; the first round of each length takes long, as where something is prepared in it."""
    length = DraftLength(4, adapt=True, clock=(clock := Clock(0.2, 4)))
    seen = set()
    made = 0
    while made < 130:
        k = length.begin()
        clock.now += 1 + 0.2 * k + (0 if k in seen else 5)
        seen.add(k)
        length.end(k, [k])
        made += 1 + k
    assert clock.now - 5 * len(seen) < 0.5 * made


def test_a_generation_goes_on_from_what_earlier_ones_measured():
    """Costs are known; how easy the text is to guess is learned anew within a few rounds."""
    known = Measured()
    first = DraftLength(4, adapt=True, known=known, clock=(clock := Clock(0.2, 4)))
    clock.spend(first, 100)
    second = DraftLength(4, adapt=True, known=known, clock=(clock := Clock(0.2, 4)))
    assert second.begin() == 4
    clock.right = 0
    clock.spend(second, 60)
    assert second.best() == 0


def test_measurements_belong_to_model_drafter_rows_and_sampling(model):
    ids = prompts(1)
    list(Generation(model, ids, max_new_tokens=8, stop_tokens=(), draft_tokens="auto", drafts="lookup"))
    assert measured(model, "lookup", 1, sampled=False).rounds
    for other in (("lookup", 1, True), ("lookup", 2, False), ("mtp", 1, False)):
        assert not measured(small_model(), *other[:2], sampled=other[2]).rounds
        assert measured(model, *other[:2], sampled=other[2]) is not measured(model, "lookup", 1, sampled=False)


def test_lookup_needs_nothing_of_the_mtp_layer(model):
    run = Generation(model, prompts(1), max_new_tokens=4, draft_tokens=2, drafts="lookup")
    assert run.cache.mtp is None


@pytest.mark.parametrize("slope, right", [(0.2, 0), (1.5, 4), (1.2, 1)])
def test_auto_costs_little_where_drafts_do_not_pay(slope, right):
    """At most 3% over plain steps, which cost 1 a token, over 300 tokens and more."""
    for tokens in (300, 3000):
        clock = Clock(slope, right)
        assert clock.spend(DraftLength(4, adapt=True, clock=clock), tokens) <= 1.03


@pytest.mark.parametrize(
    "options, words",
    [
        ({"draft_tokens": -1}, "draft_tokens must be a number from 0"),
        ({"draft_tokens": "many"}, "draft_tokens must be a number from 0"),
        ({"draft_tokens": 2, "drafts": "guess"}, "no drafts 'guess'"),
        ({"n": 0}, "n must be at least 1"),
        ({"seed": [1, 2]}, "seed has 2 numbers for 1 rows"),
    ],
)
def test_bad_options_are_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        Generation(model, prompts(1), **options)


@pytest.mark.parametrize("history", [0, 2, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_drafts_need_neither_history_nor_room(model, history, rows):
    """The cache just holds the text, and remembers afterwards what it was made to remember."""
    ids, most = prompts(rows), 28
    plain = model.new_cache(rows, max_len=most, history=history, mtp=True)
    expected = q.generate(model, ids, cache=plain, max_new_tokens=20)
    for draft_tokens in (3, "auto"):
        cache = model.new_cache(rows, max_len=most, history=history, mtp=True)
        assert torch.equal(q.generate(model, ids, cache=cache, max_new_tokens=20, draft_tokens=draft_tokens), expected)
        assert (cache.history, cache.lengths) == (history, plain.lengths)
        back = 2 if history else 0
        if not history:
            with pytest.raises(ValueError, match="larger history="):
                cache.rollback(1)
        cache.rollback(back)
        again = plain.fork()[0]
        again.rollback(back)
        assert torch.equal(cache.last_logits, again.last_logits)
        for one in (cache, again):
            one.lengthen(most + 1)
        token = torch.ones(rows, 1, dtype=torch.long)
        assert torch.equal(model.step(token, cache), model.step(token, again))


def test_a_model_without_mtp_looks_up():
    bare = small_model(mtp_num_hidden_layers=0)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3]])
    assert torch.equal(
        q.generate(bare, ids, max_new_tokens=12, draft_tokens=2), q.generate(bare, ids, max_new_tokens=12)
    )
    with pytest.raises(ValueError, match=r'has no MTP layer.*drafts="lookup"'):
        q.generate(bare, ids, draft_tokens=2, drafts="mtp")


def test_several_texts_of_one_prompt(model):
    """The first is that of a single run; all differ in their numbers, and each equals a run with its own seed."""
    ids = prompts(2)
    options = {"temperature": 1.0, "max_new_tokens": 8}
    texts = q.generate(model, ids, n=3, seed=1, **options)
    assert texts.shape == (6, 17)
    assert torch.equal(texts[:3, :9], ids[:1].expand(3, -1))
    run_ = Generation(model, ids, n=3, seed=1, **options)
    for r in range(6):
        alone = q.generate(model, ids[r // 3 : r // 3 + 1], seed=[run_.rows[r].seed], **options)
        assert torch.equal(alone[0], texts[r])
    assert len({tuple(t) for t in texts.tolist()}) == 6


def test_a_row_is_chosen_until_a_draft_is_wrong():
    row = Row([1], 1, Choice(), 0, 9)
    logits = torch.eye(6)[[2, 3, 4]]
    assert [p.token for p in row.take(logits, [2, 5])] == [2, 3]
    assert row.text == [1, 2, 3]
    row = Row([1], 1, Choice(stop_tokens=(3,)), 0, 9)
    assert [p.token for p in row.take(logits, [2, 3])] == [2, 3]
    assert row.done
    row = Row([1], 1, Choice(), 0, 2)
    assert len(row.take(logits, [2, 3])) == 2
    assert row.done


def close(a, b):
    """Products of several tokens are summed in another order than those of one."""
    return (a.double() - b.double()).norm() <= (1e-5 if a.dtype == torch.float32 else 1e-2) * b.double().norm()


def remembered(model, ids, drafter=None):
    """The MTP layer's keys and values after a generation, those of the text's pairs."""
    cache = model.new_cache(1, max_len=60, history=8, mtp=True)
    run(model, ids, drafter=drafter, cache=cache)
    return torch.stack(cache.mtp.read(0, cache.lengths[0] - 1))


@pytest.mark.parametrize("fault", ["none", "hidden before the final norm", "cold MTP cache", "stale MTP rows"])
def test_planted_faults_of_the_mtp_layer_are_noticed(monkeypatch, fault):
    model, ids = small_model(), prompts(1)
    texts = [[*ids[0].tolist(), *(p.token for p in run(model, ids)[0][0])]]
    right, kind, written = remembered(model, ids), type(model.mtp), [0]
    remember = kind.remember

    def cold(self, hidden, waiting, embedding, rope, segments, state):
        zeros = torch.zeros_like if segments.length > 1 else torch.clone
        remember(self, zeros(hidden), zeros(waiting), zeros(embedding), rope, segments, state)

    def stale(self, hidden, waiting, embedding, rope, segments, state):
        if segments.ends[0] > written[0]:  # what lies there from a rejected draft stays
            written[0] = segments.ends[0]
            remember(self, hidden, waiting, embedding, rope, segments, state)

    def unnormed(self, hidden, waiting, embedding, rope, segments, state):
        remember(self, 2 * hidden + 1, 2 * waiting + 1, embedding, rope, segments, state)

    faults = {"hidden before the final norm": unnormed, "cold MTP cache": cold, "stale MTP rows": stale}
    monkeypatch.setattr(kind, "remember", faults.get(fault, remember))
    assert close(remembered(model, ids, Oracle(texts)), right) == (fault == "none")


@pytest.mark.parametrize("fault", ["none", "penalties once a call", "grammar off by one"])
def test_planted_faults_of_choosing_are_noticed(monkeypatch, fault):
    """Tokens are chosen under rules that depend on each other's order, and under a grammar that begins in a draft."""
    model, ids = small_model(), prompts(1)
    options = {"rules": SamplingRules(frequency_penalty=2.0), "temperature": 1.0, "seed": 3}
    if fault == "grammar off by one":
        options = {"grammar": alternating(after=run(model, ids)[0][0][2].token)}
    right, before = run(model, ids, **options)
    take = Row.take

    def once(self, logits, drafts=()):
        """All tokens of a call are chosen as if they followed the text at its start."""
        start, choose = list(self.text), self.choice
        late = type("Late", (), {"stop_tokens": (), "pick": lambda _, x, text, **o: choose.pick(x, start, **o)})()
        self.choice = late
        try:
            return take(self, logits, drafts)
        finally:
            self.choice = choose

    def behind(self, logits, drafts=()):
        """The grammar learns a token late when drafts are checked."""
        if drafts and self.grammar is not None and self.grammar.matcher is None:
            kept, self.grammar = self.grammar, None
            taken = take(self, logits, drafts)
            self.grammar = kept.then(taken[-1].token)
            return taken
        return take(self, logits, drafts)

    faults = {"penalties once a call": once, "grammar off by one": behind}
    monkeypatch.setattr(Row, "take", faults.get(fault, take))
    found, _ = run(model, ids, drafter=Oracle([row.text for row in before.rows]), **options)
    assert (found == right) == (fault == "none")


def alternating(after):
    """Behind a token, letters of two kinds take turns."""
    return Grammar.regex("([a-m][n-z])*", letters(), stop_tokens=[96], after=[after])


def letters():
    """A tokenizer of 94 printable characters and three special tokens, as wide as the model's vocabulary."""
    vocab = {chr(33 + i): i for i in range(94)} | {f"<{i}>": 94 + i for i in range(3)}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens([f"<{i}>" for i in range(3)])
    return tokenizer


def test_rounds_without_drafts_are_steps(model):
    ids = prompts(1)
    generation = Generation(model, ids, max_new_tokens=3)
    assert [len(gained[0]) for gained in generation] == [1, 1, 1]
