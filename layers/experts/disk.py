"""Routed experts that stay where they are stored: only those that tokens route to are read."""

from collections import Counter
from contextlib import closing
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.experts.cache import ExpertCache, Matrix, Read, SlotKind
from layers.kernels.experts import one_token
from layers.moe import loop, swiglu
from layers.quantised.experts import swiglu_in_groups
from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import GroupLayout


class OffloadedExperts(nn.Module):
    """`Experts` without parameters: the same values, from weights that `read` brings into a cache when they are needed.

    Args:
        read: read(e, gate_up, down) fills two CPU tensors, (2·inner, width) with gate rows above up rows and (width,
            inner), and returns the bytes it read from disk. Called from several threads at a time, each e once a call.
        cache: one for all layers of a model.
        dtype: of the weights as they are kept, which is that of x.
        layouts: how gate_up and down are kept in groups, in place of `dtype`.

    Values equal `Experts` on "loop" to the bit; for one token without gradients "auto", which has its own order.
    Where x wants a gradient, the experts it uses are copied, and the copies live until the backward pass.
    Where x is on another device, experts are copied there each time they are used; the slots are pageable memory, of
    which such a copy has let go when it returns, so that they can be refilled.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        count: int,
        *,
        read: Read,
        cache: ExpertCache,
        dtype: torch.dtype,
        layouts: tuple[GroupLayout, GroupLayout] | None = None,
    ):
        super().__init__()
        self.hidden_size, self.intermediate_size, self.count, self.dtype = hidden_size, intermediate_size, count, dtype
        self.linear_backend = self.elementwise_backend = "auto"
        self.read, self.cache = read, cache
        self.layer = cache.join(SlotKind(hidden_size, intermediate_size, layouts or dtype))

    def forward(
        self, x: Float[Tensor, "n width"], weights: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n width"]:
        """Σ_j weights[:, j] · expert[indices[:, j]](x).

        Raises: what `read` raises; the cache then holds no expert half-read.
        """
        chosen = indices.flatten().tolist()
        single = x.shape[0] == 1 and not torch.is_grad_enabled() and len(set(chosen)) == len(chosen)
        used = Counter(chosen if single else sorted(chosen))
        with closing(self.cache.visit(self.layer, used, self.read, tokens=x.shape[0])) as matrices:

            def expert(_e: int, rows: Tensor) -> Tensor:  # both sums ask in the order of `used`
                gate_up, down = (self._handed_out(m, rows) for m in next(matrices))
                chosen = {"linear_backend": self.linear_backend, "elementwise_backend": self.elementwise_backend}
                if isinstance(gate_up, GroupWeight):
                    return swiglu_in_groups(rows, gate_up, down, **chosen)
                return swiglu(rows, gate_up, down, **chosen)

            return (one_token if single else loop)(x, weights, indices, expert)

    @staticmethod
    def _handed_out(matrix: Matrix, x: Tensor) -> Any:
        """The matrix where x is; a copy where the backward pass would find the slot refilled."""
        if isinstance(matrix, GroupWeight):
            return matrix.each(lambda part: OffloadedExperts._handed_out(part, x))
        if x.device != matrix.device:
            return matrix.to(x.device, non_blocking=True)
        return matrix.clone() if x.requires_grad and torch.is_grad_enabled() else matrix

    def extra_repr(self) -> str:
        sizes = f"{self.hidden_size} -> {self.intermediate_size} -> {self.hidden_size}"
        return f"{self.count} x ({sizes}), layer {self.layer} of the cache"
