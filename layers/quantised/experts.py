"""Routed experts whose weights stay in groups of 4 or 8 bits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layers.cpp import functions as native
from layers.cpp import ops
from layers.kernels.experts import TOKENS, one_token
from layers.kernels.grouped_linear import runs, wide
from layers.kernels.linear import spans
from layers.mlp import activate
from layers.moe import loop
from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import HoldsGroups
from layers.quantised.products import compiled, multiply

# Rows of an expert, on average, up to which its codes are multiplied as they are; beyond, they are dequantised.
FEW_ROWS = 4


def swiglu_in_groups(
    x: Tensor,
    gate_up: GroupWeight,
    down: GroupWeight,
    *,
    linear_backend: str = "auto",
    elementwise_backend: str = "auto",
) -> Tensor:
    """One expert's feed-forward of rows x."""
    gate, up = multiply(x, gate_up, backend=linear_backend).chunk(2, dim=-1)
    return multiply(activate(gate, up, backend=elementwise_backend), down, backend=linear_backend)


class QuantisedExperts(HoldsGroups):
    """`Experts` with the weights gate_up (e, 2·inner, width) and down (e, width, inner) in groups.

    Attributes:
        backend: of "experts": "loop" is the definition; "auto" the fastest, and so is any other.
        linear_backend, elementwise_backend: of their products and activations.
    """

    def __init__(self, gate_up: GroupWeight, down: GroupWeight):
        super().__init__()
        self.backend = self.linear_backend = self.elementwise_backend = "auto"
        self.hold("gate_up_proj", gate_up)
        self.hold("down_proj", down)

    @property
    def gate_up(self) -> GroupWeight:
        return self.held("gate_up_proj")

    @property
    def down(self) -> GroupWeight:
        return self.held("down_proj")

    def forward(
        self, x: Float[Tensor, "n width"], weights: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n width"]:
        """Σ_j weights[:, j] · expert[indices[:, j]](x)."""
        if torch.is_grad_enabled() or self.backend == "loop":
            return loop(x, weights, indices, self._expert)
        if len(x) == 1:
            return one_token(x, weights, indices, self._expert)
        named = {self.linear_backend, self.elementwise_backend} != {"auto"}
        if named or not compiled(x, x.dtype) or torch.compiler.is_compiling():
            return loop(x, weights, indices, self._expert)
        y = [self._sorted(x[a:b], weights[a:b], indices[a:b]) for a, b in spans(len(x), TOKENS)]
        return y[0] if len(y) == 1 else torch.cat(y)

    def _sorted(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Many tokens, sorted by expert, in compiled code."""
        token, inverse, ends = ops.permute(indices.contiguous(), len(self.down.codes))
        if len(token) > FEW_ROWS * int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum()):
            out = ops.feed_forward_in_groups(x, token, ends, *self.gate_up.tensors, *self.down.tensors)
        else:
            out = x.new_empty(len(token), x.shape[1])
            for e, run in runs(ends):
                more, here = wide(run, len(out))
                out[run] = self._expert(e, x.index_select(0, token[more]))[here]
        return native.combine(out, weights.float().contiguous(), inverse, exact=x.dtype == torch.float32)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        gate_up, down = (weight.at(e) for weight in (self.gate_up, self.down))
        backends = {"linear_backend": self.linear_backend, "elementwise_backend": self.elementwise_backend}
        return swiglu_in_groups(x, gate_up, down, **backends)

    def extra_repr(self) -> str:
        (e, hidden_size, intermediate_size), bits = self.down.shape, self.gate_up.bits
        return f"{e} x ({hidden_size} -> {intermediate_size} -> {hidden_size}), {bits} bits"
