"""Every answer equals that of a single run, whatever arrives when, runs beside it or is cancelled."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import small_model

import qwen3next as q
from qwen3next.generation.choice import Choice
from qwen3next.generation.sampling_rules import SamplingRules
from qwen3next.serving.engine import Engine
from qwen3next.serving.tickets import Busy, Finished, Refused, Request

CHOICES = [
    Choice(),
    Choice(temperature=1.0),
    Choice(temperature=0.8, top_p=0.8, rules=SamplingRules(frequency_penalty=0.5)),
    Choice(stop_tokens=tuple(range(0, 97, 9)), logprobs=2),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return small_model(dtype=request.param)


def alone(model, request):
    """The new tokens of a single run."""
    c = request.choice
    run = q.Generation(
        model,
        torch.tensor([request.ids]),
        max_new_tokens=request.most,
        temperature=c.temperature,
        top_p=c.top_p,
        rules=c.rules,
        stop_tokens=c.stop_tokens,
        logprobs=c.logprobs,
        seed=[request.seed],
    )
    return [picked for gained in run for picked in gained[0]]


TEXTS = [[random.Random(n).randrange(97) for _ in range(400)] for n in range(2)]


def drawn(rng):
    """A request; prompts often begin alike."""
    shared = rng.choice(TEXTS)[: rng.choice([0, 63, 64, 150, 260, 260])]
    ids = (*shared, *(rng.randrange(97) for _ in range(rng.choice([1, 3, 15, 16, 70]))))
    return Request(ids, rng.randrange(1, 25), rng.choice(CHOICES), rng.randrange(1000), points=(len(shared),))


def held_to_single_runs(model, requests, tickets, answers):
    for request, ticket, answer in zip(requests, tickets, answers, strict=True):
        *tokens, end = answer
        expected = alone(model, request)
        if ticket.cancelled.is_set() and end.reason == "cancelled":
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            stopped = tokens[-1].token in request.choice.stop_tokens
            assert end == Finished("stop" if stopped else "length")


OPTIONS = {
    "plain": {},
    "prefixes": {"prefix_memory": "1MiB"},
    "drafts": {"draft_tokens": 2},
    "drafts and prefixes": {"draft_tokens": "auto", "prefix_memory": "64MiB"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_any_traffic(model, options):
    """Requests that come at random, some of which are cancelled; at most four texts run together."""
    rng = random.Random(options)
    requests = [drawn(rng) for _ in range(12)]
    with Engine(model, max_rows=4, max_waiting=30, **OPTIONS[options]) as engine:
        tickets = []
        for request in requests:
            tickets.append(engine.submit(request))
            if rng.random() < 0.3:
                rng.choice(tickets).cancel()
            time.sleep(rng.random() * 0.02)
        answers = [list(ticket) for ticket in tickets]
        assert engine.running == engine.queued == engine.reserved == 0
    held_to_single_runs(model, requests, tickets, answers)
    counters = engine.counters
    assert sum(counters.finished.values()) == 12
    assert sum(ticket.cached_tokens for ticket in tickets) == counters.cached_tokens
    assert (counters.cached_tokens > 0) == ("prefixes" in options)
    assert counters.drafted >= counters.accepted
    assert (counters.drafted > 0) == ("drafts" in options)


def test_two_servers_share_a_folder(model, tmp_path):
    """What one has run, the other need not run, at once and after both have ended."""
    rng = random.Random(5)
    options = {"prefix_memory": "1MiB", "prefix_folder": tmp_path}
    with Engine(model, **options) as one, Engine(model, **options) as other:
        first = one.submit(Request((*TEXTS[0][:200], 1), 4))
        list(first)
        assert one.store.flush(30.0)
        second = other.submit(Request((*TEXTS[0][:200], 2), 4))
        list(second)
        assert (first.cached_tokens, second.cached_tokens) == (0, 128)
        requests = [drawn(rng) for _ in range(10)]
        tickets = [rng.choice([one, other]).submit(request) for request in requests]
        answers = [list(ticket) for ticket in tickets]
    held_to_single_runs(model, requests, tickets, answers)
    with Engine(model, **options) as later:
        third = later.submit(Request((*TEXTS[0][:200], 3), 4))
        list(third)
    assert third.cached_tokens == 128


def test_it_is_said_why_no_more_tokens_were_cached(model):
    prompt = tuple(TEXTS[1][:150])
    with Engine(model, prefix_memory="8MiB") as engine:
        tickets = [engine.submit(Request(ids, 2)) for ids in (prompt, prompt, prompt[:100], (*prompt, *prompt))]
        for ticket in tickets:
            list(ticket)
    assert [ticket.cached_tokens for ticket in tickets] == [0, 128, 0, 128]
    assert tickets[0].not_cached == "Nothing is stored yet."
    assert tickets[1].not_cached == "Results stay equal to the bit only if the tokens from 128 on run again."
    assert tickets[2].not_cached == "Tokens 0 to 100 are stored, but without a state after any of them."
    assert tickets[3].not_cached == "The stored text ends there."
    with Engine(model) as engine:
        ticket = engine.submit(Request(prompt, 2))
        list(ticket)
    assert (ticket.cached_tokens, ticket.not_cached) == (0, "The server keeps no prefixes.")


def test_a_folder_that_cannot_be_written_harms_no_answer(model, tmp_path, monkeypatch, caplog):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("qwen3next.files.checksummed.write", full)
    caplog.set_level("WARNING", "qwen3next.prefix.writer")
    requests = [Request((*TEXTS[0][:n], 1), 6) for n in (200, 200, 130)]
    with Engine(model, prefix_memory="8MiB", prefix_folder=tmp_path) as engine:
        tickets = [engine.submit(request) for request in requests]
        answers = [list(ticket) for ticket in tickets]
    held_to_single_runs(model, requests, tickets, answers)
    assert "a prefix was not written: No space left on device" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_a_slow_folder_delays_nobody(model, tmp_path, monkeypatch):
    """While a file is being written, answers come; what the writing holds up is written before the engine ends."""
    going, write = threading.Event(), q.prefix.files.write_checksummed

    def slow(*args):
        assert going.wait(60)
        write(*args)

    monkeypatch.setattr("qwen3next.prefix.files.write_checksummed", slow)
    requests = [Request((*TEXTS[0][:n], 1), 6) for n in (200, 200, 130)]
    with Engine(model, prefix_memory="8MiB", prefix_folder=tmp_path) as engine:
        tickets = [engine.submit(request) for request in requests]
        answers = [list(ticket) for ticket in tickets]
        assert not list(tmp_path.rglob("*.safetensors"))
        assert [ticket.cached_tokens for ticket in tickets] == [0, 128, 0]
        going.set()
    held_to_single_runs(model, requests, tickets, answers)
    assert q.PrefixStore(model, folder=tmp_path, exact=True).match(torch.tensor(requests[0].ids)).matched_tokens == 128


def test_a_grammar_that_cannot_begin_harms_its_own_request_alone(model):
    class Broken:
        def start(self):
            raise RuntimeError("broken")

    good = Request((1, 2, 3), 5)
    with Engine(model) as engine:
        tickets = [engine.submit(request) for request in (good, replace(good, grammar=Broken()), good)]
        answers = [list(ticket) for ticket in tickets]
        assert engine.healthy
    assert answers[1] == [Finished("error", "broken")]
    assert answers[0] == answers[2]
    assert len(answers[0]) == 6


def test_requests_are_queued_together_or_not_at_all(model):
    with Engine(model, max_waiting=2, max_rows=1) as engine:
        long = engine.submit(Request((1, 2), 400))
        while engine.queued:
            time.sleep(0.001)
        waiting = engine.submit(Request((1, 2), 4))
        with pytest.raises(Busy, match="1 requests wait already"):
            engine.submit_all([Request((1,), 1)] * 2)
        assert engine.queued == 1
        with pytest.raises(Refused):
            engine.submit_all([Request((1,), 1), Request((97,), 1)])
        assert engine.queued == 1
        long.cancel()
        assert list(waiting)[-1].reason == "length"


def test_a_text_ends_where_it_is_told(model):
    request = Request((1, 2, 3), 20, ends=lambda new: len(new) == 5)
    with Engine(model) as engine:
        *tokens, end = engine.submit(request)
    assert (len(tokens), end.reason) == (5, "stop")


def test_what_can_never_fit_is_refused_at_once(model):
    with Engine(model, max_memory=200_000) as engine:
        with pytest.raises(Refused, match=r"needs .* and the server has 195 KiB for all requests"):
            engine.submit(Request((1,) * 900, 100))
        with pytest.raises(Refused, match="at least one prompt token"):
            engine.submit(Request((), 5))
        with pytest.raises(Refused, match="a token outside 0 to 96"):
            engine.submit(Request((97,), 5))
        with pytest.raises(Refused, match="exceed the context"):
            engine.submit(Request((1,), 10**9))
        with pytest.raises(ValueError, match="logit_bias has token 99"):
            engine.submit(Request((1,), 5, Choice(logit_bias={99: 1.0})))


def test_memory_is_reserved_for_all_of_a_request(model):
    """Two requests that do not fit together run one after the other, and both are answered."""
    request = Request((1,) * 64, 20)
    needed = Engine(model).bytes_for(request)
    with Engine(model, max_memory=int(1.5 * needed)) as engine:
        tickets = [engine.submit(request) for _ in "ab"]
        most = 0
        while engine.queued or engine.running:
            most = max(most, engine.reserved)
        assert 0 < most <= needed
        assert [list(ticket)[-1].reason for ticket in tickets] == ["length"] * 2


def test_a_full_queue_says_so(model):
    engine = Engine(model, max_waiting=2, max_rows=1)
    with engine:
        long = [engine.submit(Request((1, 2), 400))]
        while engine.queued:
            time.sleep(0.001)
        long += [engine.submit(Request((1, 2), 400)) for _ in "ab"]
        with pytest.raises(Busy, match="2 requests wait already"):
            engine.submit(Request((1,), 1))
    assert {list(ticket)[-1].reason for ticket in long} == {"cancelled"}
    with pytest.raises(RuntimeError, match="not running"):
        engine.submit(Request((1,), 1))


def test_a_request_that_fails_does_not_harm_the_others(model):
    def fail(new):
        raise ValueError("a fault of the caller\nwith details")

    good = Request((1, 2, 3), 12)
    with Engine(model) as engine:
        tickets = [engine.submit(good), engine.submit(Request((4, 5), 12, ends=fail)), engine.submit(good)]
        answers = [list(ticket) for ticket in tickets]
    assert answers[0][:-1] == answers[2][:-1] == alone(model, good)
    assert answers[1][-1] == Finished("error", "a fault of the caller")


def test_running_texts_go_on_while_a_long_prompt_arrives(model):
    """Between two pieces of the prompt every running text gains a token."""
    with Engine(model) as engine:
        short = engine.submit(Request((1, 2), 300))
        items = iter(short)
        next(items)
        long = engine.submit(Request((5,) * 3000, 1))
        seen = 0
        while not long.taken():
            next(items)
            seen += 1
        assert seen >= 5
        short.cancel()
