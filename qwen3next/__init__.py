"""qwen3next: the open implementation of the Qwen3-Next architecture."""

import layers

__version__ = "0.1.0"

# Before anything imports from it, or the error would be about a missing module.
if getattr(layers, "__version__", None) != __version__:
    raise ImportError(
        f"Python found a package `layers` at {next(iter(layers.__path__))} "
        f"that does not belong to qwen3next {__version__}. "
        "Rename or remove that one, or put qwen3next before it on the path."
    )

from layers.deprecation import renamed_names
from qwen3next import old_names, presets
from qwen3next.api import Qwen3Next, load
from qwen3next.cache.hybrid import HybridCache
from qwen3next.chat.document import Document
from qwen3next.checkpoints.save import save
from qwen3next.checkpoints.state_dict_adapter import Layout
from qwen3next.config import ModelConfig
from qwen3next.explain import explain
from qwen3next.generation.beam_search import beam_search
from qwen3next.generation.generate import Generation, generate, sample, stream
from qwen3next.generation.grammar import Grammar
from qwen3next.generation.sampling_rules import SamplingRules
from qwen3next.losses import Losses
from qwen3next.model import Output
from qwen3next.prefix.store import PrefixStore

__all__ = [
    "Document",
    "Generation",
    "Grammar",
    "HybridCache",
    "Layout",
    "Losses",
    "ModelConfig",
    "Output",
    "PrefixStore",
    "Qwen3Next",
    "SamplingRules",
    "beam_search",
    "explain",
    "generate",
    "load",
    "presets",
    "sample",
    "save",
    "stream",
]

old_names.install()
__getattr__ = renamed_names(__name__, {"Cache": "HybridCache"})
