"""`qwen3next ask`: read a document once and answer questions about it."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qwen3next.chat.document import Document
from qwen3next.chat.template import ChatTemplate
from qwen3next.chat.thinking import Piece
from qwen3next.commands.choosing import Choosing
from qwen3next.commands.common import (
    LOADING,
    Folder,
    LoadingOptions,
    Quiet,
    Verbose,
    open_model,
    open_tokenizer,
    print_json,
    say_reads,
)
from qwen3next.commands.screen import Screen, note
from qwen3next.prefix.store import PrefixStore

DEFAULTS = Choosing()
Question = Annotated[tuple[str, ...], tyro.conf.arg(name="question", metavar="TEXT")]


def ask(
    folder: Folder,
    file: Path,
    question: Question = (),
    plain: bool = False,
    system: str | None = None,
    max_new_tokens: int | None = None,
    choosing: Annotated[Choosing, tyro.conf.arg(name="")] = DEFAULTS,
    store: str = "auto",
    memory: str = "2GiB",
    disk: str = "16GiB",
    chunk_size: int = 4096,
    max_memory: str | None = None,
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto",
    context_factor: float = 1.0,
    loading: LoadingOptions = LOADING,
    json: bool = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read a document once, keep its cache, and answer questions about it, now and later.

    With the checkpoint's chat template, the document and a question form one message. Without a template, or with
    --plain, the model continues the plain text. The cache is kept on disk, so that later questions, also from another
    process or after a crash, start at the end of the document. Without --question, each line of stdin is a question.

    $ qwen3next ask DIR --file BOOK.txt --question "Who is the narrator?"
    $ qwen3next ask DIR --file BOOK.txt < questions.txt > answers.txt
    $ qwen3next ask DIR --file BOOK.txt --question "Who narrates? As JSON." --json-schema answer.json
    $ qwen3next ask DIR --file BOOK.txt --store none

    Args:
        folder: checkpoint folder with config.json, *.safetensors and tokenizer.json.
        file: document, UTF-8 text.
        question: question to answer; may be repeated. Questions are independent of each other.
        plain: continue plain text without a chat template.
        system: system prompt. Default: that of the template, if any.
        max_new_tokens: most tokens of an answer, including thinking. Default: generation_config.json, else 512.
        store: folder for document caches. auto: qwen3next/prefixes in the user's cache folder; none: keep nothing.
        memory: budget for document caches in memory.
        disk: budget for document caches on disk, for all documents of this checkpoint.
        chunk_size: tokens per forward when reading.
        max_memory: limit for reading, without weights, such as 8GiB; chunks are made smaller to stay below it.
        kv_dtype: dtype of the KV cache; auto is the model's dtype.
        context_factor: extend the context by this factor with YaRN, for documents longer than the trained context.
        json: print one JSON object a question, on a line: question, thinking, answer and numbers of tokens.
        quiet: write only errors to stderr.
        verbose: write to stderr which implementation runs for each operation, and the traceback of an error.
    """
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text.") from None
    if any(not one.strip() for one in question):
        raise ValueError("--question is empty: give a text.")
    tokenizer, template = open_tokenizer(folder), None if plain else ChatTemplate.find(folder)
    model = open_model(folder, loading, quiet=quiet, verbose=verbose)
    if context_factor != 1:
        model.extend_context(context_factor)
    kept = PrefixStore(
        model,
        budget=memory,
        folder=_place(store),
        disk_budget=disk,
        kv_dtype=None if kv_dtype == "auto" else kv_dtype,
    )
    document = Document(
        model,
        tokenizer,
        text,
        template=template,
        store=kept,
        system=system,
        chunk_size=chunk_size,
        max_memory=max_memory,
    )
    options = choosing.options(tokenizer, model.vocab_size, document.stop_tokens, model.generation_config)
    _read(document, quiet=quiet)
    for number, one in enumerate(question or _lines()):
        pieces = document.answer(
            one,
            max_new_tokens=max_new_tokens,
            # A different seed for each question, but the same seeds when the questions are repeated.
            **options | {"seed": None if choosing.seed is None else choosing.seed + number},
        )
        try:
            if json:
                _print_object(document, one, pieces)
            else:
                _print(document, pieces, quiet=quiet)
        except KeyboardInterrupt:
            if question or not sys.stdin.isatty():
                raise
            note("stopped")
    if not quiet:
        say_reads(model)


def _place(store: str) -> Path | None:
    if store == "none":
        return None
    if store != "auto":
        return Path(store)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3next" / "prefixes"


def _read(document: Document, *, quiet: bool) -> None:
    run, began = document.read(), time.perf_counter()
    columns = TextColumn("reading"), BarColumn(), TextColumn("{task.completed:,} of {task.total:,} tokens")
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=document.tokens, completed=run.matched_tokens)
        for done, _ in run:
            bar.update(task, completed=done)
    if not quiet:
        known = f"{run.matched_tokens:,} of them cached. {run.reason}".rstrip()
        note(f"The document has {document.tokens:,} tokens, {known} Read in {time.perf_counter() - began:.1f} s.")


def _lines() -> Iterator[str]:
    """Questions from stdin, with a prompt on a terminal."""
    while True:
        try:
            if sys.stdin.isatty():
                print(">>> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise ValueError("stdin is not UTF-8 text.") from None
        if not line:
            return
        if line.strip():
            yield line.removesuffix("\n")


def _print_object(document: Document, question: str, pieces: Iterator[Piece]) -> None:
    said: dict[str, str] = {"thinking": "", "answer": ""}
    for kind, piece in pieces:
        said["thinking" if kind == "thinking" else "answer"] += piece
    stats = document.stats
    numbers = {} if stats is None else {"prompt_tokens": stats.prompt, "cached": stats.reused, "new": stats.new}
    print_json({"question": question, **said, **numbers})


def _print(document: Document, pieces: Iterator[Piece], *, quiet: bool) -> None:
    screen = Screen(show_thinking=True)
    try:
        for kind, piece in pieces:
            screen.write(kind, piece)
    finally:
        screen.end()
    stats = document.stats
    if not quiet and stats is not None:
        steps, seconds = stats.new - 1, stats.seconds - stats.prompt_seconds
        rate = f", {steps / seconds:.1f} tok/s" if steps > 0 and seconds > 0 else ""
        prompt = f"{stats.prompt:,} prompt tokens, {stats.reused:,} of them cached, in {stats.prompt_seconds:.2f} s"
        note(f"{prompt}; {stats.new} new{rate}")
