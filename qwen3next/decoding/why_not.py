"""Why a model's steps cannot be compiled, or cannot be one CUDA graph."""

import torch

from layers.dispatch.backends import why_not as backend_why_not
from qwen3next.decoding.describe_model import Unsupported, describe, unknown_module
from qwen3next.decoding.protocol import Decodable
from qwen3next.inputs import like


def why_not(
    model: Decodable, backend: str, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why a backend of "decode" cannot run a model as it stands, in a sentence without a full stop, or None.

    Args:
        backend: "cpp" or "graph".
        device, dtype: answer as if the model were there and in that dtype.
    """
    weight = like(model)
    where, kind = weight.device if device is None else device, weight.dtype if dtype is None else dtype
    if reason := backend_why_not("decode", backend, where, kind):
        return reason
    if backend == "graph":
        return unknown_module(model) or _named_backend(model)
    try:
        describe(model)
    except Unsupported as reason:
        return str(reason)
    return None


def _named_backend(model: Decodable) -> str | None:
    """The first module of the blocks whose backend was chosen by name, in a sentence, or None."""
    for name, module in model.blocks.named_modules():
        if getattr(module, "backend", "auto") != "auto":
            return f"blocks.{name} has a backend chosen by name"
    return None
