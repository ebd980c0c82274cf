"""A log of what a Gated DeltaNet layer wrote since some token, which gives its state after any later token.

A token changes the state by S ← e^g S + k uᵀ. With k, u and g logged, a later state is a few sums away, and an entry
takes about a hundredth of the bytes of a state. Source of the idea: the "replay" rollback of vLLM and SGLang.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from layers.cpp.operands import address, operand
from layers.cpp.step import DTYPES, RecurrentState, Sizes, kernels
from layers.norm import at_least_fp32
from layers.state.written import written


@dataclass
class UpdateLog:
    """A layer's state at some token, and the updates of the tokens since then.

    Attributes:
        conv: (b, kernel_size − 1, channels) last inputs of the convolution where the log begins.
        memory: (b, h, k, v) the recurrent state there.
        keys, writes, decay: k, u and e^g, (b n kh k), (b n h v), (b n h), of each call since.
        inputs: (b n channels) of the convolution.
        dtype: to which the state is rounded at the end of every call.
        compiled: whether the call ran in compiled code, which rounds in an order of its own.
        ends: tokens since the beginning at the end of each call.
    """

    conv: Tensor
    recurrent: Tensor
    dtype: torch.dtype
    keys: list[Float[Tensor, "b n kh k"]] = field(default_factory=list)
    writes: list[Float[Tensor, "b n h v"]] = field(default_factory=list)
    decay: list[Float[Tensor, "b n h"]] = field(default_factory=list)
    inputs: list[Float[Tensor, "b n channels"]] = field(default_factory=list)
    compiled: list[bool] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens since the beginning."""
        return self.ends[-1] if self.ends else 0

    @property
    def nbytes(self) -> int:
        parts = (self.conv, self.recurrent, *self.keys, *self.writes, *self.decay, *self.inputs)
        return sum(x.nbytes for x in parts)

    def add(
        self,
        inputs: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        recurrent: Tensor,
        *,
        corrects: bool = True,
    ) -> None:
        """Log a call's tokens, none of them padding.

        Args:
            memory: the state before them.
            corrects: whether the rule writes what is new in v (the delta rule), or else all of it.
        """
        recurrent, v = at_least_fp32(recurrent), at_least_fp32(v)
        if not corrects:
            u = beta[..., None] * v
        elif v.shape[1] == 1:  # the token loop's own step, bit by bit
            key = k.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
            decayed = log_decay.exp().mT[..., None] * recurrent
            recalled = key.transpose(1, 2).flatten(0, 1) @ decayed.flatten(0, 1)
            u = beta[..., None] * (v - recalled.unflatten(0, recurrent.shape[:2]).transpose(1, 2))
        else:
            u = written(k, v, log_decay, beta, state=recurrent)
        self.note(inputs, k, u, log_decay.exp())

    def note(self, inputs: Tensor, k: Tensor, u: Tensor, decay: Tensor, *, compiled: bool = False) -> None:
        """As `add`, if it is known what the tokens write."""
        self.inputs.append(inputs)
        self.keys.append(k)
        self.writes.append(u)
        self.decay.append(decay)
        self.compiled.append(compiled)
        self.ends.append(self.length + u.shape[1])

    def join(self, count: int) -> None:
        """Make the last `count` entries one: parts of a single call, between which nothing was rounded."""
        if count > 1:
            for notes in (self.inputs, self.keys, self.writes, self.decay):
                notes[-count:] = [torch.cat(notes[-count:], dim=1)]
            self.compiled[-count:] = self.compiled[-1:]
            self.ends[-count:] = self.ends[-1:]

    def cut(self, length: int) -> "UpdateLog":
        """The same log with only its first `length` tokens; tensors are shared."""
        return self._part(UpdateLog(self.conv, self.recurrent, self.dtype), 0, length)

    def skip(self, length: int) -> "UpdateLog":
        """A log that begins after the first `length` tokens and ends where this one does."""
        return self._part(UpdateLog(*self.state_after([length] * len(self.conv)), self.dtype), length, self.length)

    def _part(self, to: "UpdateLog", first: int, last: int) -> "UpdateLog":
        begin = 0
        for i, end in enumerate(self.ends):
            a, b = max(first, begin) - begin, min(last, end) - begin
            if a < b:
                whole = (self.inputs[i], self.keys[i], self.writes[i], self.decay[i])
                parts = whole if b - a == end - begin else tuple(x[:, a:b].clone() for x in whole)
                to.note(*parts, compiled=self.compiled[i])
            begin = end
        return to

    def state_after(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Convolution and recurrent state after so many tokens of each row.

        Equal to the bit to decoding token by token. Tokens that ran as a chunk are as exact as chunk and loop agree.
        """
        most = max(tokens)
        if not most:
            return self.conv, self.recurrent.to(self.dtype)
        state = self.recurrent.to(self.writes[0].dtype)
        count, begin = torch.tensor(tokens, device=state.device), 0
        for i, end in enumerate(self.ends):
            if begin < most:
                own = torch.arange(begin, end, device=state.device) < count[:, None]  # later, a row keeps its state
                decay = self.decay[i].masked_fill(~own[..., None], 1.0)
                writes = self.writes[i].masked_fill(~own[..., None, None], 0.0)
                again = _replay_compiled if self.compiled[i] else _replay
                state = again(state, self.keys[i], writes, decay).to(self.dtype).to(state.dtype)
            begin = end
        kernel_size = self.conv.shape[1]
        history = torch.cat((self.conv, *(x.to(self.conv.dtype) for x in self.inputs)), dim=1)
        place = count[:, None] + torch.arange(kernel_size, device=state.device)
        conv = history.gather(1, place[..., None].expand(-1, -1, history.shape[2]))
        return conv, state.to(self.dtype)


def fold(
    before: Sequence[tuple[Tensor, Tensor]], logs: Sequence[UpdateLog], counts: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Convolution and recurrent state of each layer after the first `counts` tokens of each row of a compiled call.

    Equal to the bit to single steps. One pass over the states, in one call for all layers.

    Args:
        before: these states of each layer before the call.
        logs: whose last entries are the call's.
    """
    (b, heads, key_dim, value_dim), inputs = before[0][1].shape, logs[0].inputs[-1]
    n, key_heads, kernel_size = inputs.shape[1], logs[0].keys[-1].shape[2], before[0][0].shape[1] + 1
    sizes = Sizes(key_heads=key_heads, key_dim=key_dim, value_heads=heads, value_dim=value_dim, kernel_size=kernel_size)
    if inputs.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"fold: inputs must be float32, bfloat16 or float64; they are {inputs.dtype}.")
    sizes.dtype = DTYPES[inputs.dtype]
    exact = torch.float64 if inputs.dtype == torch.float64 else torch.float32  # of the notes, as the step makes them
    if not key_heads or heads % key_heads or len(counts) != b or not 0 <= min(counts) <= max(counts) <= n:
        raise ValueError(f"A call of {n} tokens a row of {b} cannot be folded to {list(counts)} of them.")
    channels = 2 * key_heads * key_dim + heads * value_dim
    states, after, alive = (RecurrentState * len(before))(), [], []
    for arguments, (conv, memory), log in zip(states, before, logs, strict=True):
        now = conv.new_empty(conv.shape), memory.new_empty(memory.shape)  # contiguous, whatever these are
        read = (
            operand("fold: conv", conv, (b, kernel_size - 1, channels), inputs.dtype),
            operand(
                "fold: state", memory, (b, heads, key_dim, value_dim), torch.float32, torch.bfloat16, torch.float64
            ),
            operand("fold: inputs", log.inputs[-1], (b, n, channels), inputs.dtype),
            operand("fold: keys", log.keys[-1], (b, n, key_heads, key_dim), exact),
            operand("fold: writes", log.writes[-1], (b, n, heads, value_dim), exact),
            operand("fold: decay", log.decay[-1], (b, n, heads), exact),
        )
        arguments.conv_after, arguments.after = (x.data_ptr() for x in now)
        arguments.conv_before, arguments.before = address(read[0]), address(read[1])
        arguments.log_inputs, arguments.log_keys, arguments.log_deltas, arguments.log_decay = map(address, read[2:])
        arguments.dtype = DTYPES[memory.dtype]
        after.append(now)
        alive.append(read)
    numbers = (ctypes.c_int64 * b)(*counts)
    kernels().fold(ctypes.byref(sizes), states, len(states), b, n, numbers, torch.get_num_threads())
    return after


def _replay(state: Tensor, keys: Tensor, writes: Tensor, decay: Tensor) -> Tensor:
    """As the token loop of layers/delta_rule.py."""
    b, h = state.shape[:2]
    keys = keys.repeat_interleave(h // keys.shape[2], dim=2).transpose(1, 2).flatten(0, 1)  # (b · h, n, k)
    writes, decay = writes.transpose(1, 2).flatten(0, 1), decay.mT.flatten(0, 1)[..., None, None]
    state = state.flatten(0, 1)
    for t in range(writes.shape[1]):
        state = torch.baddbmm(decay[:, t] * state, keys[:, t : t + 1].mT, writes[:, t : t + 1])
    return state.unflatten(0, (b, h))


def _replay_compiled(state: Tensor, keys: Tensor, writes: Tensor, decay: Tensor) -> Tensor:
    """As layers/cpp/decode.cpp."""
    (b, h, key_dim, value_dim), (_, n, key_heads, _) = state.shape, keys.shape
    if not key_heads or h % key_heads or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{key_heads} key heads cannot serve {h} memories in {state.dtype}.")
    keys = operand("replay: keys", keys, (b, n, key_heads, key_dim), state.dtype)
    writes = operand("replay: writes", writes, (b, n, h, value_dim), state.dtype)
    decay = operand("replay: decay", decay, (b, n, h), state.dtype)
    sizes = Sizes(key_heads=key_heads, key_dim=key_dim, value_heads=h, value_dim=value_dim)
    sizes.dtype = DTYPES[state.dtype]
    state = operand("replay: state", state, (b, h, key_dim, value_dim), state.dtype)
    address(state)  # before it is copied
    state = state.clone()
    kernels().replay(ctypes.byref(sizes), b, *map(address, (state, keys, writes, decay)), n)
    return state
