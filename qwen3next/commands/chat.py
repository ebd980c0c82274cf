"""`qwen3next chat`: talk to a checkpoint through its own chat template."""

import sys
from collections.abc import Generator
from typing import Literal

from qwen3next.chat.session import ChatTemplate, Conversation, GenerationConfig
from qwen3next.chat.thinking import Piece
from qwen3next.commands.chat_session import Session
from qwen3next.commands.common import Dtype, ExpertPlace, Folder, open_model, open_tokenizer, say_reads


def chat(
    folder: Folder,
    message: str | None = None,
    system: str | None = None,
    think: Literal["auto", "on", "off"] = "auto",
    thinking: Literal["show", "hide"] = "show",
    max_new_tokens: int | None = None,
    max_context: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    experts: ExpertPlace = "memory",
    expert_cache: str = "2GiB",
    quiet: bool = False,
) -> None:
    """Talk to a checkpoint through its own chat template; replies appear as they are made.

    On a terminal, /help lists what can be typed beside messages; Ctrl-C stops a reply, Ctrl-D leaves. Otherwise each
    line of stdin is a message. Replies go to stdout, everything else to stderr.

    $ qwen3next chat DIR
    $ qwen3next chat DIR --message "What is a delta rule?" --thinking hide
    $ qwen3next chat DIR --quiet < questions.txt > answers.txt

    Args:
        folder: checkpoint: config.json, *.safetensors, tokenizer.json, and a chat template.
        message: ask this only and leave.
        system: system prompt. Without it, the template's own if it has one.
        think: on or off, for templates with enable_thinking; auto is what the template does by itself.
        thinking: show it, dimmed on a terminal and between <think> tags elsewhere, or hide it.
        max_new_tokens: tokens of a reply at most, thinking included. Without it, as below, else 2048.
        max_context: tokens of the whole conversation at most. Without it, the model's max_position_embeddings.
        temperature: 0 takes the most likely token each time. Without it, what generation_config.json says, else 0.
        top_k: draw among so many most likely tokens; 0 means all. Without it, as above, else 0.
        top_p: draw among the most likely tokens that together have this probability. Without it, as above, else 1.
        seed: for a temperature above 0; the same seed gives the same conversation on one machine.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, ...
        dtype: auto keeps each tensor as stored.
        experts: memory; int8, in a byte a weight; mmap, read from the files as tokens need them.
        expert_cache: memory for experts that were read from the files.
        quiet: write nothing to stderr but errors and, on a terminal, the prompt.
    """
    if message is not None and not message.strip():
        raise ValueError("--message is empty: there is nothing to answer.")
    # What is small is read first: its mistakes should not cost the time that the weights take.
    tokenizer = open_tokenizer(folder)
    template, generation = ChatTemplate.load(folder), GenerationConfig.load(folder)
    if think != "auto" and "enable_thinking" not in template.reads:
        raise ValueError("This chat template does not read enable_thinking: leave --think out.")
    conversation = Conversation(
        open_model(folder, device=device, dtype=dtype, experts=experts, cache=expert_cache, quiet=quiet),
        tokenizer,
        template,
        generation=generation,
        system=system,
        variables={} if think == "auto" else {"enable_thinking": think == "on"},
        max_context=max_context,
    )

    def reply(text: str) -> Generator[Piece, None, None]:
        return conversation.reply(
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            # Another one for each reply, and the same ones whenever the conversation is held again.
            seed=None if seed is None else seed + len(conversation.messages),
        )

    interactive = message is None and sys.stdin.isatty()
    session = Session(conversation, reply=reply, show_thinking=thinking == "show", interactive=interactive, quiet=quiet)
    if message is None:
        session.run()
    else:
        session.ask(message)
    if not quiet:
        say_reads(conversation.model)
