"""`qwen3next chat`: chat with a checkpoint through its chat template."""

import sys
from collections.abc import Generator
from typing import Annotated, Literal

import tyro

from qwen3next.chat import ChatTemplate, Conversation, GenerationConfig
from qwen3next.chat.thinking import Piece
from qwen3next.commands.chat_session import Session
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

DEFAULTS = Choosing()


def chat(
    folder: Folder,
    message: str | None = None,
    system: str | None = None,
    think: Literal["auto", "on", "off"] = "auto",
    thinking: Literal["show", "hide"] = "show",
    max_new_tokens: int | None = None,
    max_context: int | None = None,
    choosing: Annotated[Choosing, tyro.conf.arg(name="")] = DEFAULTS,
    draft_tokens: int | Literal["auto"] = 0,
    loading: LoadingOptions = LOADING,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Chat with a checkpoint through its chat template; replies are streamed.

    On a terminal, /help lists the commands, Ctrl-C stops a reply and Ctrl-D exits. Otherwise each line of stdin is a
    message. Replies go to stdout, everything else to stderr.

    $ qwen3next chat DIR
    $ qwen3next chat DIR --message "What is a delta rule?" --thinking hide
    $ qwen3next chat DIR --message "Who wrote Faust? As JSON." --json-schema answer.json
    $ qwen3next chat DIR --quiet < questions.txt > answers.txt

    Args:
        folder: checkpoint folder with config.json, *.safetensors, tokenizer.json and a chat template.
        message: reply to this message only and exit.
        system: system prompt. Default: that of the template, if any.
        think: on or off, for templates with enable_thinking; auto leaves it to the template.
        thinking: show it (dimmed on a terminal, between <think> tags elsewhere) or hide it.
        max_new_tokens: most tokens of a reply, including thinking. Default: generation_config.json, else 2048.
        max_context: most tokens of the whole conversation. Default: the model's max_position_embeddings.
        draft_tokens: tokens to guess and check in one step, or auto, which measures what pays. Replies are the same.
        quiet: write only errors to stderr, and the prompt on a terminal.
        verbose: write to stderr which implementation runs for each operation, and the traceback of an error.
    """
    if message is not None and not message.strip():
        raise ValueError("--message is empty: give a text.")
    # Read small files first, so that their errors appear before the weights are loaded.
    tokenizer = open_tokenizer(folder)
    template, generation = ChatTemplate.load(folder), GenerationConfig.load(folder)
    if think != "auto" and "enable_thinking" not in template.reads:
        raise ValueError("This chat template does not read enable_thinking: leave --think out.")
    conversation = Conversation(
        open_model(folder, loading, quiet=quiet, verbose=verbose),
        tokenizer,
        template,
        generation=generation,
        system=system,
        variables={} if think == "auto" else {"enable_thinking": think == "on"},
        max_context=max_context,
        draft_tokens=draft_tokens,
    )

    stops = tuple(conversation.stop_tokens)
    options = choosing.options(tokenizer, conversation.model.vocab_size, stops, generation)

    def reply(text: str) -> Generator[Piece, None, None]:
        # A different seed for each reply, but the same seeds when the conversation is repeated.
        seed = None if choosing.seed is None else choosing.seed + len(conversation.messages)
        return conversation.reply(text, max_new_tokens=max_new_tokens, **options | {"seed": seed})

    interactive = message is None and sys.stdin.isatty()
    session = Session(conversation, reply=reply, show_thinking=thinking == "show", interactive=interactive, quiet=quiet)
    if message is None:
        session.run()
    else:
        session.ask(message)
    if not quiet:
        say_reads(conversation.model)
