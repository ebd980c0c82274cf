"""The choices of the gated-attention study and of Gated DeltaNet's ablations, as fields of `ModelConfig`.

No released config.json has these keys; at their defaults they say what the released models are, and are not written.
"""

from dataclasses import dataclass, fields
from typing import Any

from layers.variants.attention import ACTIVATIONS, FORMS, GRANULARITIES, INPUTS, OUTPUT_ACTIVATIONS, POSITIONS, SWITCHES
from layers.variants.deltanet import OUTPUT_GATES

CHOICES = {
    "attention_gate_position": POSITIONS,
    "attention_gate_form": FORMS,
    "attention_gate_activation": tuple(ACTIVATIONS),
    "attention_gate_input": INPUTS,
    "attention_output_activation": OUTPUT_ACTIVATIONS,
    "attention_switch": SWITCHES,
    "linear_output_gate": OUTPUT_GATES,
}
OF_THE_GATE = ("position", "form", "activation", "input")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """What may be chosen otherwise than in the released models. `AttentionVariant` and `DeltaNetVariant` explain each.

    Softmax attention: `attention_gate_*` say where the gate stands, how it acts and what makes its scores;
    `attention_output_*` what happens to attention's answer before it; `attention_switch*` mix several projections a
    key head. Gated DeltaNet: `linear_*`. `sandwich_norm` norms what mixers and feed-forwards add to the stream.
    """

    attention_gate_position: str = "G1"
    attention_gate_form: str = "multiplicative"
    attention_gate_activation: str = "sigmoid"
    attention_gate_input: str = "hidden"
    attention_output_norm: bool = False
    attention_output_activation: str = "none"
    attention_switch: str = "none"
    attention_switch_experts: int = 1
    attention_switch_top_k: int = 1
    sandwich_norm: bool = False

    linear_output_gate: str = "silu"
    linear_use_conv: bool = True
    linear_output_norm: bool = True
    linear_decay: bool = True
    linear_delta: bool = True
    linear_negative_eigenvalues: bool = False

    def chosen(self, prefix: str = "") -> dict[str, Any]:
        """The fields here whose name begins so and that differ from the released models."""
        found = {f.name: getattr(self, f.name) for f in fields(Variants) if f.name.startswith(prefix)}
        return {name: value for name, value in found.items() if value != RELEASED[name]}

    def check_variants(self, gate: str) -> None:
        """Raises: ValueError for an unknown choice, or choices that contradict each other or `gate`, attention_gate."""
        if gate not in GRANULARITIES:
            raise ValueError(f"attention_gate {gate!r} is none of {', '.join(GRANULARITIES)}.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}.")
        idle = [f"attention_gate_{part}" for part in OF_THE_GATE if f"attention_gate_{part}" in self.chosen()]
        if gate == "none" and idle:
            raise ValueError(
                f"{idle[0]} is {getattr(self, idle[0])!r} and attention_gate 'none': choose a gate, or leave it out."
            )
        if self.attention_gate_position == "G5" and gate != "elementwise":
            raise ValueError(f"G5 stands behind the output projection, without heads: its gate cannot be {gate!r}.")
        experts, top_k = self.attention_switch_experts, self.attention_switch_top_k
        if self.attention_switch == "none" and (experts, top_k) != (1, 1):
            raise ValueError("attention_switch is 'none', so there is nothing to mix: choose 'v' or 'kv'.")
        if top_k > experts:
            raise ValueError(f"attention_switch_top_k is {top_k} of {experts} projections: choose fewer.")
        if self.linear_negative_eigenvalues and not self.linear_delta:
            raise ValueError("linear_negative_eigenvalues needs linear_delta: without it nothing is erased.")


RELEASED: dict[str, Any] = {f.name: f.default for f in fields(Variants)}
