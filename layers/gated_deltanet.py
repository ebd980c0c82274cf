"""The Gated DeltaNet layer: three of every four token mixers of Qwen3-Next."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.causal_conv import causal_conv
from layers.delta_rule import Rule, gated_delta_rule
from layers.hook_point import HookPoint
from layers.interp.materialized_states import Exposed, exposed_delta_rule
from layers.linear import Linear
from layers.norm import GatedRMSNorm, at_least_fp32, l2_normalise
from layers.segments import Segments
from layers.state.update_log import Tape


@dataclass
class DeltaNetState:
    """What the layer carries from one call to the next; its size does not depend on the context's length.

    Attributes:
        conv: (b, taps − 1, channels) last inputs of the convolution, in the model's dtype.
        memory: (b, h, k, v) the recurrent state, fp32 unless a cache was made with less.
        tape: where the next call notes what it writes; None where nobody asks, or where that would not say all.
        cut: columns of that call before the first that is noted; the tape is then begun anew there.
    """

    conv: Tensor
    memory: Tensor
    tape: Tape | None = None
    cut: int = 0


class GatedDeltaNet(nn.Module):
    """Project to q, k, v, z, b, a; convolve q, k, v; run the gated delta rule; norm, gate with silu(z), project.

    β = σ(b) is the write strength and exp(−exp(A_log) softplus(a + dt_bias)) the share of memory kept, a head.
    Source: arXiv:2412.06464; tensor order of the flat Qwen3.5 layout: q | k | v, each by heads.
    """

    rule: Rule = staticmethod(gated_delta_rule)

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
        self.eps, self.backend, self.elementwise_backend = eps, backend, "auto"
        self.split = (key_heads * key_dim, key_heads * key_dim, value_heads * value_dim)
        channels = sum(self.split)
        self.in_proj_qkv = Linear(width, channels, bias=False)
        self.in_proj_z = Linear(width, value_heads * value_dim, bias=False)
        self.in_proj_b = Linear(width, value_heads, bias=False)
        self.in_proj_a = Linear(width, value_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_taps))
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.norm = GatedRMSNorm(value_dim, eps=eps)
        self.out_proj = Linear(value_heads * value_dim, width, bias=False)

        # What `model.expose` chose: absolute positions after which the memory is shown, and whether A is made.
        self.exposed_positions: tuple[int, ...] = ()
        self.exposed_pattern = False
        keys, values, gates = "b t kh k", "b t h v", "b t h"
        self.hook_qkv = HookPoint("b t channels")  # before the convolution
        self.hook_q_pre, self.hook_k_pre, self.hook_v_pre = HookPoint(keys), HookPoint(keys), HookPoint(values)
        self.hook_q_conv, self.hook_k_conv = HookPoint(keys), HookPoint(keys)  # after it
        self.hook_q, self.hook_k = HookPoint(keys, dtype="fp32"), HookPoint(keys, dtype="fp32")  # normalised
        self.hook_v = HookPoint(values)  # after the convolution
        self.hook_beta_logit, self.hook_beta = HookPoint(gates), HookPoint(gates, dtype="fp32")
        self.hook_log_decay = HookPoint(gates, dtype="fp32")
        looped = 'model.set_backend("delta_rule", "recurrent")'  # and in decoding on CPU, which is that loop
        self.hook_erased = HookPoint("b 1 h v", dtype="fp32", route=looped)  # once a token
        self.hook_written = HookPoint("b 1 h v", dtype="fp32", route=looped)
        self.hook_state = HookPoint("b h k v", dtype="fp32", route="model.expose(state={LAYER: [position]})")
        self.hook_pattern = HookPoint("b h t s", dtype="fp32", route="model.expose(pattern=[LAYER])")
        self.hook_o = HookPoint(values)  # what the memory answers
        self.hook_gate_logit, self.hook_gate = HookPoint(values), HookPoint(values, dtype="fp32")  # z, silu(z)
        self.hook_gated = HookPoint(values)  # the input of out_proj
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decay rates A ~ U(0.01, 16), dt_bias 1, filters as torch's conv1d; the linear maps are the caller's."""
        self.reset_convolution()
        self.reset_decay()

    def reset_convolution(self) -> None:
        """Of `reset_parameters` the filters."""
        nn.init.kaiming_uniform_(self.conv_weight.unsqueeze(1), a=5**0.5)

    def reset_decay(self) -> None:
        """Of `reset_parameters` what concerns the decay."""
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
        qkv = self.hook_qkv(self.in_proj_qkv(x))
        if self.hook_q_pre.active or self.hook_k_pre.active or self.hook_v_pre.active:
            qkv = self._before_convolution(qkv)
        inputs = qkv
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
        if state is not None and state.tape is not None:
            o, memory = self._noted(inputs, q, k, v, log_decay, beta, state)
        else:
            before = None if state is None else state.memory
            o, memory = self._remember(q, k, v, log_decay, beta, before, segments)
        if state is not None:
            state.conv, state.memory = conv.detach(), memory.detach().to(state.memory.dtype)
        return self.out_proj(self.hook_gated(self._normed_and_gated(self.hook_o(o), x)).flatten(-2))

    # Each of these four is one choice of the architecture; layers/variants/deltanet.py makes others.

    def _convolved(self, qkv: Tensor, state: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """q, k and v after the convolution and SiLU, and the inputs to carry."""
        if state is None or segments is None or not segments.packed:
            return causal_conv(qkv, self.conv_weight, state=state, segments=segments, backend=self.conv_backend)
        y, after = torch.zeros_like(qkv), state.clone()
        for n, row, begin, end, _ in segments.runs:  # each sequence goes on from a state of its own
            y[row, begin:end], after[n] = (
                x[0]
                for x in causal_conv(
                    qkv[row : row + 1, begin:end], self.conv_weight, state=state[n : n + 1], backend=self.conv_backend
                )
            )
        return y, after

    def _write_strength(self, logit: Tensor) -> Tensor:
        return at_least_fp32(logit).sigmoid()

    def _log_decay(self, x: Tensor) -> Tensor:
        # A_log in fp32: in fp16 its exponential can be infinite.
        rate = at_least_fp32(self.A_log).exp()
        return -rate * nn.functional.softplus(at_least_fp32(self.in_proj_a(x)) + at_least_fp32(self.dt_bias))

    def _normed_and_gated(self, o: Tensor, x: Tensor) -> Tensor:
        z = self.hook_gate_logit(self.in_proj_z(x).unflatten(-1, (self.value_heads, -1)))
        return self.norm(o, z, hook_gate=self.hook_gate)

    def _before_convolution(self, qkv: Tensor) -> Tensor:
        """q, k and v a head at a time, for who looks at them there."""
        heads = (self.key_heads, self.key_heads, self.value_heads)
        points = (self.hook_q_pre, self.hook_k_pre, self.hook_v_pre)
        parts = zip(points, qkv.split(self.split, dim=-1), heads, strict=True)
        return torch.cat([point(x.unflatten(-1, (n, -1))).flatten(-2) for point, x, n in parts], dim=-1)

    def _remember(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        memory: Tensor | None,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor]:
        """The delta rule; laid open only where somebody looks inside."""
        if memory is not None and segments is not None and segments.packed:
            for point in self._inside:
                point.refuse()
            o, after = torch.zeros_like(v), memory.clone()
            for n, row, begin, end, _ in segments.runs:
                parts = (x[row : row + 1, begin:end] for x in (q, k, v, log_decay, beta))
                o[row, begin:end], after[n] = (
                    x[0] for x in self.rule(*parts, state=memory[n : n + 1], backend=self.backend)
                )
            return o, after
        if not any([point.active for point in self._inside]):
            return self.rule(q, k, v, log_decay, beta, state=memory, segments=segments, backend=self.backend)
        return exposed_delta_rule(
            q, k, v, log_decay, beta,
            exposed=self._exposed, state=memory, segments=segments, backend=self.backend, rule=self.rule,
        )  # fmt: skip

    @property
    def _inside(self) -> tuple[HookPoint, ...]:
        """Points inside the rule."""
        return self.hook_state, self.hook_pattern, self.hook_erased, self.hook_written

    @property
    def _exposed(self) -> Exposed:
        points = self.hook_state, self.hook_pattern, self.hook_erased, self.hook_written
        return Exposed(self.exposed_positions, self.exposed_pattern, *points)

    def _noted(
        self, inputs: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: DeltaNetState
    ) -> tuple[Tensor, Tensor]:
        """`_remember` for rows without padding, with the last tokens noted on the state's tape."""
        cut, before = state.cut, state.memory
        if any([point.active for point in self._inside]):
            state.tape = None  # who patches these makes states that do not follow from what is noted
            return self._remember(q, k, v, log_decay, beta, before, None)
        assert state.tape is not None
        outputs = []
        if cut:
            o, before = self._remember(
                q[:, :cut], k[:, :cut], v[:, :cut], log_decay[:, :cut], beta[:, :cut], before, None
            )
            taps = state.conv.shape[1]
            conv = torch.cat((state.conv.to(inputs.dtype), inputs[:, max(cut - taps, 0) : cut]), dim=1)[:, -taps:]
            state.tape = Tape(conv.detach().clone(), before.detach(), state.memory.dtype)
            outputs.append(o)
        inputs, q, k, v, log_decay, beta = (x[:, cut:] for x in (inputs, q, k, v, log_decay, beta))
        o, memory = self._remember(q, k, v, log_decay, beta, before, None)
        inputs, k, v, log_decay, beta = (x.detach() for x in (inputs, k, v, log_decay, beta))
        state.tape.add(inputs, k, v, log_decay, beta, before.detach(), corrects=self.rule is gated_delta_rule)
        return torch.cat([*outputs, o], dim=1), memory

    @property
    def conv_backend(self) -> str:
        """The convolution follows the delta rule: fused with fused, torch with torch."""
        return "torch" if self.backend in ("piecewise", "chunked", "recurrent") else self.backend
