"""Steering: add a direction to the residual stream, or to a recurrent state, while the model generates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.hook_point import HookPoint
from qwen3next.cache.hybrid import HybridCache
from qwen3next.hooks.names import Filter


@contextmanager
def steer(model: Any, names: Filter, vector: Float[Tensor, "width"], *, strength: float = 1.0) -> Iterator[None]:
    """Add strength · vector at points of shape (b t width), for every prompt and generated token.

        with steer(model, "blocks.3.hook_resid_post", direction, strength=4.0):
            q.generate(model, ids)

    Raises: ValueError for a point whose last axis has another size; as `model.hooks` for points that do not exist or
        do not fire.
    """

    def push(x: Tensor, hook: HookPoint) -> Tensor:
        if x.shape[-1:] != vector.shape:
            raise ValueError(f"{hook.name} has size {x.shape[-1]}, the vector {len(vector)}: make them equal.")
        return x + (strength * vector).to(x)

    with model.hooks([(names, push)]):
        yield


@contextmanager
def steer_state(
    model: Any,
    cache: HybridCache,
    layer: int,
    change: Float[Tensor, "#b h k v"],
    *,
    strength: float = 1.0,
) -> Iterator[None]:
    """Add strength · change to a Gated DeltaNet layer's recurrent state in `cache` before every call, prompt or step.

        cache = model.new_cache(max_len=200)
        with steer_state(model, cache, 0, other.state(0, -1) - mine.state(0, -1)):
            q.generate(model, ids, cache=cache)

    The state decays and later writes correct it, so the effect of a constant change converges.
    Raises: ValueError for a layer without a recurrent state, or a change of another shape.
    """
    state = cache.layers[layer]
    if not isinstance(state, DeltaNetState):
        raise ValueError(f"Block {layer} is softmax attention and has no recurrent state: choose another block.")
    recurrent = state.recurrent
    if change.shape[1:] != recurrent.shape[1:] or change.shape[0] not in (1, len(recurrent)):
        raise ValueError(
            f"The state is {tuple(recurrent.shape)} and the change {tuple(change.shape)}: make them equal."
        )

    def push(_x: Tensor, _hook: HookPoint) -> None:  # fires before the block reads its state
        state.recurrent = state.recurrent + (strength * change).to(state.recurrent)

    with model.hooks([(f"blocks.{layer % len(cache.layers)}.hook_resid_pre", push)]):
        yield
