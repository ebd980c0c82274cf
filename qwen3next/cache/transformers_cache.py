"""transformers' Cache over a HybridCache: what `generate` asks of a cache, with padding and rollback."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
)

from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.cache.hybrid import HybridCache

HISTORY = 256  # tokens that `crop` can take back: more than assisted decoding ever drafts


class HybridLayers(Cache):
    """A DynamicCache or StaticCache whose contents are those of a HybridCache.

    It counts columns, absent tokens among them; the HybridCache holds real tokens alone.

    Attributes:
        hybrid: the contents; None before the first forward.
        columns: (b, n) True where the column held a token.
        recording: whether `crop` will be asked for.
        drafting: whether the contents are to include those of the MTP layer.
    """

    hybrid: HybridCache | None = None
    columns: Tensor | None = None
    recording = drafting = False
    is_compileable = False
    _waiting: tuple[Any, ...] | None = None

    def opened(self, core: Any, batch: int, length: int) -> HybridCache | None:
        """The HybridCache, with room for so many more columns; None if this call is to be taken in later.

        A first call with gradients runs without a cache, through which none would flow. It enters the cache when the
        cache is used, so a training step never pays for it.
        """
        if self.columns is None and torch.is_grad_enabled():
            return None
        self._fill()
        if self.hybrid is None:
            longest = max(core.config.longest_context, length)
            self.hybrid = core.new_cache(batch, max_len=longest, mtp=self.drafting)
        self.hybrid.lengthen(2 * max(self.hybrid.lengths) + length if self._full(length) else 0)
        if self.recording or not any(isinstance(state, DeltaNetState) for state in self.hybrid.layers):
            self.hybrid.history = HISTORY
        return self.hybrid

    def _full(self, length: int) -> bool:
        return self.hybrid is not None and max(self.hybrid.lengths) + length > self.hybrid.max_len

    def took(self, core: Any, tokens: Tensor, segments: Segments, embeds: Tensor | None) -> None:
        """Note that a call's tokens are in the cache now, or wait to be."""
        if self.hybrid is None:
            self._waiting = weakref.ref(core), tokens, segments, None if embeds is None else embeds.detach()
        self.columns = segments.mask if self.columns is None else torch.cat((self.columns, segments.mask), dim=1)

    @torch.no_grad()
    def _fill(self) -> None:
        """Take in what waits."""
        if self._waiting is None:
            return
        model, tokens, segments, embeds = self._waiting
        core, self._waiting, columns = model(), None, self.columns
        assert core is not None, "the model of this cache is gone"
        self.columns = None
        core.hidden_states(tokens, segments, self.opened(core, *tokens.shape), stats=False, embeds=embeds)
        self.columns = columns

    def step(self, core: Any, tokens: Tensor) -> Tensor:
        """Logits (b, t, vocab) after each of these tokens (b, t)."""
        hybrid = self.opened(core, *tokens.shape)
        assert hybrid is not None
        assert self.columns is not None
        logits = core.step(tokens, hybrid)[:, None] if tokens.shape[1] == 1 else core.step_all(tokens, hybrid)
        self.columns = torch.cat((self.columns, torch.ones_like(tokens, dtype=torch.bool)), dim=1)
        return logits

    # What transformers calls.

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        return 0 if self.columns is None else self.columns.shape[1]

    def get_max_length(self, _layer_idx: int | None = None) -> int:
        return self._most()

    def has_previous_state(self, _layer_idx: int | None = None, _state_idx: int | None = None) -> bool:
        return self.columns is not None

    def activate_past_recording(self) -> None:
        self.recording = True

    def is_recording_past(self, _layer_idx: int) -> bool:
        return self.recording

    @property
    def is_croppable(self) -> bool:
        return self.recording

    @property
    def is_initialized(self) -> bool:
        return self.columns is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.columns is None else len(self.columns)

    def reset(self) -> None:
        self.hybrid = self.columns = self._waiting = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns, given as a negative number.

        Raises: ValueError for a positive number, or for more than `HISTORY` tokens or what was not recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number.")
        if not tokens_to_remove or self.columns is None:
            return
        self._fill()
        assert self.hybrid is not None
        self.hybrid.rollback(self.columns[:, tokens_to_remove:].sum(1).tolist())
        self.columns = self.columns[:, :tokens_to_remove]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._fill()
        if self.hybrid is not None and self.columns is not None:
            self.hybrid, self.columns = self.hybrid.select(indices), self.columns[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.columns is not None:
            self.batch_select_indices(
                torch.arange(len(self.columns), device=self.columns.device).repeat_interleave(repeats)
            )

    def _most(self) -> int:
        """Columns of a static cache; −1 for a dynamic one."""
        return max((layer.get_max_length() for layer in self.__dict__["_blank"]), default=-1)

    @property
    def layers(self) -> list[Any]:
        """Copies of the contents in transformers' layers; those are empty before the first forward."""
        self._fill()
        if self.hybrid is None:
            return self.__dict__["_blank"]
        return [self._copied(state) for state in self.hybrid.layers]

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self.__dict__["_blank"] = layers

    def __len__(self) -> int:
        return len(self.__dict__["_blank"]) if self.hybrid is None else len(self.hybrid.layers)

    def _copied(self, state: Any) -> Any:
        if isinstance(state, DeltaNetState):
            layer = LinearAttentionLayer()
            layer.conv_states[0] = torch.nn.functional.pad(state.conv.mT, (1, 0))  # theirs keeps one input more
            layer.recurrent_states[0], layer.conv_kernel_size[0] = state.recurrent, state.conv.shape[1] + 1
            for known in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized):
                known[0] = True
            layer.has_previous_state[0], layer.device, layer.dtype = True, state.conv.device, state.conv.dtype
            return layer
        assert isinstance(state, KVCache)
        assert self.hybrid is not None
        layer, most = DynamicLayer(), self._most()
        layer = layer if most < 0 else StaticLayer(max_cache_len=most)
        layer.keys, layer.values = (self._by_columns(x, most) for x in state.read(0, max(self.hybrid.lengths)))
        layer.is_initialized, layer.device, layer.dtype = True, layer.keys.device, layer.keys.dtype
        return layer

    def _by_columns(self, x: Tensor, most: int) -> Tensor:
        """(b, h, places, d) as (b, h, columns, d), zeros where there is no token, and up to `most` columns."""
        assert self.columns is not None
        place = (self.columns.long().cumsum(1) - 1).clamp(min=0)[:, None, :, None]
        x = x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])).masked_fill(~self.columns[:, None, :, None], 0)
        return torch.nn.functional.pad(x, (0, 0, 0, max(most - x.shape[2], 0)))


class HybridDynamicCache(HybridLayers, DynamicCache):
    """For calls that pass a DynamicCache, and by default."""


class HybridStaticCache(HybridLayers, StaticCache):
    """For calls that pass a StaticCache; memory is taken as tokens come, and a longer text fits."""


def adopted(cache: Cache) -> HybridLayers:
    """The caller's cache, which holds a HybridCache from now on: the same object, under another class.

    Raises: ValueError for a cache of another kind, or one that another model filled.
    """
    if isinstance(cache, HybridLayers):
        return cache
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        kind = f"{'offloaded ' if getattr(cache, 'offloading', False) else ''}{type(cache).__name__}"
        raise ValueError(f"This model's states cannot be in a {kind}: pass a DynamicCache or StaticCache.")
    if any(_filled(layer) for layer in cache.layers):
        raise ValueError("This cache was filled by another model: pass an empty one.")
    recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
    blank = cache.__dict__.pop("layers")
    cache.__class__ = HybridStaticCache if type(cache) is StaticCache else HybridDynamicCache
    assert isinstance(cache, HybridLayers)
    cache.layers, cache.recording = blank, recording
    return cache


def _filled(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return any(layer.has_previous_state.values())
    return bool(layer.is_initialized) and layer.get_seq_length() > 0


def segments_of(new: Tensor, mask: Tensor | None, positions: Tensor | None, kept: HybridLayers | None) -> Segments:
    """Where the sequences of `new` (b, t, …) lie. What the mask says of tokens that a cache holds, it said before."""
    b, t = new.shape[:2]
    seen = 0 if kept is None else kept.get_seq_length()
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] not in (t, seen + t):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must have shape ({b}, {seen + t}), 1 for a token, got {shape}.")
        mask = mask[:, -t:] != 0
    real = torch.ones(b, t, dtype=torch.bool, device=new.device) if mask is None else mask
    if positions is not None and not seen and t > 1:
        positions = (positions[0] if positions.ndim == 3 else positions).expand(b, -1)
        jumps = (positions.diff(dim=1) != 1) & real[:, 1:] & real[:, :-1]
        if bool(jumps.any()):
            if bool((positions[:, 1:][jumps] != 0).any()):
                raise ValueError("position_ids must count up by one, from 0 in every sequence of a row.")
            numbers = torch.nn.functional.pad(jumps.long().cumsum(1), (1, 0))
            return Segments.from_document_ids(numbers.masked_fill(~real, -1))
    return Segments.full(new) if mask is None else Segments.from_mask(mask)
