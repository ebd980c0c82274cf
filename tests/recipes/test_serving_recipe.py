"""Traffic on servers is measured, summarised, written and continued; the servers here give their pieces on time."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from recipes import serving
from recipes.serving import Options, Row, Served, arrival, measure, prompt_of, table, table_of_arrivals


class Fake(Served):
    """A server in this process: `first` seconds, then a token every `step`."""

    def __init__(self, name, first, step, reason="length"):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                self._say({"content": body["messages"][0]["content"]})  # as transformers does
                time.sleep(first)
                for _ in range(body["max_tokens"]):
                    self._say({"content": "x"})
                    time.sleep(step)
                self._say({}, reason)

            def _say(self, delta, reason=None):
                event = {"choices": [{"delta": delta, "finish_reason": reason}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()

        self.name, self.model, self.timeout = name, "m", 20.0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def test_a_row():
    servers = [Fake("qwen3next", 0.05, 0.01), Fake("transformers", 0.3, 0.05), Fake("early", 0.0, 0.0, "stop")]
    rows = {row.server: row for row in measure(Options(repetitions=1, new=8), servers, 2, 64, False)}
    for server in servers:
        server.close()
    ours, theirs = rows["qwen3next"], rows["transformers"]
    assert 0.05 <= ours.first <= ours.slowest
    assert theirs.first >= 0.3  # the prompt that came back before is no token
    assert 0.01 <= ours.between <= ours.gap
    assert theirs.between >= 0.05
    assert ours.ratio == 1
    assert theirs.ratio == pytest.approx(ours.rate / theirs.rate)
    assert rows["early"].problem == "an answer ended early (stop)"
    assert "an answer ended early" in table(list(rows.values()))


def test_prompts_that_arrive_beside_a_stream():
    """The stream of the server here does not wait for the prompt, so its gaps are those of its steps."""
    server = Fake("qwen3next", 0.2, 0.01)
    row = arrival(Options(repetitions=2), server, 64)
    server.close()
    assert row.problem == ""
    assert row.first >= 0.2
    assert row.before >= 0.01
    assert 0.01 <= row.between <= row.late <= row.gap
    assert row.gaps >= 2 * 2
    ended = Fake("qwen3next", 0.0, 0.0, "stop")
    short = arrival(Options(repetitions=2), ended, 64)
    ended.close()
    assert "ended early" in short.problem
    assert "one request after the other" in arrival(Options(), Fake("transformers", 0.0, 0.0), 64).problem
    said = table_of_arrivals([row, short])
    assert said.count("| qwen3next |") == 2
    assert "ended early" in said


def test_prompts():
    assert len(prompt_of(1, 100, False)) == len(prompt_of(1, 100, True)) == 100
    assert prompt_of(1, 100, False)[:10] != prompt_of(2, 100, False)[:10]
    assert prompt_of(1, 100, True)[:84] == prompt_of(2, 100, True)[:84]
    assert prompt_of(1, 100, True) != prompt_of(2, 100, True)


def test_no_prompt_is_asked_twice(monkeypatch):
    asked = []

    def traffic(_server, prompts, _new):
        asked.extend(prompts)
        return 0.0, [serving.Times([1.0, 2.0]) for _ in prompts]

    monkeypatch.setattr(serving, "traffic", traffic)
    server = Fake("qwen3next", 0.0, 0.0)
    for users in (1, 2, 8):
        for shared in (False, True):
            measure(Options(repetitions=2), [server], users, 64, shared)
    server.close()
    assert len(set(asked)) == len(asked) == 2 * 3 * 11


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """Rows are written as they come; what is there is not measured again."""
    asked = []

    class Started:
        def __enter__(self):
            return [object()], {"llama-server": "not on the PATH"}

        def __exit__(self, *_):
            pass

    def measured(options, servers, users, prompt, shared):
        asked.append((users, prompt, shared))
        if len(asked) == 3:
            raise ValueError("stopped here")
        return [Row("qwen3next", users, prompt, shared, rate=5.0, ratio=1.0)]

    monkeypatch.setattr(serving, "started", lambda *_: Started())
    monkeypatch.setattr(serving, "write_model", lambda *_: None)
    monkeypatch.setattr(serving, "measure", measured)
    options = {"users": (1, 2), "prompts": (64,), "out": tmp_path / "found"}
    with pytest.raises(ValueError, match="stopped here"):
        serving.run(Options(**options))
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 2
    serving.run(Options(**options | {"resume": tmp_path / "found.json"}))
    assert asked == [(1, 64, False), (2, 64, False), (1, 64, True), (1, 64, True), (2, 64, True)]
    assert (tmp_path / "found.md").read_text().count("| qwen3next |") == 4
    assert "llama-server was not measured: not on the PATH" in (tmp_path / "found.md").read_text()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by"):
        serving.run(Options(resume=tmp_path / "other.json"))
