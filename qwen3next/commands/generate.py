"""`qwen3next generate`: continue plain text."""

import sys
import time
from pathlib import Path

import torch

from qwen3next.commands.common import Dtype, ExpertPlace, Folder, open_model, open_tokenizer, say_reads
from qwen3next.generation.generate import stream
from qwen3next.generation.text import TextStream


def generate(
    folder: Folder,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    stop_tokens: tuple[int, ...] = (),
    device: str = "auto",
    dtype: Dtype = "auto",
    experts: ExpertPlace = "memory",
    expert_cache: str = "2GiB",
    quiet: bool = False,
) -> None:
    """Continue a prompt; the text is streamed, and the speed is printed to stderr at the end.

    The prompt is used without a chat template: for a chat model, write the chat markup into it.

    $ qwen3next generate DIR --prompt "def fibonacci(n):"
    $ qwen3next generate DIR --file story.txt --temperature 0.8
    $ cat story.txt | qwen3next generate DIR --quiet > more.txt

    Args:
        folder: checkpoint folder with config.json, *.safetensors and tokenizer.json.
        prompt: text to continue. Without --prompt and --file, stdin is read to its end.
        file: UTF-8 file with the text to continue.
        max_new_tokens: most tokens to generate.
        temperature: 0 always takes the most likely token; larger values are more varied.
        top_k: sample from the k most likely tokens; 0 means all.
        top_p: sample from the most likely tokens with this total probability.
        seed: seed for a temperature above 0; the same seed gives the same text on one machine.
        stop: end before this string, in addition to the checkpoint's stop_strings; may be repeated.
        stop_tokens: end after this token id, in addition to the model's end-of-text; may be repeated.
        device: auto (CUDA if available), cpu, cuda, cuda:1, ...
        dtype: auto keeps the stored dtype of each tensor.
        experts: memory; int8 (one byte per weight); disk (read from the files when tokens need them).
        expert_cache: memory for experts read from the files.
        quiet: write only errors to stderr.
    """
    text = _read_prompt(prompt, file)
    tokenizer = open_tokenizer(folder)
    model = open_model(folder, device=device, dtype=dtype, experts=experts, cache=expert_cache, quiet=quiet)
    weight = model.lm_head.weight
    ids = tokenizer.encode(text).ids
    began, first, made = time.perf_counter(), 0.0, 0
    texts = (*model.generation_config.stop_strings, *stop)
    output = TextStream(lambda tokens: tokenizer.decode(tokens), stop=texts)
    for token in stream(
        model,
        torch.tensor([ids], dtype=torch.long, device=weight.device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=(*model.stop_tokens, *stop_tokens),
        seed=seed,
    ):
        first, made = first or time.perf_counter(), made + 1
        print(output.push(int(token)), end="", flush=True)
        if output.stopped:
            break
    now = time.perf_counter()
    print(output.finish(), flush=True)
    if not quiet:
        # The prompt's forward makes the first token; the rate counts the steps after it.
        rate = f", {(made - 1) / (now - first):.1f} tok/s" if made > 1 else ""
        print(
            f"{len(ids)} prompt tokens in {first - began:.2f} s, {made} new in {now - began:.2f} s{rate} "
            f"({weight.device}, {str(weight.dtype).removeprefix('torch.')})",
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
