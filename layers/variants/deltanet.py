"""The Gated DeltaNet layer with parts left out or changed: its paper's ablations, and its relatives.

Without decay it is DeltaNet, without the delta Mamba-2-like, without both linear attention.
"""

import torch.nn.functional as F
from torch import Tensor

from layers.gated_deltanet import GatedDeltaNet
from layers.hook_point import HookPoint
from layers.norm import GATE_ACTIVATIONS, GatedRMSNorm, at_least_fp32
from layers.segments import Segments
from layers.variants.simple_gla import simple_gla

OUTPUT_GATES = (*GATE_ACTIVATIONS, "none")


class DeltaNetVariant(GatedDeltaNet):
    """`GatedDeltaNet` with other choices; each by itself, in any combination that makes sense.

    Args:
        output_gate: "silu", "sigmoid" or "none", on the normed answer.
        conv: False leaves the convolution out and SiLU in.
        output_norm: False gates the memory's answer as it is.
        decay: False keeps all of the memory, α = 1; `hook_log_decay` gives zeros, which a patch may change.
        delta: False writes β v instead of β (v − what is recalled); with it go the points that see what is recalled.
        negative_eigenvalues: β = 2 σ(b), so that a write may reverse what the memory holds for a key.
    Raises: ValueError for choices that contradict each other.
    Source: arXiv:2412.06464 table 5 for the ablations; arXiv:2411.12537 for negative eigenvalues.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        conv_kernel_size: int = 4,
        eps: float = 1e-6,
        output_gate: str = "silu",
        conv: bool = True,
        output_norm: bool = True,
        decay: bool = True,
        delta: bool = True,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            hidden_size,
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            conv_kernel_size=conv_kernel_size,
            eps=eps,
            backend=backend,
        )
        if output_gate not in OUTPUT_GATES:
            raise ValueError(f"There is no output gate {output_gate!r}: choose {', '.join(OUTPUT_GATES)}.")
        if negative_eigenvalues and not delta:
            raise ValueError("Without the delta nothing is erased, so there are no eigenvalues to be negative.")
        self.output_gate, self.output_norm, self.decay = output_gate, output_norm, decay
        self.conv, self.delta, self.most = conv, delta, 2.0 if negative_eigenvalues else 1.0
        if output_gate == "none":
            del self.in_proj_z, self.hook_gate_logit, self.hook_gate
        if not output_norm:
            del self.norm
        elif output_gate == "sigmoid":
            self.norm = GatedRMSNorm(value_dim, eps=eps, activation=output_gate)
        if not conv:
            del self.conv_weight
        if not decay:
            del self.in_proj_a, self.A_log, self.dt_bias
        if not delta:
            del self.hook_recalled, self.hook_written
            self.rule = simple_gla

    def reset_convolution(self) -> None:
        """Nothing, where there is none."""
        if hasattr(self, "conv_weight"):
            super().reset_convolution()

    def reset_decay(self) -> None:
        """Nothing, where there is none."""
        if hasattr(self, "A_log"):
            super().reset_decay()

    def _convolved(self, qkv: Tensor, state: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
        if self.conv:
            return super()._convolved(qkv, state, segments)
        return F.silu(qkv), qkv[:, :0] if state is None else state

    def _write_strength(self, logit: Tensor) -> Tensor:
        return self.most * super()._write_strength(logit)

    def _log_decay(self, x: Tensor) -> Tensor:
        if self.decay:
            return super()._log_decay(x)
        return at_least_fp32(x).new_zeros(*x.shape[:2], self.value_heads)

    def _normed_and_gated(self, o: Tensor, x: Tensor) -> Tensor:
        if self.output_gate == "none":
            return self.norm(o, None) if self.output_norm else o
        if self.output_norm:
            return super()._normed_and_gated(o, x)
        z = at_least_fp32(self.hook_gate_logit(self.in_proj_z(x).unflatten(-1, (self.value_heads, -1))))
        return (o * self.hook_gate(GATE_ACTIVATIONS[self.output_gate](z))).to(o.dtype)

    @property
    def inside(self) -> tuple[HookPoint, ...]:
        return super().inside if self.delta else (self.hook_state, self.hook_pattern)
