"""The Gated DeltaNet layer: three of every four token mixers of Qwen3-Next."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.causal_conv import causal_conv
from layers.delta_rule import Rule, gated_delta_rule
from layers.deprecation import renamed_arguments, renamed_attribute
from layers.dispatch.registry import function_of
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.norm import GatedRMSNorm, at_least_fp32, l2_normalise
from layers.segments import Segments
from layers.state.deltanet_state import DeltaNetState

__all__ = ["DeltaNetState", "GatedDeltaNet"]


class GatedDeltaNet(nn.Module):
    """Project to q, k, v, z, b, a; convolve q, k, v; run the gated delta rule; norm, gate with silu(z), project.

    β = σ(b) is the write strength and exp(−exp(A_log) softplus(a + dt_bias)) the share of the state kept, a head.
    Source: arXiv:2412.06464; tensor order of the flat Qwen3.5 layout: q | k | v, each by heads.

    Attributes:
        rule: what mixes tokens along time.
        materialized_positions: absolute positions after which the recurrent state passes `hook_state`.
        materialized_pattern: whether the rule runs as a matrix, which passes `hook_pattern`.
    """

    rule: Rule = staticmethod(gated_delta_rule)

    @renamed_arguments(width="hidden_size", conv_taps="conv_kernel_size")
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
        backend: str = "auto",
    ):
        super().__init__()
        if value_heads % key_heads:
            raise ValueError(f"{value_heads} value heads cannot share {key_heads} key heads: make it a multiple.")
        self.key_heads, self.value_heads, self.key_dim, self.value_dim = key_heads, value_heads, key_dim, value_dim
        self.eps, self.backend, self.elementwise_backend = eps, backend, "auto"
        self.split = (key_heads * key_dim, key_heads * key_dim, value_heads * value_dim)
        channels = sum(self.split)
        self.in_proj_qkv = Linear(hidden_size, channels, bias=False)
        self.in_proj_z = Linear(hidden_size, value_heads * value_dim, bias=False)
        self.in_proj_b = Linear(hidden_size, value_heads, bias=False)
        self.in_proj_a = Linear(hidden_size, value_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_kernel_size))
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.norm = GatedRMSNorm(value_dim, eps=eps)
        self.out_proj = Linear(value_heads * value_dim, hidden_size, bias=False)
        self.materialized_positions: tuple[int, ...] = ()
        self.materialized_pattern = False
        self._make_points()
        self.reset_parameters()

    def _make_points(self) -> None:
        keys, values, gates = "b t kh k", "b t h v", "b t h"
        self.hook_qkv = HookPoint("b t channels")  # before the convolution
        self.hook_q_pre, self.hook_k_pre, self.hook_v_pre = HookPoint(keys), HookPoint(keys), HookPoint(values)
        self.hook_q_conv, self.hook_k_conv = HookPoint(keys), HookPoint(keys)  # after it
        self.hook_q, self.hook_k = HookPoint(keys, dtype="fp32"), HookPoint(keys, dtype="fp32")  # normalised
        self.hook_v = HookPoint(values)  # after the convolution
        self.hook_beta_logit, self.hook_beta = HookPoint(gates), HookPoint(gates, dtype="fp32")
        self.hook_log_decay = HookPoint(gates, dtype="fp32")
        looped = 'model.set_backend("delta_rule", "recurrent")'  # and in decoding on CPU, which is that loop
        self.hook_recalled = HookPoint("b 1 h v", dtype="fp32", route=looped)  # once a token
        self.hook_written = HookPoint("b 1 h v", dtype="fp32", route=looped)
        self.hook_state = HookPoint("b h k v", dtype="fp32", route="model.materialize(state={LAYER: [position]})")
        self.hook_pattern = HookPoint("b h t s", dtype="fp32", route="model.materialize(pattern=[LAYER])")
        self.hook_o = HookPoint(values)  # what the rule returns
        self.hook_gate_logit, self.hook_gate = HookPoint(values), HookPoint(values, dtype="fp32")  # z, silu(z)
        self.hook_gated = HookPoint(values)  # the input of out_proj

    def reset_parameters(self) -> None:
        """Decay rates A ~ U(0.01, 16), dt_bias 1, filters as torch's conv1d; the linear maps are the caller's."""
        self.reset_convolution()
        self.reset_decay()

    def reset_convolution(self) -> None:
        """Initialise the filters."""
        nn.init.kaiming_uniform_(self.conv_weight.unsqueeze(1), a=5**0.5)

    def reset_decay(self) -> None:
        """Initialise A_log and dt_bias."""
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
        x = x if segments is None else segments.real(x)
        inputs = self._by_head(self.hook_qkv(self.in_proj_qkv(x)))
        qkv, conv = self._convolved(inputs, None if state is None else state.conv, segments)
        q, k, v = qkv.split(self.split, dim=-1)
        # Normalised in fp32; 1/√k on the query keeps q·k of order 1/√k, as in softmax attention.
        q = self.hook_q_conv(q.unflatten(-1, (self.key_heads, -1)))
        k = self.hook_k_conv(k.unflatten(-1, (self.key_heads, -1)))
        q = self.hook_q(l2_normalise(q, scale=self.key_dim**-0.5, backend=self.elementwise_backend))
        k = self.hook_k(l2_normalise(k, backend=self.elementwise_backend))
        v = self.hook_v(v.unflatten(-1, (self.value_heads, -1)))
        beta = self.hook_beta(self._write_strength(self.hook_beta_logit(self.in_proj_b(x))))
        log_decay = self.hook_log_decay(self._log_decay(x))
        rule, hooked = self._rule()
        parts = (q, k, v, log_decay, beta)
        if state is None:
            o, _ = rule(*parts, state=None, segments=segments)
        else:
            corrects = self.rule is gated_delta_rule
            o, recurrent = state.extend(rule, inputs, *parts, segments=segments, hooked=hooked, corrects=corrects)
            state.replace(conv, recurrent)
        return self.out_proj(self.hook_gated(self._normed_and_gated(self.hook_o(o), x)).flatten(-2))

    def _rule(self) -> tuple[Rule, bool]:
        """The rule, or while a hook waits inside it, one that passes the points there; and whether a hook does."""
        hooked = any([point.active for point in self.inside])
        rule = partial(function_of("delta_rule_with_hooks", "torch"), self) if hooked else self.rule
        return partial(rule, backend=self.backend), hooked

    # Each of these is one choice of the architecture; layers/variants/deltanet.py makes others.

    def _convolved(self, qkv: Tensor, state: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """q, k and v after the convolution and SiLU, and the inputs to carry."""
        return causal_conv(qkv, self.conv_weight, state=state, segments=segments, backend=self.conv_backend)

    def _write_strength(self, logit: Tensor) -> Tensor:
        return at_least_fp32(logit).sigmoid()

    def _log_decay(self, x: Tensor) -> Tensor:
        # A_log in fp32: in fp16 its exponential can be infinite.
        rate = at_least_fp32(self.A_log).exp()
        return -rate * nn.functional.softplus(at_least_fp32(self.in_proj_a(x)) + at_least_fp32(self.dt_bias))

    def _normed_and_gated(self, o: Tensor, x: Tensor) -> Tensor:
        z = self.hook_gate_logit(self.in_proj_z(x).unflatten(-1, (self.value_heads, -1)))
        return self.norm(o, z, hook_gate=self.hook_gate)

    def _by_head(self, qkv: Tensor) -> Tensor:
        """qkv, after hooks have seen q, k and v a head at a time."""
        points = (self.hook_q_pre, self.hook_k_pre, self.hook_v_pre)
        if not any([point.active for point in points]):
            return qkv
        heads = (self.key_heads, self.key_heads, self.value_heads)
        heads_of = zip(points, qkv.split(self.split, dim=-1), heads, strict=True)
        return torch.cat([point(x.unflatten(-1, (n, -1))).flatten(-2) for point, x, n in heads_of], dim=-1)

    hook_erased = renamed_attribute("hook_erased", "hook_recalled")

    @property
    def inside(self) -> tuple[HookPoint, ...]:
        """Points inside the rule."""
        return self.hook_state, self.hook_pattern, self.hook_recalled, self.hook_written

    @property
    def conv_backend(self) -> str:
        """The convolution follows the delta rule: fused with fused, torch with torch."""
        return self.backend if self.backend in ("auto", "cpp", "fla") else "torch"
