"""Hooks on named tensors: names, recording, materialised states, module wrappers."""

from qwen3next.hooks.hooked import Hooked

__all__ = ["Hooked"]
