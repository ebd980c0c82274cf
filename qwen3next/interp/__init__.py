"""Taking the model apart: one forward's tensors and what follows from them, steering, activations on disk."""

from qwen3next.interp.activation_cache import ActivationCache
from qwen3next.interp.ledger import Ledger
from qwen3next.interp.points import CachedPoints, NotCachedError
from qwen3next.interp.residual import Lens, ResidualStream

__all__ = ["ActivationCache", "CachedPoints", "Ledger", "Lens", "NotCachedError", "ResidualStream"]
