"""Root-mean-square norms. All compute in fp32 (fp64 stays fp64) whatever the dtype of their input."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.dispatch.backends import choose
from layers.hook_point import HookPoint
from layers.kernels.cpp import functions as native


def at_least_fp32(x: Tensor) -> Tensor:
    """x in the dtype of exact inner work: fp32, or fp64 where x has it."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def l2_normalise(
    x: Float[Tensor, "*batch d"], *, eps: float = 1e-6, scale: float | int = 1.0, backend: str = "auto"
) -> Float[Tensor, "*batch d"]:
    """scale · x / sqrt(Σx² + eps) over the last axis, in fp32 or better. eps is inside the root and not scaled by d."""
    if choose("elementwise", backend, x) == "cpp":
        weight = torch.full((x.shape[-1],), float(scale), dtype=torch.float32)
        return native.normalise(x, weight, mean=False, eps=eps, exact=True)
    x = at_least_fp32(x)
    y = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
    return y if scale == 1.0 else y * scale


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale.

    `zero_centred`: the scale is 1 + weight with weight starting at 0, multiplied in fp32 and then cast (every norm of
    Qwen3-Next but the gated one). Otherwise the scale is weight, starting at 1, multiplied after the cast (Qwen3).
    The order of cast and product is the checkpoints': it decides the last bit in bf16.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, zero_centred: bool = True):
        super().__init__()
        self.eps, self.zero_centred, self.backend = eps, zero_centred, "auto"
        self.weight = nn.Parameter(torch.zeros(width) if zero_centred else torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centred else 1.0)

    def forward(
        self, x: Float[Tensor, "*batch width"], *, hook_normalized: HookPoint | None = None
    ) -> Float[Tensor, "*batch width"]:
        if choose("elementwise", self.backend, x) == "cpp" and (self.zero_centred or self.weight.dtype == x.dtype):
            seen = hook_normalized is not None and hook_normalized.active
            weight = 1.0 * self.zero_centred + self.weight.float()
            scale, early = (torch.ones_like(weight), False) if seen else (weight, not self.zero_centred)
            normed = native.normalise(x, scale, mean=True, eps=self.eps, before=early, exact=seen)
            if not seen:
                return normed
        else:
            normed = _unit_rms(at_least_fp32(x), self.eps)
        normed = normed if hook_normalized is None else hook_normalized(normed)
        if self.zero_centred:
            return (normed * (1.0 + at_least_fp32(self.weight))).to(x.dtype)
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centred={self.zero_centred}"


GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu, "sigmoid": torch.sigmoid}


class GatedRMSNorm(nn.Module):
    """weight · rms(x) · silu(gate): the output norm of a Gated DeltaNet head, **not** zero-centred (init 1).

    Normalised in fp32, cast, times weight, then times silu(gate in fp32), then cast: the checkpoints' order.

    The "fla" backend of "elementwise" is one Triton kernel that casts at the end alone: in fp32 the same to rounding,
    in bf16 nearer to the exact result and an ulp or two away from the definition.

    Args:
        activation: "silu", the checkpoints', or "sigmoid".
    """

    def __init__(self, width: int, *, eps: float = 1e-6, activation: str = "silu"):
        super().__init__()
        self.eps, self.backend, self.activation = eps, "auto", activation
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Float[Tensor, "*batch width"],
        gate: Float[Tensor, "*batch width"] | None,
        *,
        hook_gate: HookPoint | None = None,
    ) -> Float[Tensor, "*batch width"]:
        """The norm alone where `gate` is None."""
        if gate is None:
            return (self.weight * _unit_rms(at_least_fp32(x), self.eps).to(x.dtype)).to(x.dtype)
        choice = choose("elementwise", self.backend, x)
        if choice == "fla" and self.activation == "silu" and (hook_gate is None or not hook_gate.active):
            from fla.modules.fused_norm_gate import rms_norm_gated

            return rms_norm_gated(x, gate, self.weight, None, activation="silu", eps=self.eps)
        compiled = choice == "cpp" and x.dtype == gate.dtype
        if compiled and self.activation == "silu":
            seen, same = hook_gate is not None and hook_gate.active, self.weight.dtype == x.dtype
            z = None if seen else gate.contiguous()
            # An fp32 weight beside bf16 values makes the product fp32, so that nothing is rounded after it.
            normed = native.normalise(
                x,
                self.weight.float(),
                z,
                mean=True,
                eps=self.eps,
                before=True,
                after=same,
                exact=seen and not same,
            )
            if not seen:
                return normed
            gate = native.silu_fp32(gate.contiguous())
        else:
            normed = self.weight * _unit_rms(at_least_fp32(x), self.eps).to(x.dtype)
            gate = GATE_ACTIVATIONS[self.activation](at_least_fp32(gate))
        gate = gate if hook_gate is None else hook_gate(gate)
        return (normed * gate).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
