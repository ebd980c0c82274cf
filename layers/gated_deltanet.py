"""The Gated DeltaNet layer: three of every four token mixers of Qwen3-Next."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.causal_conv import causal_conv
from layers.delta_rule import gated_delta_rule
from layers.hook_point import HookPoint
from layers.norm import GatedRMSNorm, at_least_fp32, l2_normalise
from layers.segments import Segments


@dataclass
class DeltaNetState:
    """What the layer carries from one call to the next; its size does not depend on the context's length.

    Attributes:
        conv: (b, taps − 1, channels) last inputs of the convolution, in the model's dtype.
        memory: (b, h, k, v) the recurrent state, fp32 unless a cache was made with less.
    """

    conv: Tensor
    memory: Tensor


class GatedDeltaNet(nn.Module):
    """Project to q, k, v, z, b, a; convolve q, k, v; run the gated delta rule; norm, gate with silu(z), project.

    β = σ(b) is the write strength and exp(−exp(A_log) softplus(a + dt_bias)) the share of memory kept, a head.
    Source: arXiv:2412.06464; tensor order of the flat Qwen3.5 layout: q | k | v, each by heads.
    """

    def __init__(
        self,
        width: int,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        conv_taps: int = 4,
        eps: float = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        if value_heads % key_heads:
            raise ValueError(f"{value_heads} value heads cannot share {key_heads} key heads: make it a multiple.")
        self.key_heads, self.value_heads, self.key_dim, self.value_dim = (
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        )
        self.eps, self.backend = eps, backend
        self.split = (key_heads * key_dim, key_heads * key_dim, value_heads * value_dim)
        channels = sum(self.split)
        self.in_proj_qkv = nn.Linear(width, channels, bias=False)
        self.in_proj_z = nn.Linear(width, value_heads * value_dim, bias=False)
        self.in_proj_b = nn.Linear(width, value_heads, bias=False)
        self.in_proj_a = nn.Linear(width, value_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_taps))
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.norm = GatedRMSNorm(value_dim, eps=eps)
        self.out_proj = nn.Linear(value_heads * value_dim, width, bias=False)

        self.hook_qkv = HookPoint()  # before the convolution, (b t channels)
        self.hook_q, self.hook_k, self.hook_v = (
            HookPoint(),
            HookPoint(),
            HookPoint(),
        )  # q, k after normalisation
        self.hook_beta_logit, self.hook_beta, self.hook_log_decay = HookPoint(), HookPoint(), HookPoint()
        self.hook_o = HookPoint()  # what the memory answers, (b t h v)
        self.hook_gate_logit = HookPoint()  # z, (b t h v)
        self.hook_gated = HookPoint()  # the input of out_proj, (b t h v)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decay rates A ~ U(0.01, 16), dt_bias 1, filters as torch's conv1d; the linear maps are the caller's."""
        nn.init.kaiming_uniform_(self.conv_weight.unsqueeze(1), a=5**0.5)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()
        nn.init.ones_(self.dt_bias)

    def forward(
        self,
        x: Float[Tensor, "b t width"],
        *,
        segments: Segments | None = None,
        state: DeltaNetState | None = None,
    ) -> Float[Tensor, "b t width"]:
        """Mix tokens. `state`, where given, is read as what came before and replaced by what comes after."""
        qkv = self.hook_qkv(self.in_proj_qkv(x))
        qkv, conv = causal_conv(
            qkv,
            self.conv_weight,
            state=None if state is None else state.conv,
            segments=segments,
            backend=self.conv_backend,
        )
        q, k, v = qkv.split(self.split, dim=-1)
        # Normalised in fp32; 1/√k on the query keeps q·k of order 1/√k, as in softmax attention.
        q = l2_normalise(at_least_fp32(q.unflatten(-1, (self.key_heads, -1)))) * self.key_dim**-0.5
        k = l2_normalise(at_least_fp32(k.unflatten(-1, (self.key_heads, -1))))
        v = self.hook_v(v.unflatten(-1, (self.value_heads, -1)))
        beta = self.hook_beta(at_least_fp32(self.hook_beta_logit(self.in_proj_b(x))).sigmoid())
        # A_log in fp32: in fp16 its exponential can be infinite.
        rate = at_least_fp32(self.A_log).exp()
        time_step = nn.functional.softplus(at_least_fp32(self.in_proj_a(x)) + at_least_fp32(self.dt_bias))
        log_decay = self.hook_log_decay(-rate * time_step)
        o, memory = gated_delta_rule(
            self.hook_q(q),
            self.hook_k(k),
            v,
            log_decay,
            beta,
            state=None if state is None else state.memory,
            segments=segments,
            backend=self.backend,
        )
        if state is not None:
            state.conv, state.memory = conv.detach(), memory.detach().to(state.memory.dtype)
        z = self.hook_gate_logit(self.in_proj_z(x).unflatten(-1, (self.value_heads, -1)))
        y = self.hook_gated(self.norm(self.hook_o(o), z))
        return self.out_proj(y.flatten(-2))

    @property
    def conv_backend(self) -> str:
        """The convolution follows the delta rule: fused with fused, torch with torch."""
        return "torch" if self.backend in ("chunked", "recurrent") else self.backend
