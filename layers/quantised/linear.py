"""A linear map whose weight stays in groups of 4 or 8 bits."""

from jaxtyping import Float
from torch import Tensor, nn

from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import HoldsGroups
from layers.quantised.products import multiply


class QuantisedLinear(HoldsGroups):
    """x times the transpose of the dequantised weight, plus the bias.

    Attributes:
        backend: of `linear`: "torch" is the definition, "auto" the fastest.
    """

    def __init__(self, weight: GroupWeight, bias: Tensor | None = None):
        super().__init__()
        self.backend = "auto"
        self.hold("weight", weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)

    @property
    def in_groups(self) -> GroupWeight:
        return self.held("weight")

    @property
    def out_features(self) -> int:
        return self.in_groups.shape[0]

    @property
    def in_features(self) -> int:
        return self.in_groups.shape[1]

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return multiply(input, self.in_groups, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        w = self.in_groups
        return f"{w.shape[1]} -> {w.shape[0]}, {w.bits} bits, groups of {w.group_size}, bias={self.bias is not None}"
