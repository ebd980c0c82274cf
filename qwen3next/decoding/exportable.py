"""A decoding step as a function of tensors, which torch.export, AOTInductor and other exporters take."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.gated_deltanet import DeltaNetState, GatedDeltaNet
from layers.moe import Experts
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from layers.state.static_kv_cache import StaticKVCache
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.protocol import Decodable

# By operation: what is made of torch's operators, and of no loop over tokens or experts that data decide.
PLAIN = {
    "linear": "torch",
    "elementwise": "torch",
    "delta_rule": "recurrent",
    "experts": "gathered",
    "decode": "torch",
}
NEEDS: dict[str, type[nn.Module]] = {"delta_rule": GatedDeltaNet, "experts": Experts}  # not in every model


class ExportableStep(nn.Module):
    """One token a row, behind states that are plain tensors, two a layer.

    The states of a Gated DeltaNet layer are the last inputs of its convolution (b, kernel size − 1, channels) and the
    recurrent state (b, heads, k, v). Those of a softmax layer are keys and values (b, kv heads, places, head dim).

    Args:
        model: whose modules run, with the backends that are chosen for it.
        in_place: a call changes the states that it is given; else it returns new ones, for formats such as ONNX that
            cannot change their inputs.
    """

    def __init__(self, model: Decodable, *, in_place: bool = True):
        super().__init__()
        self.model, self.in_place = model, in_place

    def forward(
        self, input_ids: Int[Tensor, "b 1"], position: Int[Tensor, "b"], *states: Tensor
    ) -> Float[Tensor, "b vocab"] | tuple[Tensor, ...]:
        """Logits after each row's new token, which stands at `position`, from 0, in its sequence.

        Without `in_place` a tuple of the logits and all states. The caller sees to it that positions are below the
        number of places; nothing checks it in an exported program.
        """
        states = states if self.in_place else tuple(x.clone() for x in states)
        x = self.model.embed_tokens(input_ids)
        rope = self.model._rotation(position[:, None], x.dtype)
        segments, given = Segments.full(input_ids), iter(states)
        for block in self.model.blocks:
            first, second = next(given), next(given)
            if block.mixer == "linear_attention":
                state = DeltaNetState(first, second)
                x, _ = block(x, rope, segments=segments, state=state, stats=False)
                first.copy_(state.conv)
                second.copy_(state.recurrent)
            else:
                keys_and_values = StaticKVCache(first, second, position)
                x, _ = block(x, rope, segments=segments, state=keys_and_values, stats=False)
        logits = self.model.lm_head(self.model.norm(x))[:, 0]
        return logits if self.in_place else (logits, *states)

    def dynamic_places(self, states: Sequence[Tensor]) -> tuple[dict[int, torch.export.Dim] | None, ...]:
        """`dynamic_shapes` of the states for torch.export: the places of keys and values are dynamic."""
        places = torch.export.Dim("places", min=2, max=1 << 24)
        kinds = [block.mixer for block in self.model.blocks for _ in range(2)]
        return tuple(None if kind == "linear_attention" else {2: places} for kind, _ in zip(kinds, states, strict=True))

    def states(self, cache: HybridCache, places: int) -> tuple[Tensor, list[Tensor]]:
        """Positions (b,) of the next tokens, and the states: copies of what a cache holds, with room for `places`.

        Raises: ValueError for a cache that holds more, or one in int8.
        """
        held = max(cache.lengths)
        if held > places:
            raise ValueError(f"The cache holds {held} tokens, but there are {places} places: ask for more of them.")
        if cache.kv_dtype == torch.int8:
            raise ValueError("This cache's keys and values are in int8: make it without kv_dtype.")
        found: list[Tensor] = []
        for state in cache.layers:
            if isinstance(state, KVCache):
                found += _with_room(state.read(0, held), places)
            else:
                found += [state.conv.clone(), state.recurrent.clone()]
        return torch.tensor(cache.lengths, device=cache.tokens.device), found


def plain(model: Any) -> None:
    """Have a model run torch's operators alone, so that an exported step needs nothing of this package.

    Slower than what "auto" picks. `model.set_backend(operation, "auto")` takes it back.
    """
    for operation, backend in PLAIN.items():
        if any(isinstance(module, NEEDS.get(operation, nn.Module)) for module in model.modules()):
            model.set_backend(operation, backend)


def _with_room(heads: Sequence[Tensor], places: int) -> list[Tensor]:
    return [nn.functional.pad(x, (0, 0, 0, places - x.shape[2])).contiguous() for x in heads]
