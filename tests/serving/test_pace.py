"""Running texts go on while a prompt runs: on machines of given speeds, and a clock that only their work moves."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import small_model

import qwen3next as q
from qwen3next.generation.pauses import pause, pauses
from qwen3next.generation.prefill import Prefilling
from qwen3next.serving import pace as paces
from qwen3next.serving.engine import Engine
from qwen3next.serving.tickets import Finished, Request

PROMISED = 0.25  # seconds between two tokens of a running text


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


# Seconds of half a block: fixed, a token, a token and token before it in softmax attention; of a step.
MACHINES = {
    "fast": (1e-4, 2e-5, 1e-9, 0.003),
    "weights": (0.02, 2e-4, 2e-8, 0.02),
    "attention": (0.001, 5e-5, 2e-7, 0.01),
    "slow": (0.08, 1e-5, 1e-9, 0.05),
    "slow steps": (0.01, 3e-4, 1e-8, 0.12),
}


@pytest.fixture
def machine(request, monkeypatch):
    """A model that computes nothing and moves the clock."""
    fixed, token, pair, step = MACHINES[request.param]
    clock, model = Clock(), small_model(max_position_embeddings=32_768)
    monkeypatch.setattr("qwen3next.serving.engine.time", clock)
    monkeypatch.setattr(paces, "time", clock)

    def run_block(block, x, _rope, *, segments, **_):
        past = segments.offsets[0] + x.shape[1] / 2
        clock.now += fixed + x.shape[1] * (token + pair * past * (block.mixer == "full_attention"))
        pause()
        clock.now += fixed + x.shape[1] * token
        return x, None

    def step_many(tokens, _caches, **_):
        clock.now += step
        return torch.zeros(len(tokens), model.vocab_size)

    monkeypatch.setattr("qwen3next.generation.prefill.run_block", run_block)
    monkeypatch.setattr(model, "step_many", step_many)
    return model, clock


def gaps(model, clock, lengths, *, seed=0):
    """Seconds between tokens of a text that runs while prompts of these lengths come one after the other."""
    rng, came = random.Random(seed), []
    with Engine(model, max_memory=2**30) as engine:
        text = engine.submit(Request((1, 2), 20_000))
        text.on_item = lambda: came.append(clock.now)
        for length in lengths:
            ids = tuple(rng.randrange(97) for _ in range(length))
            assert list(engine.submit(Request(ids, 1)))[-1] == Finished("length")
        text.cancel()
        list(text)
    return [b - a for a, b in pairwise(came[:-1])]


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_no_gap_is_longer_than_promised(machine):
    """A long prompt, then one that finds the machine measured, then short ones."""
    model, clock = machine
    found = gaps(model, clock, [8000, 3000, 500, 70, 8000])
    assert max(found) <= PROMISED
    assert len(found) > 20


@pytest.mark.parametrize("machine", ["weights"], indirect=True)
def test_a_slow_moment_is_forgotten(machine, monkeypatch):
    """A stretch that took long by chance makes the next pieces small; later ones are as large as before."""
    model, clock = machine
    asked, tokens = [], paces.Pace.tokens

    def noted(self, held, *, alone):
        asked.append((held, tokens(self, held, alone=alone)))
        if len(asked) == 10:
            clock.now += 5.0
        return asked[-1][1]

    monkeypatch.setattr(paces.Pace, "tokens", noted)
    gaps(model, clock, [8000] * 3)
    sizes = [size for _, size in asked[1:]]  # the first runs alone
    assert sizes[9] == 64
    assert max(sizes[10:]) >= max(sizes[:9]) > 64


def test_texts_go_on_between_blocks_and_stay_the_same(monkeypatch):
    """Steps at every pause of every piece, with cancellations: tokens are those of single runs."""
    monkeypatch.setattr(paces.Pace, "pause", lambda _: True)
    for dtype in (torch.float32, torch.bfloat16):
        model, rng = small_model(dtype=dtype), random.Random(3)
        requests = [Request(tuple(rng.randrange(97) for _ in range(n)), 24) for n in (5, 300, 70, 900, 130)]
        with Engine(model, prefix_memory="8MiB", draft_tokens=1) as engine:
            tickets = [engine.submit(request) for request in (*requests, replace(requests[3], seed=1))]
            tickets[4].on_item = tickets[3].cancel  # in the midst of a piece
            answers = [list(ticket) for ticket in tickets]
            assert engine.running == engine.reserved == 0
        for request, ticket, (*picked, _) in zip(requests, tickets, answers, strict=False):
            alone = q.generate(model, torch.tensor([request.ids]), max_new_tokens=24)[0, len(request.ids) :].tolist()
            got = [one.token for one in picked]
            assert got == (alone[: len(got)] if ticket.cancelled.is_set() else alone)


def test_a_prompt_is_abandoned_within_its_piece(monkeypatch):
    """A client that leaves, or an engine that closes, does not wait for the piece's end."""
    model, blocks = small_model(), []
    whole = Prefilling._run_block

    def run_block(self, block, x, rope, **options):
        blocks.append(x.shape[1])
        if len(blocks) == 2:
            ticket.cancel()
        return whole(self, block, x, rope, **options)

    monkeypatch.setattr(Prefilling, "_run_block", run_block)
    with Engine(model) as engine:
        ticket = engine.submit(Request((1, 2, 3) * 100, 4))
        assert list(ticket) == [Finished("cancelled")]
        assert len(blocks) == 2
        assert engine.running == 0
        assert list(engine.submit(Request((1, 2, 3) * 100, 4)))[-1] == Finished("length")


def test_pauses_leave_results_alone():
    """A pause in which the same model runs another text; what the pause raises leaves the cache as it was."""
    model = small_model()
    ids, other = torch.randint(97, (1, 2200)), torch.randint(97, (1, 30))
    expected, cache, calls = model.new_cache(max_len=2400), model.new_cache(max_len=2400), []
    next(model.prefill(ids, expected, 8192))

    def work():
        calls.append(model(other).logits)
        pause()  # has none of its own

    with pauses(work):
        next(model.prefill(ids, cache, 8192))
    assert len(calls) > 2 * len(model.blocks)
    assert torch.equal(cache.last_logits, expected.last_logits)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pauses(fail):
        next(model.prefill(ids[:, :100], cache, 8192))
    assert cache.lengths == (2200,)
    assert torch.equal(model.step(other[:, :1], cache), model.step(other[:, :1], expected))


def test_what_a_piece_tells_about_the_next(monkeypatch):
    """A long context, as behind a stored prefix, makes pieces smaller at once; a slow rest of a prompt does too."""
    clock, pace = Clock(), paces.Pace()
    monkeypatch.setattr(paces, "time", clock)

    def piece(held, ran, seconds):
        pace.begin()
        pace.tokens(held, alone=False)
        clock.now += seconds
        pace.end(held, ran)

    assert pace.tokens(30_000, alone=False) == 64  # nothing is known
    for size in (64, 256, 1024):
        piece(0, size, size * 1e-4)
    assert pace.tokens(1024, alone=False) < 1024
    assert pace.tokens(0, alone=False) == 960
    assert pace.tokens(30_000, alone=False) == 64
    piece(1024, 64, 0.02)  # the prompt's end: quick, and not like longer ones
    assert pace.tokens(0, alone=False) == 960
    piece(1024, 64, 0.2)
    assert pace.tokens(0, alone=False) == 64
