"""What a model carries between calls: keys and values, recurrent memory, last convolution inputs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.gated_attention import KVState
from layers.gated_deltanet import DeltaNetState
from layers.norm import at_least_fp32
from layers.rope import Yarn
from layers.segments import Segments
from qwen3next.config import ModelConfig


@dataclass
class Cache:
    """The state of `batch` sequences. Make one with `model.new_cache`; `model(ids, cache=cache)` reads and extends it.

    Attributes:
        layers: one KVState or DeltaNetState a layer.
        tokens: (b, max_len) the token ids seen, row r's first `lengths[r]` places.
        lengths: tokens each row holds.
        yarn: how RoPE was stretched where the keys were turned.
        last_logits: (b, vocab) after each row's last token, once `generate` or `prefill` has run; else None.
    """

    layers: list[KVState | DeltaNetState]
    tokens: Tensor
    lengths: tuple[int, ...]
    yarn: Yarn | None = None
    last_logits: Tensor | None = field(default=None, repr=False)

    @property
    def max_len(self) -> int:
        """Tokens that fit into a row."""
        return self.tokens.shape[1]

    def admit(self, input_ids: Tensor, segments: Segments) -> Segments:
        """Check that these tokens fit, before anything is written; return them as continuations of the rows.

        Raises: ValueError for another batch size, packed rows, or more tokens than fit.
        """
        if input_ids.shape[0] != self.tokens.shape[0]:
            raise ValueError(
                f"The cache was made for {self.tokens.shape[0]} sequences and {input_ids.shape[0]} are given: "
                "make it with batch= that many."
            )
        segments = segments.after(self.lengths)
        if max(segments.ends) > self.max_len:
            raise ValueError(
                f"The cache holds {self.max_len} tokens a sequence and {max(segments.ends)} are needed: "
                "make it with a larger max_len."
            )
        return segments

    def advance(self, input_ids: Tensor, segments: Segments) -> None:
        """Note that these tokens, a result of `admit`, are now part of every layer's state."""
        for r, (past, end) in enumerate(zip(segments.past, segments.ends, strict=True)):
            first = 0 if segments.plain else int(segments.first[r])
            self.tokens[r, past:end] = input_ids[r, first : first + end - past]
        self.lengths, self.last_logits = segments.ends, None

    def move_to(self, larger: "Cache") -> "Cache":
        """Continue in a cache of the same model with a larger max_len; returns it."""
        for old, new in zip(self.layers, larger.layers, strict=True):
            for name, tensor in vars(old).items():
                place = getattr(new, name)  # as large in the dimension after the batch, or larger
                place[:, : tensor.shape[1]] = tensor
        larger.tokens[:, : self.max_len] = self.tokens
        larger.lengths, larger.last_logits = self.lengths, self.last_logits
        return larger

    def nbytes(self) -> int:
        """Bytes of all tensors that grow with layers or context (token ids left out)."""
        return sum(x.nbytes for layer in self.layers for x in vars(layer).values())


def new_cache(
    config: ModelConfig,
    *,
    batch: int,
    max_len: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> Cache:
    """An empty cache, allocated whole: KV in `kv_dtype`, convolution inputs in `dtype`, memory in fp32 or better."""
    if batch < 1 or max_len < 1:
        raise ValueError(f"A cache needs at least one sequence and one token, got batch={batch}, max_len={max_len}.")
    c = config
    layers: list[KVState | DeltaNetState] = []
    for kind in c.layer_types:
        if kind == "full_attention":
            shape = (batch, max_len, c.num_key_value_heads, c.head_dim)
            k, v = (torch.zeros(shape, dtype=kv_dtype, device=device) for _ in range(2))
            layers.append(KVState(k, v))
        else:
            conv = torch.zeros(batch, c.linear_conv_kernel_dim - 1, c.conv_channels, dtype=dtype, device=device)
            heads = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
            memory = at_least_fp32(torch.zeros(batch, *heads, dtype=dtype, device=device))
            layers.append(DeltaNetState(conv, memory))
    return Cache(layers, torch.zeros(batch, max_len, dtype=torch.long, device=device), (0,) * batch, c.rope_scaling)
