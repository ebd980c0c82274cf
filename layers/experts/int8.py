"""Experts in a quarter of fp32's memory: int8 weights, one fp32 scale per output row."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int8
from torch import Tensor, nn

from layers.kernels.experts import GATHERED, grouped_serves, one_token, sorted_by_expert
from layers.kernels.grouped_linear import grouped_linear
from layers.moe import loop
from layers.norm import at_least_fp32

# Rows of x up to which torch's int8 kernel beats a bf16 product with converted weights (docs/log.md).
PACKED_ROWS = 8


def quantise_rows(weight: Float[Tensor, "rows cols"]) -> tuple[Int8[Tensor, "rows cols"], Float32[Tensor, "rows"]]:
    """weight ≈ q · scale[:, None], symmetric: scale is a row's largest magnitude / 127; a row of zeros has scale 1.

    Raises: ValueError where a weight is infinite or not a number.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1)
    if not largest.isfinite().all():
        raise ValueError("Cannot quantise infinite or NaN weights: check the checkpoint.")
    scale = largest / 127
    scale = torch.where(scale > 0, scale, 1.0)
    q = (weight / scale[:, None]).round_().clamp_(-127, 127)  # a subnormal scale is too coarse to stay below 127
    return q.to(torch.int8), scale


def dequantise(q: Int8[Tensor, "rows cols"], scale: Float32[Tensor, "rows"]) -> Float32[Tensor, "rows cols"]:
    return q * scale[:, None]


class _Int8Linear(torch.autograd.Function):
    """x times (q · scale)ᵀ. Saves q and scale for the backward pass, where autograd would save converted weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        # torch's bf16 kernel reads past the end of columns that are not a multiple of 16 (2.13); in fp32 it is slow.
        if x.shape[0] <= PACKED_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu" and q.shape[1] % 32 == 0:
            return torch.ops.aten._weight_int8pack_mm(x.contiguous(), q, scale.bfloat16())
        dtype = _summed_in(x)
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.to(dtype), q.to(dtype))  # exact: whole numbers up to 127
        return (y * scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        dtype = _summed_in(grad)
        with torch.autocast(grad.device.type, enabled=False):
            return ((grad * scale).to(dtype) @ q.to(dtype)).to(grad.dtype), None, None


def _summed_in(x: Tensor) -> torch.dtype:
    """float16 ends at 65504, which sums of whole numbers up to 127 times x may pass before they are scaled."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def int8_linear(
    x: Float[Tensor, "n cols"], q: Int8[Tensor, "rows cols"], scale: Float32[Tensor, "rows"]
) -> Float[Tensor, "n rows"]:
    """F.linear(x, dequantise(q, scale)) without the dequantised matrix; gradients reach x alone."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Int8Linear.apply(x, q, scale)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Int8Experts(nn.Module):
    """`Experts` in int8. Made empty; `fill` quantises one matrix at a time, so that a loader can stream."""

    def __init__(self, hidden_size: int, intermediate_size: int, count: int):
        super().__init__()
        self.gate_up_proj: Tensor
        self.down_proj: Tensor
        self.gate_up_scale: Tensor
        self.down_scale: Tensor
        self.register_buffer("gate_up_proj", torch.zeros(count, 2 * intermediate_size, hidden_size, dtype=torch.int8))
        self.register_buffer("down_proj", torch.zeros(count, hidden_size, intermediate_size, dtype=torch.int8))
        self.register_buffer("gate_up_scale", torch.ones(count, 2 * intermediate_size, dtype=torch.float32))
        self.register_buffer("down_scale", torch.ones(count, hidden_size, dtype=torch.float32))
        self._squares: dict[str, dict[int, tuple[float, float]]] = {}  # by matrix and expert: of error, of weights

    def fill(self, name: str, e: int, weight: Float[Tensor, "rows cols"]) -> None:
        """Quantise expert e's "gate_proj" (inner, width), "up_proj" (inner, width) or "down_proj" (width, inner).

        Raises: ValueError for another name or shape, and for weights that are not finite.
        """
        intermediate_size = self.down_proj.shape[2]
        if name == "down_proj":
            q, scale = self.down_proj[e], self.down_scale[e]
        elif name in ("gate_proj", "up_proj"):
            half = slice(0, intermediate_size) if name == "gate_proj" else slice(intermediate_size, None)
            q, scale = self.gate_up_proj[e, half], self.gate_up_scale[e, half]
        else:
            raise ValueError(f"Experts have no {name!r}: choose 'gate_proj', 'up_proj' or 'down_proj'.")
        if weight.shape != q.shape:
            raise ValueError(f"{name} of an expert is {list(q.shape)} here, not {list(weight.shape)}.")
        weight = weight.detach().float()
        new_q, new_scale = quantise_rows(weight)
        q.copy_(new_q)
        scale.copy_(new_scale)
        wrong = dequantise(new_q, new_scale).sub_(weight)
        self._squares.setdefault(name, {})[e] = wrong.norm().item() ** 2, weight.norm().item() ** 2

    @property
    def error(self) -> dict[str, float]:
        """‖dequantised − original‖ / ‖original‖ (Frobenius) over the experts filled so far, for each kind of matrix."""
        totals = {
            name: [sum(column) for column in zip(*of.values(), strict=True)] for name, of in self._squares.items()
        }
        return {name: (wrong / whole) ** 0.5 if whole else 0.0 for name, (wrong, whole) in totals.items()}

    def forward(
        self, x: Float[Tensor, "n width"], weights: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n width"]:
        """Σ_j weights[:, j] · expert[indices[:, j]](x)."""
        if x.device.type != "cpu" and not torch.is_grad_enabled():
            if indices.numel() <= GATHERED:
                return self._gathered(x, weights, indices)
            if grouped_serves(x, self.down_proj, dtype=_summed_in(x)):
                return self._grouped(x, weights, indices)
        single = x.shape[0] == 1 and not torch.is_grad_enabled()
        return (one_token if single else loop)(x, weights, indices, self._expert)

    def _gathered(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """A few tokens with a copy of every choice's weights; no wait for the device."""
        dtype, chosen, (n, k) = _summed_in(x), indices.flatten(), indices.shape
        rows = x.repeat_interleave(k, dim=0, output_size=n * k)[..., None].to(dtype)
        gate_up = (self.gate_up_proj[chosen].to(dtype) @ rows)[..., 0] * self.gate_up_scale[chosen]
        out = self.down_proj[chosen].to(dtype) @ _swiglu(gate_up.to(x.dtype)).to(dtype)[..., None]
        out = (out[..., 0] * self.down_scale[chosen]).to(x.dtype).view(n, k, -1)
        return (at_least_fp32(out) * weights[..., None]).sum(1).to(x.dtype)

    def _grouped(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Many tokens, sorted by expert, with a converted copy of all experts for a while; no wait for the device."""
        dtype, chosen = _summed_in(x), indices.flatten()
        order, token, ends = sorted_by_expert(indices, len(self.down_proj))
        expert = chosen[order]
        gate_up = grouped_linear(x[token].to(dtype), self.gate_up_proj.to(dtype), ends) * self.gate_up_scale[expert]
        out = grouped_linear(_swiglu(gate_up.to(x.dtype)).to(dtype), self.down_proj.to(dtype), ends)
        out = at_least_fp32((out * self.down_scale[expert]).to(x.dtype)) * weights.flatten()[order, None]
        return torch.zeros_like(at_least_fp32(x)).index_add(0, token, out).to(x.dtype)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        hidden = _swiglu(int8_linear(x, self.gate_up_proj[e], self.gate_up_scale[e]))
        return int8_linear(hidden, self.down_proj[e], self.down_scale[e])

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Experts":
        """Move with the model; but `model.bfloat16()` must not round the scales, so they pass as whole numbers."""
        for name in ("gate_up_scale", "down_scale"):
            setattr(self, name, getattr(self, name).view(torch.int32))
        super()._apply(fn, recurse)
        for name in ("gate_up_scale", "down_scale"):
            setattr(self, name, getattr(self, name).view(torch.float32))
        return self

    def extra_repr(self) -> str:
        e, hidden_size, intermediate_size = self.down_proj.shape
        return f"{e} x ({hidden_size} -> {intermediate_size} -> {hidden_size}), int8"
