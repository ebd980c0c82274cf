"""The HTTP interface through OpenAI's own client and through raw requests, over a real socket."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import small_model
from served import TEMPLATE, byte_tokenizer, serving

import qwen3next as q
from qwen3next import cli
from qwen3next.chat.template import ChatTemplate

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=257, eos_token_id=256)


@pytest.fixture(scope="module")
def running(model, tokenizer):
    yield from serving(model, tokenizer)


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0)


def alone(model, tokenizer, prompt, **options):
    ids = tokenizer.encode(prompt).ids
    run = q.Generation(model, torch.tensor([ids]), **options)
    for _ in run:
        pass
    new = [t for t in run.rows[0].text[len(ids) :] if t < 256]
    return tokenizer.decode(new)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}])
def test_a_completion_is_that_of_a_single_run(client, model, tokenizer, options):
    answer = client.completions.create(model="tiny", prompt="Once upon", max_tokens=12, **options)
    assert answer.choices[0].text == alone(model, tokenizer, "Once upon", max_new_tokens=12, **options)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.total_tokens == 9 + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_says(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 1, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.model_dump() == whole.usage.model_dump()
    assert texts[0] != texts[1]


def test_no_usage_chunk_where_none_was_asked_for(client):
    chunks = list(client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_thinking_is_apart(model, tokenizer, running, monkeypatch):
    """The template opens thinking; what the model says before it closes it is reasoning."""
    monkeypatch.setattr(running[1].chats, "template", ChatTemplate(TEMPLATE + "<think>"))
    client = openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, temperature=0
    )
    message = answer.choices[0].message
    assert not message.content
    assert message.reasoning == message.reasoning_content != ""


def test_stop_strings_and_log_probabilities(client, model, tokenizer):
    free = client.completions.create(model="tiny", prompt="Once", max_tokens=30, temperature=0, logprobs=2)
    text = free.choices[0].text
    found = free.choices[0].logprobs
    assert "".join(found.tokens) == text or "\ufffd" in text
    assert all(len(top) <= 2 for top in found.top_logprobs)
    part = next(text[i : i + 2] for i in range(3, len(text)) if "\ufffd" not in text[i : i + 2])
    stopped = client.completions.create(model="tiny", prompt="Once", max_tokens=30, temperature=0, stop=[part])
    assert stopped.choices[0].text == text[: text.index(part)]
    assert stopped.choices[0].finish_reason == "stop"
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 for entry in content)


def test_a_schema_is_followed(client):
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "switch", "schema": schema}},
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["on"], bool)


def test_many_at_once_and_early_close(client, model, tokenizer):
    """Thirty-two streams, every fourth of which is left after its first piece; all others equal single runs."""
    found = {}

    def ask(n):
        stream = client.completions.create(
            model="tiny", prompt=f"prompt {n}", max_tokens=15, seed=n, temperature=1.0, stream=True
        )
        text = ""
        for chunk in stream:
            text += chunk.choices[0].text
            if n % 4 == 0:
                stream.close()
                break
        found[n] = text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(32):
        expected = alone(model, tokenizer, f"prompt {n}", max_new_tokens=15, seed=n, temperature=1.0)
        assert found[n] == expected if n % 4 else expected.startswith(found[n])


def post(address, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


IMAGE, TOOL = "messages.0.content.0.type", "tool_choice"


def chat_of(**message):
    return {"model": "tiny", "messages": [message]}


GOOD = {"model": "tiny", "prompt": "x", "max_tokens": 1}


@pytest.mark.parametrize(
    "path, body, status, words, param",
    [
        ("/v1/completions", b"{", 400, "not valid JSON", None),
        ("/v1/completions", b"[]", 400, "", None),
        ("/v1/completions", {**GOOD, "best_of": 2}, 400, "best_of is not supported: leave it out", "best_of"),
        ("/v1/completions", {**GOOD, "temperature": "warm"}, 400, "temperature", "temperature"),
        ("/v1/completions", {**GOOD, "temperature": -1}, 400, "temperature", "temperature"),
        ("/v1/completions", {**GOOD, "prompt": []}, 400, "at least 1 item", "prompt"),
        ("/v1/completions", {**GOOD, "prompt": [300]}, 400, "a token outside", None),
        ("/v1/completions", {**GOOD, "logit_bias": {"999": 1}}, 400, "logit_bias has token 999", None),
        ("/v1/completions", {**GOOD, "max_tokens": 10**9}, 400, "exceed the context", None),
        ("/v1/completions", {**GOOD, "model": "other"}, 404, "There is no model 'other'", "model"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages", "messages"),
        (
            "/v1/chat/completions",
            chat_of(role="user", content="x", colour=1),
            400,
            "colour is not",
            "messages.0.colour",
        ),
        ("/v1/chat/completions", chat_of(role="user", content=[{"type": "image_url"}]), 400, "'text'", IMAGE),
        (
            "/v1/chat/completions",
            {**chat_of(role="user", content="x"), "tool_choice": "required"},
            400,
            "no tools",
            TOOL,
        ),
        ("/v1/nothing", GOOD, 404, "Not Found", None),
        ("/v1/models", GOOD, 405, "Method Not Allowed", None),
        ("/detokenize", {"tokens": [999]}, 400, "outside the vocabulary", "tokens"),
    ],
)
def test_bad_requests_get_an_error_that_says_why(running, path, body, status, words, param):
    found, answer = post(running[0], path, body)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
    assert answer["error"]["param"] == param


def test_a_body_that_is_too_large(running):
    assert post(running[0], "/v1/completions", b" " * (9 * 2**20))[0] == 413


def test_tokens_and_text(running, tokenizer):
    _, answer = post(running[0], "/tokenize", {"prompt": "Grüße"})
    assert answer == {"tokens": tokenizer.encode("Grüße").ids, "count": 7}
    assert post(running[0], "/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "Grüße"}


def test_health_and_metrics(running, client):
    client.completions.create(model="tiny", prompt="x", max_tokens=2)
    with urllib.request.urlopen(f"{running[0]}/health") as answer:
        assert json.loads(answer.read()) == {"status": "ok"}
    with urllib.request.urlopen(f"{running[0]}/metrics") as answer:
        text = answer.read().decode()
    assert "qwen3next_generated_tokens_total" in text
    assert 'qwen3next_requests_finished_total{reason="length"}' in text


def test_a_key_is_required(model, tokenizer):
    for address, _ in serving(model, tokenizer, api_key="secret"):
        assert post(address, "/v1/completions", GOOD)[0] == 401
        assert post(address, "/v1/completions", GOOD, Authorization="Bearer wrong")[0] == 401
        assert post(address, "/v1/completions", GOOD, Authorization="Bearer secret")[0] == 200


def test_a_full_queue_is_429(model, tokenizer):
    for address, server in serving(model, tokenizer, engine={"max_waiting": 1, "max_rows": 1}):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        streams = [client.completions.create(model="tiny", prompt="x", max_tokens=500, stream=True)]
        next(iter(streams[0]))
        streams.append(client.completions.create(model="tiny", prompt="x", max_tokens=500, stream=True))
        with pytest.raises(openai.RateLimitError, match="wait already"):
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        for stream in streams:
            stream.close()
        for _ in range(500):
            if not server.engine.running + server.engine.queued:
                break
            time.sleep(0.02)
        assert server.engine.running == server.engine.queued == 0


def test_other_machines_are_let_in_only_with_a_key(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("QWEN3NEXT_API_KEY", raising=False)
    assert cli.main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "can be reached from other machines: set QWEN3NEXT_API_KEY" in capsys.readouterr().err
