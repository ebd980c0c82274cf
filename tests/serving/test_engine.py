"""Every answer equals that of a single run, whatever arrives when, runs beside it or is cancelled."""

import random
import time

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


def drawn(rng):
    ids = tuple(rng.randrange(97) for _ in range(rng.choice([1, 3, 70, 200])))
    return Request(ids, rng.randrange(1, 25), rng.choice(CHOICES), rng.randrange(1000))


@pytest.mark.parametrize("seed", range(3))
def test_any_traffic(model, seed):
    """Requests that come at random, some of which are cancelled; at most four texts run together."""
    rng = random.Random(seed)
    requests = [drawn(rng) for _ in range(20)]
    with Engine(model, max_rows=4, max_waiting=30) as engine:
        tickets = []
        for request in requests:
            tickets.append(engine.submit(request))
            if rng.random() < 0.3:
                rng.choice(tickets).cancel()
            time.sleep(rng.random() * 0.02)
        answers = [list(ticket) for ticket in tickets]
        assert engine.running == engine.queued == engine.reserved == 0
    for request, ticket, answer in zip(requests, tickets, answers, strict=True):
        *tokens, end = answer
        expected = alone(model, request)
        if ticket.cancelled.is_set() and end.reason == "cancelled":
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            stopped = tokens[-1].token in request.choice.stop_tokens
            assert end == Finished("stop" if stopped else "length")
    assert sum(engine.counters.finished.values()) == 20


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
