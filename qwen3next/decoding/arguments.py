"""From a description to the C structures that decode.cpp reads."""

import ctypes

from torch import Tensor

from layers.cpp.step import DTYPES, EmbeddingAndHead, Layer, Mat, Sizes, mat, set_field
from qwen3next.decoding.description import Description, Held


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
            for path, weight in _mats(layer.weights).items():
                set_field(arguments, path, weight)
        vocab = next(len(held.tensor) for held in description.around.weights if held.field == "head")
        self.ends = EmbeddingAndHead(vocab=vocab, **_mats(description.around.weights))


def _mats(weights: list[Held]) -> dict[str, Mat]:
    """The matrices by field."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for held in weights:
        tensors.setdefault(held.field, {})[held.needed.part or "x"] = held.tensor
    return {path: mat(**parts) for path, parts in tensors.items()}
