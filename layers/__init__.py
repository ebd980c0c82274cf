"""The mathematics of the Qwen3-Next architecture: plain ints and tensors in, tensors out.

Definitions are at the top of this package. Their fast implementations are in `kernels`, and `dispatch` chooses between
them. Nothing here knows a config, a checkpoint name or a layer index.
Shapes: b batch, t time (tokens), s time of keys, h heads, k key width, v value width, d width, e experts, n tokens of
a flattened batch.
"""

from layers.cpp.cpu import bound_torch, wait_briefly

wait_briefly()  # before torch is loaded
bound_torch()  # before torch runs anything

# These register implementations, which definitions find by name.
import layers.interp.materialized_states  # noqa: E402
import layers.kernels.conv  # noqa: E402
import layers.kernels.delta_rule  # noqa: E402

# qwen3next compares this with its own version: another package called `layers` would otherwise be used silently.
__version__ = "0.1.0"

# Every fast implementation is registered where it is defined.
import layers.kernels.attention  # noqa: E402
import layers.kernels.cross_entropy  # noqa: E402
import layers.kernels.experts  # noqa: E402
import layers.kernels.linear  # noqa: E402
import layers.kernels.one_token  # noqa: E402
import layers.kernels.rows  # noqa: E402
import layers.kernels.triton_rows  # noqa: E402
import layers.old_names  # noqa: E402

layers.old_names.install()
