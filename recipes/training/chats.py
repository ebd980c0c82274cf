"""Conversations as tokens with labels: rendered by the chat template, predicted where the assistant speaks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from qwen3next.chat.template import ChatTemplate
from recipes.training.data import LabelledBatch
from recipes.training.documents import digest, share_of
from recipes.training.sources import best_fit


class Conversation(NamedTuple):
    """Token ids (n,), and True where the assistant's tokens are."""

    ids: list[int]
    spoken: list[bool]


@dataclass
class Conversations:
    """The conversations of a file, split by a hash of their text.

    Attributes:
        cut: conversations longer than a window, whose end is left out.
        unseen: messages of the assistant that are not trained on, because the template shows them otherwise in a
            longer conversation (thinking that is removed from earlier answers).
        silent: conversations in which nothing is left to train on, which are left out.
    """

    train: list[Conversation]
    val: list[Conversation]
    fingerprint: str
    cut: int = 0
    unseen: int = 0
    silent: int = 0


def read_conversations(
    path: Path, template: ChatTemplate, tokenizer: Tokenizer, *, window: int, validation_share: float, seed: int
) -> Conversations:
    """Read a .jsonl file whose lines have "messages", and optionally "tools".

    Raises: ValueError, with the line's number, for a line of another form or one that the template refuses.
    """
    if not path.is_file():
        raise ValueError(f'There is no file {path}: give a .jsonl file whose lines have "messages".')
    found, texts = Conversations([], [], ""), list[str]()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                messages = row["messages"]
                text, spans, unseen = rendered(template, messages, row.get("tools"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{path} line {number} is no conversation with "messages" ({error}).') from error
            one = encoded(tokenizer, text, spans)
            found.unseen += unseen
            found.cut += len(one.ids) > window
            one = Conversation(one.ids[:window], one.spoken[:window])
            if not any(one.spoken[1:]):
                found.silent += 1
                continue
            key = digest(text)
            texts.append(key)
            (found.val if share_of(key, seed) < validation_share else found.train).append(one)
    if not found.train:
        raise ValueError(f"{path} holds no conversation with an answer to train on: add messages of the assistant.")
    if not found.val:
        found.val.append(found.train[0] if len(found.train) == 1 else found.train.pop())
    found.fingerprint = digest(json.dumps([texts, template.source, tokenizer.to_str(), window]))
    return found


def rendered(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], tools: Any = None
) -> tuple[str, list[tuple[int, int]], int]:
    """The text of a conversation, the spans of the assistant's messages in it, and how many could not be found.

    A span goes from the end of the generation prompt to the end of the message, its end mark included: what the model
    would have to write.
    """
    text = template.render(messages, tools=tools, add_generation_prompt=False)
    spans, unseen = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:i], tools=tools, add_generation_prompt=True) if i else ""
        after = template.render(messages[: i + 1], tools=tools, add_generation_prompt=False)
        if text.startswith(before) and text.startswith(after) and len(before) < len(after):
            spans.append((len(before), len(after)))
        else:
            unseen += 1
    return text, spans, unseen


def encoded(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Conversation:
    """The text as one sequence of tokens; a token is the assistant's if it lies in one of the spans."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spoken = [any(begin <= a and b <= end for begin, end in spans) and a < b for a, b in encoding.offsets]
    return Conversation(encoding.ids, spoken)


class ChatWindows:
    """Windows of whole conversations, packed by best fit, as a pure function of the number of samples seen."""

    def __init__(self, conversations: Sequence[Conversation], *, window: int, seed: int = 0) -> None:
        self.conversations, self.window, self.seed = list(conversations), window, seed
        self.bins = best_fit(np.array([len(one.ids) for one in self.conversations]), window)

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self.bins)

    def batch(self, first_sample: int, batch_size: int) -> LabelledBatch:
        """Samples first_sample to first_sample + batch_size - 1, counted from the start of training."""
        ids = torch.zeros(batch_size, self.window, dtype=torch.int64)
        documents, labels = torch.full_like(ids, -1), torch.full_like(ids, -100)
        for row in range(batch_size):
            epoch, place = divmod(first_sample + row, len(self))
            order, at = np.random.default_rng([self.seed, epoch]).permutation(len(self)), 0
            for number, chosen in enumerate(self.bins[int(order[place])]):
                one = self.conversations[chosen]
                here = slice(at, at + len(one.ids))
                ids[row, here] = torch.tensor(one.ids)
                documents[row, here] = number
                labels[row, here] = torch.where(torch.tensor(one.spoken), ids[row, here], -100)
                at += len(one.ids)
        return LabelledBatch(ids, documents, labels)
