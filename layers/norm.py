"""Root-mean-square norms. All compute in fp32 (fp64 stays fp64), whatever the dtype of their input."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.deprecation import renamed_arguments
from layers.dispatch.backends import run
from layers.dispatch.registry import implements
from layers.hook_point import HookPoint


def at_least_fp32(x: Tensor) -> Tensor:
    """x in the dtype of exact inner work: fp32, or fp64 where x has it."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


Rows = Float[Tensor, "*batch width"]


def l2_normalise(x: Rows, *, eps: float = 1e-6, scale: float | int = 1.0, backend: str = "auto") -> Rows:
    """scale · x / sqrt(Σx² + eps) over the last axis, in fp32 or better. eps is inside the root and not scaled by d.

    Args:
        backend: of "elementwise": "torch", "cpp" (CPU), "fla" (as "torch"); "auto" picks.
    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    return run("elementwise.l2_normalise", backend, x, x, eps=eps, scale=scale)


@implements("elementwise.l2_normalise", "fla")
@implements("elementwise.l2_normalise", "torch", definition=True)
def _l2_normalise(x: Rows, *, eps: float, scale: float | int) -> Rows:
    x = at_least_fp32(x)
    y = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
    return y if scale == 1.0 else y * scale


def unit_rms(x: Rows, eps: float) -> Rows:
    """x / sqrt(mean(x²) + eps) over the last axis, in fp32 or better."""
    x = at_least_fp32(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def scaled(normed: Rows, weight: Float[Tensor, "width"], dtype: torch.dtype, *, zero_centred: bool) -> Rows:
    """A normed tensor times the learned scale, in dtype. The order of cast and product decides the last bit in bf16."""
    if zero_centred:
        return (normed * (1.0 + at_least_fp32(weight))).to(dtype)
    return (weight * normed.to(dtype)).to(dtype)


@implements("elementwise.rms_norm", "fla")
@implements("elementwise.rms_norm", "torch", definition=True)
def rms_norm(x: Rows, weight: Tensor, *, eps: float, zero_centred: bool, hook: HookPoint | None = None) -> Rows:
    """The function of `RMSNorm`; `hook` sees the normed tensor before its scale."""
    normed = unit_rms(x, eps)
    return scaled(normed if hook is None else hook(normed), weight, x.dtype, zero_centred=zero_centred)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale.

    `zero_centred`: the scale is 1 + weight with weight starting at 0, multiplied in fp32 and then cast (every norm of
    Qwen3-Next but the gated one). Otherwise the scale is weight, starting at 1, multiplied after the cast (Qwen3).
    Both orders are the checkpoints'.
    """

    @renamed_arguments(width="dim")
    def __init__(self, dim: int, *, eps: float = 1e-6, zero_centred: bool = True):
        super().__init__()
        self.eps, self.zero_centred, self.backend = eps, zero_centred, "auto"
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centred else torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centred else 1.0)

    def forward(self, x: Rows, *, hook_normalized: HookPoint | None = None) -> Rows:
        options = {"eps": self.eps, "zero_centred": self.zero_centred, "hook": hook_normalized}
        return run("elementwise.rms_norm", self.backend, x, x, self.weight, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centred={self.zero_centred}"


GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu, "sigmoid": torch.sigmoid}


@implements("elementwise.gated_rms_norm", "torch", definition=True)
def gated_rms_norm(
    x: Rows, weight: Tensor, gate: Rows, *, eps: float, activation: str = "silu", hook: HookPoint | None = None
) -> Rows:
    """The function of `GatedRMSNorm`; `hook` sees the gate after its activation."""
    gate = GATE_ACTIVATIONS[activation](at_least_fp32(gate))
    return (weight * unit_rms(x, eps).to(x.dtype) * (gate if hook is None else hook(gate))).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """weight · rms(x) · silu(gate): the output norm of a Gated DeltaNet head, **not** zero-centred (init 1).

    Normalised in fp32, cast, times weight, then times silu(gate in fp32), then cast: the checkpoints' order.

    The "fla" backend of "elementwise" is one Triton kernel that casts once, at the end: in fp32 the same to rounding,
    in bf16 nearer to the exact result and an ulp or two away from the definition.

    Args:
        activation: "silu", the checkpoints', or "sigmoid".
    """

    @renamed_arguments(width="dim")
    def __init__(self, dim: int, *, eps: float = 1e-6, activation: str = "silu"):
        super().__init__()
        self.eps, self.backend, self.activation = eps, "auto", activation
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Rows, gate: Rows | None, *, hook_gate: HookPoint | None = None) -> Rows:
        """The norm alone where `gate` is None."""
        if gate is None:
            return rms_norm(x, self.weight, eps=self.eps, zero_centred=False)
        options = {"eps": self.eps, "activation": self.activation, "hook": hook_gate}
        return run("elementwise.gated_rms_norm", self.backend, x, x, self.weight, gate, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
