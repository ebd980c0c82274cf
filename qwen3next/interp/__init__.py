"""Interpretability: the tensors of one forward and analyses of them, steering, activations on disk."""

from qwen3next.interp.activation_cache import ActivationCache
from qwen3next.interp.activation_rows import ActivationRows
from qwen3next.interp.ledger import Ledger
from qwen3next.interp.points import CachedPoints, NotCachedError
from qwen3next.interp.residual import Lens, ResidualStream
from qwen3next.interp.steer import steer, steer_state
from qwen3next.interp.stream import stream_activations

__all__ = [
    "ActivationCache",
    "ActivationRows",
    "CachedPoints",
    "Ledger",
    "Lens",
    "NotCachedError",
    "ResidualStream",
    "steer",
    "steer_state",
    "stream_activations",
]
