"""A reply: its tokens, as they come, to thinking and answer; what it cost."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from qwen3next.chat.thinking import CLOSE, OPEN, Piece, ThinkingSplitter
from qwen3next.generation.text import TextStream


@dataclass
class Stats:
    """What a reply cost.

    Attributes:
        prompt: tokens of the whole conversation as the template writes it.
        reused: of these, tokens that the cache held from the turns before.
        new: tokens made, a stop token included.
        prompt_seconds, seconds: until the first token, and in all.
        ended: "stop" by the model, "length" at max_new_tokens or the end of the context, else "interrupted".
    """

    prompt: int
    reused: int
    new: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    ended: Literal["stop", "length", "interrupted"] = "interrupted"


class ReplyReader:
    """Gives out what a reply says, and nothing of its markup.

    Control tokens are left out, but the tags of thinking are read also where they are control tokens.

    Args:
        stop_tokens: ids that end the reply.
        stop: texts that end it: the end mark, where a tokenizer of bytes spells it, and what the user stops at.
        opened: the prompt ended with `<think>`.
    Attributes:
        ended: the reply has ended itself.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop_tokens: Collection[int], stop: Sequence[str] = (), opened: bool = False
    ):
        self._tokenizer, self._stop = tokenizer, frozenset(stop_tokens)
        added = tokenizer.get_added_tokens_decoder().items()
        self._hidden = {id for id, token in added if token.special and token.content not in (OPEN, CLOSE)}
        self._text = TextStream(self._decode, stop=stop)
        self._splitter = ThinkingSplitter(opened=opened)
        self.ended = False

    def push(self, token: int) -> list[Piece]:
        """What this token completes, possibly nothing."""
        if token in self._stop:
            self.ended = True
            return []
        text = self._text.push(token)
        self.ended = self._text.stopped
        return self._splitter.push(text)

    def finish(self) -> list[Piece]:
        """The rest, at the end of the reply."""
        return self._splitter.push(self._text.finish()) + self._splitter.finish()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([id for id in ids if id not in self._hidden], skip_special_tokens=False)
