"""Softmax attention with every choice of the gated-attention study: one forward for all of them.

Where the gate stands: G1 on attention's answer, G2 on the value, G3 on the key, G4 on the query (after their norms and
before RoPE, since a norm would take a gate a head away again), G5 on the layer's output.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layers.gated_attention import GATE_ROWS, AttentionState, GatedAttention, Heads, KVHeads
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.norm import RMSNorm
from layers.rope import Rotation
from layers.segments import Segments

POSITIONS = ("G1", "G2", "G3", "G4", "G5")
GRANULARITIES = (*GATE_ROWS, "head_shared")
FORMS = ("multiplicative", "additive")
INPUTS = ("hidden", "constant")
SWITCHES = ("none", "v", "kv")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * x.sigmoid(),  # the study's non-sparse one: from 1/2 to 1
}
OUTPUT_ACTIVATIONS = ("none", "silu")


class AttentionVariant(GatedAttention):
    """`GatedAttention` with the gate, the values and the answer of the study's other rows.

    Args:
        gate: beside `GatedAttention`'s, "head_shared": the scores of all heads, averaged, serve each of them.
        position: "G1" to "G5".
        form: "multiplicative", y · a(s), or "additive", y + a(s), for a score s.
        activation: a, out of `ACTIVATIONS`.
        source: what makes the score: "hidden", W x of the layer's normed input, or "constant", learned and at first 0.
        output_norm: RMSNorm of each head's answer, one scale for all heads.
        output_activation: "none" or "silu", of the answer (after that norm, before the gate).
        switch: "v" or "kv": each head's value, or key and value, is a mixture of `switch_experts` projections, of which
            a token's `switch_top_k` best count, each weighed by its own sigmoid.
    Raises: ValueError for a choice that does not exist, or a G5 gate by heads, of which there are none there.
    Source: arXiv:2505.06708 section 2.2 and appendix A.1; mixtures after arXiv:2312.07987.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float = 1e-6,
        gate: str = "elementwise",
        position: str = "G1",
        form: str = "multiplicative",
        activation: str = "sigmoid",
        source: str = "hidden",
        output_norm: bool = False,
        output_activation: str = "none",
        switch: str = "none",
        switch_experts: int = 1,
        switch_top_k: int = 1,
        qk_norm: bool = True,
        zero_centred: bool = True,
        bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=eps,
            gate="none",
            qk_norm=qk_norm,
            zero_centred=zero_centred,
            bias=bias,
            backend=backend,
        )
        for name, value, known in (
            ("gate", gate, GRANULARITIES),
            ("position", position, POSITIONS),
            ("form", form, FORMS),
            ("activation", activation, ACTIVATIONS),
            ("source", source, INPUTS),
            ("output activation", output_activation, OUTPUT_ACTIVATIONS),
            ("switch", switch, SWITCHES),
        ):
            _check(name, value, known)
        if position == "G5" and gate in ("headwise", "head_shared"):
            raise ValueError(f"Behind the output projection there are no heads, so a G5 gate cannot be {gate}.")
        self.granularity, self.position, self.additive = gate, position, form == "additive"
        self.activation, self.switch, self.switch_top_k = ACTIVATIONS[activation], switch, switch_top_k
        self.output_silu = output_activation == "silu"
        self.o_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred) if output_norm else None

        self.gate_constant: nn.Parameter | None = None
        if gate != "none":
            groups, d = {"G1": (heads, head_dim), "G4": (heads, head_dim), "G5": (1, hidden_size)}.get(
                position, (kv_heads, head_dim)
            )
            rows = 1 if gate == "headwise" else d
            if source == "hidden":
                self.gate_proj = Linear(hidden_size, groups * rows, bias=bias)
            else:
                self.gate_constant = nn.Parameter(torch.zeros(groups, rows))
            self.gate_groups = groups
            group = {"G1": "h", "G4": "h", "G5": "1"}.get(position, "kh")
            row = "1" if gate == "headwise" else "width" if position == "G5" else "d"
            self.hook_gate_logit = HookPoint(f"b t {group} {row}")
            self.hook_gate = HookPoint(f"b t {'1' if gate == 'head_shared' else group} {row}")
            if position == "G2":
                self.hook_v_pre = HookPoint("b t kh d")  # before the gate; hook_v is what attention reads
        if switch != "none":
            if not 1 <= switch_top_k <= switch_experts:
                raise ValueError(f"Cannot mix {switch_top_k} of {switch_experts} projections: choose 1 to all of them.")
            mixed = kv_heads * switch_experts * head_dim
            self.v_proj = Linear(hidden_size, mixed, bias=bias)
            if switch == "kv":
                self.k_proj = Linear(hidden_size, mixed, bias=bias)
            self.switch_proj = Linear(hidden_size, kv_heads * switch_experts, bias=bias)
            self.hook_switch = HookPoint("b t kh switch")  # weights of the mixture, 0 for what is not chosen

    def reset_parameters(self) -> None:
        """A constant gate resets at score 0; the linear maps are the caller's."""
        if self.gate_constant is not None:
            nn.init.zeros_(self.gate_constant)

    def forward(
        self,
        x: Float[Tensor, "b t width"],
        rope: Rotation,
        *,
        segments: Segments | None = None,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "b t width"]:
        """As `GatedAttention`'s; each `_gated` does something at one of its places only."""
        x = x if segments is None else segments.real(x)
        q = self.hook_q(self.q_norm(self.hook_q_pre(self.q_proj(x).unflatten(-1, (self.heads, -1)))))
        q = self.hook_rot_q(rope(self._gated("G4", q, x)))
        k, v = self.keys_and_values(x, rope)
        y = self.hook_o(self.attend(q, k, v, Segments.full(x) if segments is None else segments, state))
        y = y if self.o_norm is None else self.o_norm(y)
        y = self._gated("G1", F.silu(y) if self.output_silu else y, x)
        y = self.o_proj(self.hook_gated(y).flatten(-2))
        return self._gated("G5", y.unsqueeze(-2), x).squeeze(-2)

    def _gated(self, position: str, y: Float[Tensor, "b t g d"], x: Tensor) -> Float[Tensor, "b t g d"]:
        """y under the gate, if this is where it stands."""
        if position != self.position or self.granularity == "none":
            return y
        if self.gate_proj is not None:
            score = self.gate_proj(x).unflatten(-1, (self.gate_groups, -1))
        else:
            assert self.gate_constant is not None
            score = self.gate_constant.to(x.dtype).expand(*x.shape[:2], -1, -1)
        gate = self.activation(self.hook_gate_logit(score))
        if self.granularity == "head_shared":  # of scores after the activation: before it, one projection would do
            gate = gate.mean(-2, keepdim=True)
        gate = self.hook_gate(gate)
        y = self.hook_v_pre(y) if position == "G2" else y
        return y + gate if self.additive else y * gate

    def keys_and_values(self, x: Float[Tensor, "b t width"], rope: Rotation) -> tuple[KVHeads, KVHeads]:
        """What later tokens will look at, gated where a G2 or G3 gate stands."""
        k, v = self._mixed(x)
        k = self._gated("G3", self.hook_k(self.k_norm(self.hook_k_pre(k))), x)
        return self.hook_rot_k(rope(k)), self.hook_v(self._gated("G2", v, x))

    def _mixed(self, x: Tensor) -> tuple[KVHeads, KVHeads]:
        """What the projections give, mixed where there are several a head."""
        k, v = (project(x).unflatten(-1, (self.kv_heads, -1)) for project in (self.k_proj, self.v_proj))
        if self.switch == "none":
            return k, v
        weights = self.switch_proj(x).unflatten(-1, (self.kv_heads, -1)).sigmoid()  # (b, t, kv_heads, experts)
        if self.switch_top_k < weights.shape[-1]:
            chosen = weights.topk(self.switch_top_k, dim=-1).indices
            weights = weights * torch.zeros_like(weights).scatter(-1, chosen, 1.0)
        weights = self.hook_switch(weights)[..., None, :]

        def mixed(heads: Tensor) -> Heads:
            return (weights @ heads.unflatten(-1, (-1, self.head_dim))).squeeze(-2)

        return mixed(k) if self.switch == "kv" else k, mixed(v)


def _check(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"There is no {name} {value!r}: choose {', '.join(known)}.")
