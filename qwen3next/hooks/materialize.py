"""Materialize tensors that are computed only on request: recurrent states and attention matrices."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from torch import nn

from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet

Mixer = GatedDeltaNet | GatedAttention


def materialize(
    blocks: Sequence[nn.Module], state: Mapping[int, Sequence[int]] | None, pattern: Sequence[int]
) -> ExitStack:
    """See `Hooked.expose`. If it raises, nothing has changed."""
    mixers: list[Mixer] = [m for b in blocks for m in b.modules() if isinstance(m, (GatedDeltaNet, GatedAttention))]
    positions = {_layer(layer, mixers): chosen for layer, chosen in (state or {}).items()}
    for layer, chosen in positions.items():
        if not isinstance(mixers[layer], GatedDeltaNet):
            raise ValueError(f"Layer {layer} is softmax attention and has no recurrent state: expose its pattern.")
        if any(isinstance(p, bool) or not isinstance(p, int) or p < 0 for p in chosen):
            raise ValueError(f"Positions must be integers from 0, the start of the text: layer {layer} got {chosen}.")
    matrices = {_layer(layer, mixers) for layer in pattern}
    restore = ExitStack()
    for layer, mixer in enumerate(mixers):
        restore.callback(_setter(mixer))
        mixer.materialized_pattern = layer in matrices
        if isinstance(mixer, GatedDeltaNet):
            mixer.materialized_positions = tuple(sorted(set(positions.get(layer, ()))))
    return restore


def _layer(layer: int, mixers: Sequence[Mixer]) -> int:
    if not -len(mixers) <= layer < len(mixers):
        raise ValueError(f"There is no layer {layer}: this model has {len(mixers)}, counted from 0.")
    return layer % len(mixers)


def _setter(mixer: Mixer) -> Callable[[], None]:
    """A function that restores the present choice."""
    pattern = mixer.materialized_pattern
    positions = mixer.materialized_positions if isinstance(mixer, GatedDeltaNet) else ()

    def put_back() -> None:
        mixer.materialized_pattern = pattern
        if isinstance(mixer, GatedDeltaNet):
            mixer.materialized_positions = positions

    return put_back
