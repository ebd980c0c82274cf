"""Split the tokens of a reply into thinking and answer as they arrive; statistics of a reply."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from qwen3next.chat.thinking import CLOSE, OPEN, Piece, ThinkingSplitter
from qwen3next.chat.tool_calls import CLOSE_CALL, OPEN_CALL
from qwen3next.generation.text import TextStream

MARKUP = (OPEN, CLOSE, OPEN_CALL, CLOSE_CALL)


@dataclass
class Stats:
    """Token counts and times of a reply.

    Attributes:
        prompt: tokens of the prompt, the whole conversation.
        reused: tokens of the prompt that the cache already held.
        new: generated tokens, including a stop token.
        prompt_seconds, seconds: time until the first token, and in total.
        ended: "stop" by the model, "length" at max_new_tokens or the end of the context, else "interrupted".
    """

    prompt: int
    reused: int
    new: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    ended: Literal["stop", "length", "interrupted"] = "interrupted"


class TokenReader:
    """Turns the tokens of a reply into text. Control tokens are left out, except those that are markup to be read.

    Args:
        stop_tokens: ids that end the reply.
        stop: strings that end it: those of the user, and the end mark if the tokenizer has no token for it.
    Attributes:
        ended: whether a stop token or stop string was reached.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop_tokens: Collection[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, frozenset(stop_tokens)
        added = tokenizer.get_added_tokens_decoder().items()
        self._hidden = {id for id, token in added if token.special and token.content not in MARKUP}
        self._text = TextStream(self._decode, stop=stop)
        self.ended = False

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        if token in self._stop:
            self.ended = True
            return ""
        text = self._text.push(token)
        self.ended = self._text.stopped
        return text

    def finish(self) -> str:
        """The remaining text, at the end of the reply."""
        return self._text.finish()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([id for id in ids if id not in self._hidden], skip_special_tokens=False)


class ReplyReader:
    """Turns the tokens of a reply into pieces of thinking and answer, without markup.

    Args:
        stop_tokens, stop: as in `TokenReader`.
        opened: whether the prompt ended with `<think>`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop_tokens: Collection[int], stop: Sequence[str] = (), opened: bool = False
    ):
        self._tokens = TokenReader(tokenizer, stop_tokens=stop_tokens, stop=stop)
        self._splitter = ThinkingSplitter(opened=opened)

    @property
    def ended(self) -> bool:
        """Whether a stop token or stop string was reached."""
        return self._tokens.ended

    def push(self, token: int) -> list[Piece]:
        """The pieces that this token completes, possibly none."""
        return self._splitter.push(self._tokens.push(token))

    def finish(self) -> list[Piece]:
        """The remaining pieces, at the end of the reply."""
        return self._splitter.push(self._tokens.finish()) + self._splitter.finish()
