"""Measure `qwen3next serve` beside `transformers serve` and llama-server: times of tokens, and tokens a second.

    python -m recipes.serving                              all rows with random weights; about an hour on 2 cores
    python -m recipes.serving --users 1 8 --prompts 64 --repetitions 1     a short run
    python -m recipes.serving --users --arrivals 8192 --servers qwen3next  gaps of a stream while prompts arrive
    python -m recipes.serving --folder DIR --out FILE      a checkpoint with a chat template; FILE.json and FILE.md
    python -m recipes.serving --resume FILE.json           goes on where a run with the same options was stopped

Servers run as processes of their own and are asked over HTTP, one after the other in each repetition, so that a change
of the machine's speed affects all of them. Each user sends one chat and reads its stream; all begin at once. Prompts
that are shared differ in their last 16 tokens only; others like them were asked before the clock started. `ratio` is
the tokens a second of qwen3next over those of the row's server. transformers sends the text of a token once it has the
next one, so its first token is late by one step. A server that is not installed or cannot answer is left out, and the
reason is written.
"""

import http.client
import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import qwen3next as q
from qwen3next.files.json_files import read_object
from recipes.measure.measuring import machine, write_results
from recipes.pretrain import exit_status

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TAIL = 16  # tokens in which prompts with a shared beginning differ
LETTERS = ascii_lowercase + " "


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        folder: a checkpoint with tokenizer and chat template; default: random weights of `preset`.
        preset, dtype, seed: of the random weights.
        users: numbers of chats at the same time.
        prompts: lengths of prompts in letters; with random weights each is a token.
        new: tokens of each answer; one that ends earlier makes its row invalid.
        repetitions: of each row, after one run that does not count.
        servers: which to measure.
        options: of `qwen3next serve`, as one text.
        arrivals: lengths of prompts that arrive, one after the other, while the stream of another user is running.
        timeout: seconds after which a server that has not answered is left out.
        out: path without suffix, for a .json and a .md file, written after each row.
        resume: the .json file of a run that was stopped.
    """

    folder: Path | None = None
    preset: str = "medium"
    dtype: str = "bfloat16"
    seed: int = 0
    users: tuple[int, ...] = (1, 4, 8, 16)
    prompts: tuple[int, ...] = (64, 1024, 8192)
    new: int = 64
    repetitions: int = 3
    servers: tuple[str, ...] = ("qwen3next", "transformers", "llama-server")
    options: str = ""
    arrivals: tuple[int, ...] = ()
    timeout: float = 600.0
    out: Path | None = None
    resume: Path | None = None


@dataclass
class Row:
    """Medians over repetitions of a server for one kind of traffic; seconds.

    Attributes:
        first: until a user's first token, median over users; `slowest` is the last user's.
        between: between two tokens of a user, on average, median over users; `gap` is the longest wait.
        rate: tokens a second, all users together, from the start to the end of the last answer.
        ratio: tokens a second of qwen3next over those of this server, median over pairs of runs.
        load: the machine's load average at the end.
    """

    server: str
    users: int
    prompt: int
    shared: bool
    first: float = 0.0
    slowest: float = 0.0
    between: float = 0.0
    gap: float = 0.0
    rate: float = 0.0
    ratio: float = 0.0
    load: float = 0.0
    problem: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.server, self.users, self.prompt, self.shared


@dataclass
class Arrival:
    """What a user who reads a stream notices of another's prompt; seconds.

    Attributes:
        first: until the first token of the prompt that arrives, median over repetitions.
        before: between two tokens of the stream before any prompt arrives, median.
        between, late, gap: from a prompt's arrival to its first token: median, 99th percentile, longest.
        gaps: waits that these are of.
    """

    server: str
    prompt: int
    first: float = 0.0
    before: float = 0.0
    between: float = 0.0
    late: float = 0.0
    gap: float = 0.0
    gaps: int = 0
    load: float = 0.0
    problem: str = ""


@dataclass
class Times:
    """When the pieces of one answer came."""

    pieces: list[float] = field(default_factory=list)
    reason: str = ""  # why the answer ended
    problem: str = ""


def write_model(options: Options, folder: Path) -> None:
    """Random weights with a tokenizer that reads a letter as a token and writes every token; none ends a text."""
    torch.manual_seed(options.seed)
    config = getattr(q.presets, options.preset)(eos_token_id=None, max_position_embeddings=32768)
    q.Qwen3Next(config).to(getattr(torch, options.dtype)).save_pretrained(folder)
    letters = [*(chr(n) for n in range(33, 127)), "\u0120", "\u010a"]  # byte-level names of space and line break
    words = ("\u0120" + "".join(word) for word in itertools.product(ascii_lowercase, repeat=4))
    vocabulary = {text: n for n, text in enumerate(itertools.islice((*letters, *words), config.vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


class Served:
    """A server in a process of its own."""

    def __init__(self, name: str, command: Sequence[str], port: int, model: str, log: Path, timeout: float):
        self.name, self.port, self.model, self.timeout, self.log = name, port, model, timeout, log
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def ready(self) -> str:
        """Wait until it answers a chat; returns why it does not, or ""."""
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                return f"it ended: {lines[-1][:200] if lines else 'without a word'}"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self.ask("Hello", 2).problem
            time.sleep(0.2)
        return f"it did not start within {self.timeout:g} s"

    def ask(self, prompt: str, new: int, times: Times | None = None, *, ended: threading.Event | None = None) -> Times:
        """Send a chat and read its stream into `times`, until it ends or `ended` is set."""
        times = Times() if times is None else times
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": new,
            "temperature": 0, "stream": True,
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                times.problem = f"status {answer.status}: {answer.read(200).decode(errors='replace')}"
                return times
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    times.problem = str(event["error"])[:200]
                elif event.get("choices"):
                    choice = event["choices"][0]
                    times.reason = choice.get("finish_reason") or times.reason
                    text = choice["delta"].get("content") or choice["delta"].get("reasoning") or ""
                    echo = len(text) > TAIL and prompt.startswith(text[:TAIL])  # transformers sends the prompt first
                    if text and not echo:
                        times.pieces.append(time.perf_counter())
                if ended is not None and ended.is_set():
                    return times
        except (OSError, http.client.HTTPException) as error:
            times.problem = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        if not times.problem and (not times.pieces or times.reason != "length"):
            times.problem = f"an answer ended early ({times.reason or 'no reason given'})"
        return times

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def command_of(name: str, folder: Path, port: int, options: Options) -> list[str] | str:
    """How to start a server, or why it cannot be."""
    if name == "qwen3next":
        given = ["--max-memory", "8GiB", "--prefix-memory", "2GiB", *options.options.split()]
        serve = [sys.executable, "-m", "qwen3next.cli", "serve", str(folder), "--name", str(folder)]
        return [*serve, "--port", str(port), "--quiet", *given]
    if name == "transformers":
        if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("fastapi") is None:
            return "it is not installed: pip install 'transformers[serving]'"
        program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
        return [*program, "serve", str(folder), "--port", str(port), "--device", "cpu", "--dtype", options.dtype]
    if name == "llama-server":
        found = shutil.which(name)
        if found is None:
            return "llama-server is not on the PATH"
        from recipes.measure.llama_cpp import write_gguf

        path = folder.with_suffix(".gguf")
        try:
            write_gguf(folder, path, getattr(torch, options.dtype))
        except ValueError as error:
            return str(error)
        return [found, "-m", str(path), "--port", str(port), "--parallel", str(max(options.users)), "--jinja"]
    return "there is no such server: choose qwen3next, transformers, llama-server"


@contextmanager
def started(options: Options, folder: Path, logs: Path) -> Iterator[tuple[list[Served], dict[str, str]]]:
    """The servers that answer, and why the others do not."""
    running: list[Served] = []
    problems: dict[str, str] = {}
    with ExitStack() as stack:
        for name in options.servers:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = command_of(name, folder, port, options)
            if isinstance(command, str):
                problems[name] = command
                continue
            server = Served(name, command, port, str(folder), logs / f"{name}.log", options.timeout)
            stack.callback(server.close)
            problem = server.ready()
            if problem:
                problems[name] = problem
                server.close()
            else:
                running.append(server)
        yield running, problems


def prompt_of(seed: int, length: int, shared: bool) -> str:
    """A prompt of so many letters; shared ones begin alike."""
    generator = torch.Generator().manual_seed(0 if shared else seed)
    letters = [LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator).tolist()]
    if shared:
        generator.manual_seed(seed)
        tail = torch.randint(len(LETTERS), (TAIL,), generator=generator).tolist()
        letters[-TAIL:] = [LETTERS[i] for i in tail]
    return "".join(letters)


def traffic(server: Served, prompts: Sequence[str], new: int) -> tuple[float, list[Times]]:
    """All users at once; when they began, and what came when."""
    found = [Times() for _ in prompts]

    def user(n: int) -> None:
        found[n] = server.ask(prompts[n], new)

    threads = [threading.Thread(target=user, args=(n,)) for n in range(len(prompts))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return began, found


def summary(row: Row, runs: Sequence[tuple[float, list[Times]]], new: int) -> list[float]:
    """Fill in a row; returns the rate of each run."""
    firsts, slowest, between, gaps, rates = [], [], [], [], []
    for began, answers in runs:
        first = [times.pieces[0] - began for times in answers]
        waits = [b - a for times in answers for a, b in itertools.pairwise(times.pieces)]
        firsts.append(median(first))
        slowest.append(max(first))
        between.append(median((times.pieces[-1] - times.pieces[0]) / max(new - 1, 1) for times in answers))
        gaps.append(max(waits, default=0.0))
        rates.append(new * len(answers) / (max(times.pieces[-1] for times in answers) - began))
    row.first, row.slowest, row.between, row.gap = median(firsts), median(slowest), median(between), median(gaps)
    row.rate, row.load = median(rates), os.getloadavg()[0]
    return rates


def measure(options: Options, servers: Sequence[Served], users: int, prompt: int, shared: bool) -> list[Row]:
    """One kind of traffic, on all servers in turn."""
    rows = {server.name: Row(server.name, users, prompt, shared) for server in servers}
    runs: dict[str, list[tuple[float, list[Times]]]] = {server.name: [] for server in servers}
    for repetition in range(options.repetitions + 1):
        for server in servers:
            row = rows[server.name]
            if row.problem:
                continue
            # No prompt is asked twice, in any row: a server that keeps prompts would answer it from there.
            seeds = [1 + user + 1000 * repetition + 100_000 * prompt + 10**10 * users for user in range(users)]
            began, answers = traffic(server, [prompt_of(seed, prompt, shared) for seed in seeds], options.new)
            row.problem = next((times.problem for times in answers if times.problem), "")
            if repetition and not row.problem:  # the first run warms up, and fills prefix caches
                runs[server.name].append((began, answers))
    rates = {name: summary(rows[name], runs[name], options.new) for name in rows if not rows[name].problem}
    for name, own in rates.items():
        if "qwen3next" in rates:
            rows[name].ratio = median(a / b for a, b in zip(rates["qwen3next"], own, strict=True))
    return list(rows.values())


STREAM = 20_000  # tokens of the stream beside which prompts arrive, at most


def arrival(options: Options, server: Served, prompt: int) -> Arrival:
    """Prompts arrive one after the other beside a stream."""
    row = Arrival(server.name, prompt)
    if server.name == "transformers":
        row.problem = "it answers one request after the other"
        return row
    times, ended, firsts, waits = Times(), threading.Event(), [], []
    letters = prompt_of(0, 64, False)
    stream = threading.Thread(target=server.ask, args=(letters, STREAM, times), kwargs={"ended": ended})
    stream.start()
    try:
        while len(times.pieces) < 32 and stream.is_alive():
            time.sleep(0.05)
        row.before = median([b - a for a, b in itertools.pairwise(times.pieces)] or [0.0])
        for repetition in range(options.repetitions):
            began = time.perf_counter()
            answer = server.ask(prompt_of(1 + repetition + 100_000 * prompt, prompt, False), 1)
            row.problem = row.problem or answer.problem or times.problem
            if row.problem or not stream.is_alive():
                row.problem = row.problem or "the stream ended before the prompt's first token"
                return row
            firsts.append(answer.pieces[0] - began)
            time.sleep(0.5)  # for the token that ends the last wait
            held = [(a, b) for a, b in itertools.pairwise(list(times.pieces)) if b > began and a < answer.pieces[0]]
            waits += [b - a for a, b in held]
    finally:
        ended.set()
        stream.join()
    waits.sort()
    row.first, row.between, row.gap, row.gaps = median(firsts), median(waits), waits[-1], len(waits)
    row.late, row.load = waits[int(0.99 * (len(waits) - 1))], os.getloadavg()[0]
    return row


def table_of_arrivals(rows: Sequence[Arrival]) -> str:
    """The rows in Markdown."""
    lines = [
        "| arriving prompt | server | its first token | gap before | gap meanwhile | 99 % | largest gap | gaps |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.prompt} | {row.server} | {row.problem.replace('|', ' ')} | | | | | |")
            continue
        times = (f"{1000 * x:,.0f} ms" for x in (row.first, row.before, row.between, row.late, row.gap))
        lines.append(f"| {row.prompt} | {row.server} | {' | '.join(times)} | {row.gaps} |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| users | prompt | server | first token | slowest user | between tokens | largest gap | tokens/s | ratio |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        kind = f"{row.users} | {row.prompt}{' shared' if row.shared else ''} | {row.server}"
        if row.problem:
            lines.append(f"| {kind} | {row.problem.replace('|', ' ')} | | | | | |")
            continue
        times = " | ".join(f"{1000 * x:,.0f} ms" for x in (row.first, row.slowest, row.between, row.gap))
        lines.append(f"| {kind} | {times} | {row.rate:.1f} | {row.ratio:.2f} |")
    return "\n".join(lines)


def write(options: Options, rows: Sequence[Row], about: dict[str, Any], arrivals: Sequence[Arrival] = ()) -> None:
    if options.out is None:
        return
    text = f"# Serving\n\n{about['machine']}; {about['versions']}; {about['date']}, commit {about['commit']}.\n\n"
    text += "".join(f"{name} was not measured: {why}.\n\n" for name, why in about["problems"].items())
    loads = [row.load for row in rows if not row.problem] + [row.load for row in arrivals if not row.problem]
    load = f"load average {min(loads):.1f} to {max(loads):.1f}" if loads else "nothing was measured"
    text += f"{about['what']}; {load}.\n"
    text += f"\n{table(rows)}\n" if rows else ""
    text += (
        f"\nA stream of one user while another's prompt arrives:\n\n{table_of_arrivals(arrivals)}\n" if arrivals else ""
    )
    found = {"about": about, "rows": [asdict(row) for row in rows], "arrivals": [asdict(row) for row in arrivals]}
    write_results(options.out, found, text)


def run(options: Options) -> None:
    rows: list[Row] = []
    if options.resume is not None:
        kept = read_object(options.resume, "a run of recipes.serving")
        try:
            rows = [Row(**row) for row in kept["rows"]]
        except (KeyError, TypeError):
            raise ValueError(f"{options.resume} was not written by recipes.serving.") from None
        options = Options(**vars(options) | {"out": options.resume.with_suffix("")})
    console = Console(stderr=True)
    kinds = [(u, p, s) for p in options.prompts for s in (False, True) for u in options.users if p > 2 * TAIL]
    done = {(row.users, row.prompt, row.shared) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder
        if folder is None:
            folder = Path(temporary) / options.preset
            write_model(options, folder)
        with started(options, folder, Path(temporary)) as (servers, problems), Progress(console=console) as bar:
            for name, why in problems.items():
                console.print(f"{name} is not measured: {why}")
            if not servers:
                raise ValueError("No server answers: see above.")
            what = f"{options.folder or options.preset}, {options.dtype}, {options.new} new tokens, greedy"
            about = {**machine(), "problems": problems, "what": what}
            arrivals: list[Arrival] = []
            task = bar.add_task("traffic", total=len(kinds) + len(options.arrivals))
            for users, prompt, shared in kinds:
                if (users, prompt, shared) not in done:
                    rows += measure(options, servers, users, prompt, shared)
                    write(options, rows, about)
                bar.advance(task)
            for prompt in options.arrivals:
                arrivals += [arrival(options, server, prompt) for server in servers]
                write(options, rows, about, arrivals)
                bar.advance(task)
    print("\n\n".join([table(rows)] * bool(rows) + [table_of_arrivals(arrivals)] * bool(arrivals)))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(tyro.cli(Options, description=__doc__))))
