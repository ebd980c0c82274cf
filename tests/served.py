"""Helpers of the server's tests: a tokenizer, a server on a real socket, an engine whose replies are given."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from conftest import small_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwen3next.chat.template import ChatTemplate
from qwen3next.generation.choice import Picked
from qwen3next.serving.engine import Engine
from qwen3next.serving.tickets import Finished, Request, Ticket

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from qwen3next.serving.app import Server  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
)
MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def byte_tokenizer(*, markup: bool = False) -> Tokenizer:
    """A token for each byte, one for the end of a text and, with `markup`, one for each tag."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    if markup:
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in MARKUP])
    return tokenizer


class GivenReplies(Engine):
    """Answers requests with texts that are given, or made from the prompt by `reply`, and notes the requests."""

    def __init__(self, tokenizer: Tokenizer, *, reply: Callable[[str], str] | None = None, pause: float = 0.0):
        super().__init__(small_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=256))
        self.tokenizer, self.pause, self.reply = tokenizer, pause, reply
        self.replies: list[str] = []
        self.ends = False  # whether texts are cancelled, as when the engine is closed
        self.requests: list[Request] = []

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        for request in requests:
            self._check(request)
        self.requests += requests
        tickets = [Ticket(request) for request in requests]
        for ticket in tickets:
            prompt = self.tokenizer.decode(ticket.request.ids, skip_special_tokens=False)
            text = self.replies.pop(0) if self.reply is None else self.reply(prompt)
            threading.Thread(target=self._give, args=(ticket, self.tokenizer.encode(text).ids), daemon=True).start()
        return tickets

    def _give(self, ticket: Ticket, ids: Sequence[int]) -> None:
        ids, most = [*ids, 256], ticket.request.most
        ticket.cached_tokens, ticket.not_cached = 7, "Given."
        for token in ids[:most]:
            if ticket.cancelled.wait(self.pause) or self.ends:
                ticket.give(Finished("cancelled"))
                return
            ticket.give(Picked(token, -0.5, ((token, -0.5),)))
        ticket.give(Finished("stop" if len(ids) <= most else "length"))


@contextmanager
def running(server: Server) -> Iterator[str]:
    """Run a server in a thread; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    http = uvicorn.Server(uvicorn.Config(server.app(), port=port, log_level="error"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        http.should_exit = True
        thread.join(20)


def serving(model, tokenizer, **options):  # type: ignore[no-untyped-def]
    """For fixtures: a server of a model; yields its address and itself."""
    template = options.pop("template", TEMPLATE)
    engine = Engine(model, **options.pop("engine", {}))
    server = Server(engine, tokenizer, name="tiny", template=ChatTemplate(template), **options)
    with running(server) as address:
        yield address, server
