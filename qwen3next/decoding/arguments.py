"""From a description to the C structures that decode.cpp reads."""

import ctypes
from typing import Any

from torch import Tensor

from layers.cpp.operands import address
from layers.cpp.step import DTYPES, EmbeddingAndHead, Layer, Mat, Sizes, set_field
from qwen3next.decoding.description import Description


class Arguments:
    """The structures of one model. Their addresses are valid while the Guard keeps the model's weights alive.

    Attributes:
        sizes: what all layers share.
        layers: an array, one `Layer` a block.
        ends: the embedding, the final norm and the head.
    """

    def __init__(self, description: Description):
        """Raises: ValueError for a weight without memory for all of its numbers."""
        dtypes = {held.field: held.tensor.dtype for held in description.around.weights}
        self.dtype = dtypes["embedding"]
        # Bools and whole numbers alike; all but eps are int64.
        numbers = {name: x if name == "eps" else int(x) for name, x in description.sizes.items()}
        self.sizes = Sizes(dtype=DTYPES[self.dtype], **numbers)
        self.layers: ctypes.Array[Layer] = (Layer * len(description.layers))()
        for arguments, layer in zip(self.layers, description.layers, strict=True):
            for path, number in layer.settings.items():
                set_field(arguments, path, number)
            for held in layer.weights:
                set_field(arguments, held.field, _mat(held.tensor))
        around: dict[str, Any] = {held.field: held.tensor for held in description.around.weights}
        self.ends = EmbeddingAndHead(vocab=len(around["head"]), **{name: _mat(x) for name, x in around.items()})


def _mat(x: Tensor) -> Mat:
    return Mat(address(x), DTYPES[x.dtype])
