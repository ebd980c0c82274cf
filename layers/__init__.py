"""The mathematics of the Qwen3-Next architecture: plain ints and tensors in, tensors out.

Shapes: b batch, t time (tokens), s time of keys, h heads, k key width, v value width, d width, e experts, n tokens of
a flattened batch. Nothing here knows a config, a checkpoint name or a layer index.
"""

from layers.kernels.cpp.cpu import bound_torch

bound_torch()  # before torch runs anything

# qwen3next compares this with its own version: another package called `layers` would otherwise be used silently.
__version__ = "0.1.0"

# Every fast implementation is registered where it is defined.
import layers.kernels.attention  # noqa: E402
import layers.kernels.cross_entropy  # noqa: E402
import layers.kernels.experts  # noqa: E402
import layers.kernels.linear  # noqa: E402
import layers.kernels.rows  # noqa: E402, F401
