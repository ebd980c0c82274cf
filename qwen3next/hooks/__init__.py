"""Hooks on named tensors: names, recording, materialised states, wrapped modules."""

from qwen3next.hooks.hooked import Hooked

__all__ = ["Hooked"]
