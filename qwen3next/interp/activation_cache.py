"""Analyse one forward: contributions to the residual stream, and recurrent states.

_, acts = model.run_with_cache(ids)
cache = ActivationCache(acts, model)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layers.delta_rule import gated_delta_rule
from layers.gated_deltanet import GatedDeltaNet
from layers.interp.implicit_attention import implicit_attention, recalled, states_at
from layers.norm import at_least_fp32
from qwen3next.interp.ledger import Ledger
from qwen3next.interp.residual import ResidualStream


class ActivationCache(ResidualStream):
    """The tensors of one forward by name, and analyses of them.

    `CachedPoints` has names, slices, devices and files; `ResidualStream` has the residual stream, heads and logits.
    This class adds recurrent states.
    """

    def stack_activation(self, name: str, layers: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Stack one point over all layers that have it.

        Returns: a tensor (layers, …) and the indices of those layers.
        Raises: ValueError if no layer has the point, or if its shape differs between layers.
        """
        found = []
        for i in range(self.layers) if layers is None else [i % self.layers for i in layers]:
            try:
                found.append((i, self.full_name((name, i))))
            except KeyError:
                continue
        if not found:
            raise ValueError(f"No block has a hook point {name}: choose one from model.hook_dict.")
        tensors = self.need([full for _, full in found], [full.replace(f".{i}.", ".*.", 1) for i, full in found[:1]])
        if len({x.shape for x in tensors}) > 1:
            raise ValueError(f"{name} differs in shape between layers: give linear_attn.{name} or self_attn.{name}.")
        return torch.stack(tensors), [i for i, _ in found]

    def implicit_attention(self, layer: int) -> Float[Tensor, "b h t s"]:
        """The matrix A of a Gated DeltaNet layer: its output is A v if the recurrent state was zero at the start."""
        q, k, log_decay, beta = self._memory_points(layer, "q", "k", "log_decay", "beta")
        return implicit_attention(q, k, log_decay, beta, segments=self.segments, rule=self._memory(layer).rule)

    def state(
        self, layer: int, pos: int | Sequence[int], *, before: Float[Tensor, "b h k v"] | None = None
    ) -> Float[Tensor, "b h k v"] | Float[Tensor, "b p h k v"]:
        """A Gated DeltaNet layer's recurrent state after token `pos`, or after each of several, recomputed from k, v.

        Args:
            before: the state before the first token here; needed if the forward continued a cache or tokens were
                sliced off.
        Raises: ValueError if it is needed and missing, or for a softmax layer.
        """
        k, v, log_decay, beta = self._written_points(layer, before)
        places = [p + k.shape[1] if p < 0 else p for p in ([pos] if isinstance(pos, int) else pos)]
        rule = self._memory(layer).rule
        states = states_at(k, v, log_decay, beta, places, state=before, segments=self.segments, rule=rule)
        return states[:, 0] if isinstance(pos, int) else states

    def ledger(self, layer: int, *, before: Float[Tensor, "b h k v"] | None = None) -> Ledger:
        """Per token and head of a Gated DeltaNet layer: decay, β, and norms of the value recalled, erased and written.

        Args, Raises: as `state`.
        """
        rule = self._memory(layer).rule
        k, v, log_decay, beta = (at_least_fp32(x) for x in self._written_points(layer, before))
        answer = recalled(k, v, log_decay, beta, state=before, segments=self.segments, rule=rule)
        length = answer.norm(dim=-1)
        mask = torch.ones_like(beta[..., 0], dtype=torch.bool) if self.segments is None else self.segments.mask
        erased = beta[..., None] * answer if rule is gated_delta_rule else torch.zeros_like(answer)
        change = (beta[..., None] * v - erased).norm(dim=-1) * mask[..., None]
        return Ledger(layer % self.layers, log_decay, beta, length, erased.norm(dim=-1), change, mask)

    def _written_points(self, layer: int, before: Tensor | None) -> list[Tensor]:
        found = self._memory_points(layer, "k", "v", "log_decay", "beta")
        if before is None and not self.from_start:
            raise ValueError("Earlier tokens were sliced off or are in a cache: give `before`, the state after them.")
        return found

    def _memory(self, layer: int) -> GatedDeltaNet:
        mixer = self._mixer(layer)
        if not isinstance(mixer, GatedDeltaNet):
            kinds = self.model.config.layer_types
            chosen = [i for i, kind in enumerate(kinds) if kind == "linear_attention"]
            raise ValueError(f"Block {layer} is softmax attention and has no recurrent state: choose one of {chosen}.")
        return mixer

    def _memory_points(self, layer: int, *names: str) -> list[Tensor]:
        self._memory(layer)
        if not self.gapless:
            raise ValueError("Some tokens were left out, and a recurrent state needs all: keep a contiguous range.")
        prefix = f"blocks.{layer % self.layers}.linear_attn.hook_"
        return self.need([prefix + name for name in names], [prefix + name for name in names])
