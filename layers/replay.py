"""What a Gated DeltaNet layer wrote since some token, from which its state after any later one can be made again.

A token's effect on the memory is S ← e^g S + k uᵀ: with k, u and g kept, a state is a few sums away and costs a
hundredth of its memory. Source of the idea: the "replay" rollback of vLLM and SGLang.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from layers.implicit_attention import written
from layers.norm import at_least_fp32


@dataclass
class Tape:
    """A layer's state at some token and what the tokens since then did to it.

    Attributes:
        conv: (b, taps − 1, channels) last inputs of the convolution where the tape begins.
        memory: (b, h, k, v) the recurrent state there.
        keys, writes, log_decay: (b n kh k), (b n h v), (b n h) of each call since.
        inputs: (b n channels) of the convolution.
        dtype: to which the memory is rounded at the end of every call.
        ends: tokens since the beginning at the end of each call.
    """

    conv: Tensor
    memory: Tensor
    dtype: torch.dtype
    keys: list[Float[Tensor, "b n kh k"]] = field(default_factory=list)
    writes: list[Float[Tensor, "b n h v"]] = field(default_factory=list)
    log_decay: list[Float[Tensor, "b n h"]] = field(default_factory=list)
    inputs: list[Float[Tensor, "b n channels"]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens since the beginning."""
        return self.ends[-1] if self.ends else 0

    @property
    def nbytes(self) -> int:
        parts = (self.conv, self.memory, *self.keys, *self.writes, *self.log_decay, *self.inputs)
        return sum(x.nbytes for x in parts)

    def add(self, inputs: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor) -> None:
        """Note a call's tokens, none of them padding; `memory` is the state before them."""
        memory, v = at_least_fp32(memory), at_least_fp32(v)
        if v.shape[1] == 1:  # the token loop's own step, bit by bit
            key = k.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
            decayed = log_decay.exp().mT[..., None] * memory
            recalled = key.transpose(1, 2).flatten(0, 1) @ decayed.flatten(0, 1)
            u = beta[..., None] * (v - recalled.unflatten(0, memory.shape[:2]).transpose(1, 2))
        else:
            u = written(k, v, log_decay, beta, state=memory)
        self.inputs.append(inputs)
        self.keys.append(k)
        self.writes.append(u)
        self.log_decay.append(log_decay)
        self.ends.append(self.length + v.shape[1])

    def cut(self, length: int) -> "Tape":
        """The same beginning, followed by its first `length` tokens only; shares what both have."""
        begin = Tape(self.conv, self.memory, self.dtype)
        if not length:
            return begin
        parts = ([torch.cat(x, dim=1)[:, :length]] for x in (self.keys, self.writes, self.log_decay, self.inputs))
        begin.keys, begin.writes, begin.log_decay, begin.inputs = parts
        begin.ends = [*(n for n in self.ends if n < length), length]
        return begin

    def skip(self, length: int) -> "Tape":
        """A tape that begins after the first `length` tokens, ends where this one does and holds no more than that."""
        later = Tape(*self.state_after([length] * len(self.conv)), self.dtype)
        parts = (
            [torch.cat(x, dim=1)[:, length:].clone()] for x in (self.keys, self.writes, self.log_decay, self.inputs)
        )
        later.keys, later.writes, later.log_decay, later.inputs = parts
        later.ends = [n - length for n in self.ends if n > length]
        return later

    def state_after(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Convolution and recurrent state after so many tokens of each row.

        To the bit those of decoding token by token; tokens that ran as a chunk are as exact as chunk and loop agree.
        """
        memory, most = self.memory, max(tokens)
        if not most:
            return self.conv, memory.to(self.dtype)
        count = torch.tensor(tokens, device=memory.device)
        keys, writes, log_decay, inputs = (
            torch.cat(x, dim=1)[:, :most] for x in (self.keys, self.writes, self.log_decay, self.inputs)
        )
        own = torch.arange(most, device=memory.device) < count[:, None]  # (b n): beyond, a row keeps its state
        decay = log_decay.exp().masked_fill(~own[..., None], 1.0)
        writes = writes.masked_fill(~own[..., None, None], 0.0)
        share = memory.shape[1] // keys.shape[2]
        keys = keys.repeat_interleave(share, dim=2).transpose(1, 2).flatten(0, 1)  # (b · h, n, k)
        writes, decay = writes.transpose(1, 2).flatten(0, 1), decay.mT.flatten(0, 1)[..., None, None]
        state = at_least_fp32(memory).flatten(0, 1)
        for t in range(most):
            state = torch.baddbmm(decay[:, t] * state, keys[:, t : t + 1].mT, writes[:, t : t + 1])
            if t + 1 in self.ends:
                state = state.to(self.dtype).to(state.dtype)
        taps = self.conv.shape[1]
        history = torch.cat((self.conv, inputs.to(self.conv.dtype)), dim=1)
        place = count[:, None] + torch.arange(taps, device=memory.device)
        conv = history.gather(1, place[..., None].expand(-1, -1, history.shape[2]))
        return conv, state.to(self.dtype).unflatten(0, memory.shape[:2])
