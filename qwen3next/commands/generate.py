"""`qwen3next generate`: continue plain text."""

import json as json_text
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tokenizers import Tokenizer

from qwen3next.api import Qwen3Next
from qwen3next.commands.choosing import Choosing
from qwen3next.commands.common import (
    LOADING,
    Folder,
    LoadingOptions,
    Quiet,
    Verbose,
    open_model,
    open_tokenizer,
    say_reads,
)
from qwen3next.generation.beam_search import beam_search
from qwen3next.generation.choice import Picked
from qwen3next.generation.generate import Generation
from qwen3next.generation.rounds import Report
from qwen3next.generation.text import TextStream

DEFAULTS = Choosing()


def generate(
    folder: Folder,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    choosing: Annotated[Choosing, tyro.conf.arg(name="")] = DEFAULTS,
    stop: tuple[str, ...] = (),
    stop_tokens: tuple[int, ...] = (),
    n: int = 1,
    beams: int = 0,
    draft_tokens: int | Literal["auto"] = 0,
    drafts: Literal["auto", "mtp", "lookup", "both"] = "auto",
    logprobs: int | None = None,
    json: bool = False,
    loading: LoadingOptions = LOADING,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt; the text is streamed, and the speed is printed to stderr at the end.

    The prompt is used without a chat template: for a chat model, write the chat markup into it.

    $ qwen3next generate DIR --prompt "def fibonacci(n):"
    $ qwen3next generate DIR --file story.txt --temperature 0.8 --draft-tokens auto
    $ cat story.txt | qwen3next generate DIR --quiet > more.txt
    $ qwen3next generate DIR --prompt "As JSON: " --json-schema person.json --json

    Args:
        folder: checkpoint folder with config.json, *.safetensors and tokenizer.json.
        prompt: text to continue. Without --prompt and --file, stdin is read to its end.
        file: UTF-8 file with the text to continue.
        max_new_tokens: most tokens to generate.
        stop: end before this string, in addition to the checkpoint's stop_strings; may be repeated.
        stop_tokens: end after this token id, in addition to the model's end-of-text; may be repeated.
        n: texts to generate; with --beams the best n.
        beams: texts that beam search keeps; 0 is no beam search.
        draft_tokens: tokens to guess and check in one step, or auto, which measures what pays; 0 is none. It changes
            the speed, never the text.
        drafts: who guesses: the MTP layer, what followed the same words before (lookup), both, or auto.
        logprobs: with --json, report log-probabilities, and those of so many most likely tokens.
        json: print one JSON object with texts, tokens, log-probabilities, drafts and seconds, and nothing before it.
        quiet: write only errors to stderr.
        verbose: write to stderr which implementation runs for each operation, and the traceback of an error.
    """
    text = _read_prompt(prompt, file)
    tokenizer = open_tokenizer(folder)
    model = open_model(folder, loading, quiet=quiet, verbose=verbose)
    ids = torch.tensor([tokenizer.encode(text).ids], dtype=torch.long, device=model.device)
    stops = tuple(dict.fromkeys((*model.stop_tokens, *stop_tokens)))
    options = choosing.options(tokenizer, model.vocab_size, stops)
    strings = (*model.generation_config.stop_strings, *stop)
    began = time.perf_counter()
    if beams:
        if choosing.temperature or options["grammar"] is not None or draft_tokens or options["logit_bias"]:
            raise ValueError("--beams takes no temperature, grammar, drafts or bias: leave these out.")
        found = beam_search(
            model, ids, beams=beams, n=n, max_new_tokens=max_new_tokens, rules=options["rules"], stop_tokens=stops
        )
        written = [Written(tokenizer, strings, [Picked(t) for t in tokens], score) for score, tokens in found[0]]
        report, first = Report(), time.perf_counter()
        if not json:
            _print_whole(written)
    else:
        run = Generation(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            n=n,
            draft_tokens=draft_tokens,
            drafts=drafts,
            logprobs=logprobs if json else None,
            stop_tokens=stops,
            **options,
        )
        written = [Written(tokenizer, strings) for _ in range(n)]
        first, report = _follow(run, written, aloud=n == 1 and not json), run.report
        if n > 1 and not json:
            _print_whole(written)
    seconds = {"first_token": first - began, "all": time.perf_counter() - began}
    if json:
        print(json_text.dumps(_as_json(written, ids.shape[1], seconds, report), ensure_ascii=False))
    if not quiet:
        _say_speed(model, ids.shape[1], sum(len(w.picked) for w in written), seconds, report)


@dataclass
class Written:
    """A text as it is written.

    Attributes:
        score: of a beam.
    """

    tokenizer: Tokenizer
    strings: tuple[str, ...]
    picked: list[Picked] = field(default_factory=list)
    score: float | None = None

    def __post_init__(self) -> None:
        self.stream = TextStream(lambda tokens: self.tokenizer.decode(tokens), stop=self.strings)
        self.text = "".join(self.stream.push(picked.token) for picked in self.picked)

    def push(self, new: list[Picked]) -> str:
        """The text that these tokens complete."""
        said = ""
        for picked in new:
            if not self.stream.stopped:
                self.picked.append(picked)
                said += self.stream.push(picked.token)
        self.text += said
        return said

    def finish(self) -> str:
        rest = self.stream.finish()
        self.text += rest
        return rest


def _follow(run: Generation, written: list[Written], *, aloud: bool) -> float:
    """Take the tokens of a run until all texts have ended; the time of the first."""
    first = 0.0
    for gained in run:
        first = first or time.perf_counter()
        for row, text, new in zip(run.rows, written, gained, strict=True):
            said = text.push(new)
            row.done |= text.stream.stopped
            if aloud:
                print(said, end="", flush=True)
    for text in written:
        rest = text.finish()
        if aloud:
            print(rest, flush=True)
    return first


def _print_whole(written: list[Written]) -> None:
    for number, text in enumerate(written, start=1):
        score = "" if text.score is None else f", score {text.score:.4f}"
        text.finish()
        print(f"--- text {number}{score}\n{text.text}", flush=True)


def _as_json(written: list[Written], prompt: int, seconds: dict[str, float], report: Report) -> dict[str, Any]:
    texts = []
    for text in written:
        text.finish()
        one: dict[str, Any] = {"text": text.text, "tokens": [picked.token for picked in text.picked]}
        if text.score is not None:
            one["score"] = text.score
        if text.picked and text.picked[0].logprob == text.picked[0].logprob:  # not NaN: it was asked for
            one["logprobs"] = [picked.logprob for picked in text.picked]
            one["top_logprobs"] = [dict(picked.top) for picked in text.picked]
        texts.append(one)
    drafts = {"drafted": report.drafted, "accepted": report.accepted, "mean_length": report.mean_length}
    return {"texts": texts, "prompt_tokens": prompt, "drafts": drafts, "seconds": seconds}


def _say_speed(model: Qwen3Next, prompt: int, made: int, seconds: dict[str, float], report: Report) -> None:
    # The prompt's forward makes the first token; the rate counts the steps after it.
    after = seconds["all"] - seconds["first_token"]
    rate = f", {(made - 1) / after:.1f} tok/s" if made > 1 and after else ""
    rate += f", {report.mean_length:.2f} tokens a round" if any(report.drafted) else ""
    print(
        f"{prompt} prompt tokens in {seconds['first_token']:.2f} s, {made} new in {seconds['all']:.2f} s{rate} "
        f"({model.device}, {str(model.dtype).removeprefix('torch.')})",
        file=sys.stderr,
    )
    say_reads(model)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("Both --prompt and --file are given: choose one.")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ValueError("There is no prompt: give --prompt or --file, or pipe text in.")
    try:
        text = prompt if prompt is not None else sys.stdin.read() if file is None else file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file or 'stdin'} is not UTF-8 text.") from None
    if not text:
        raise ValueError("The prompt is empty: give a text to continue.")
    return text
