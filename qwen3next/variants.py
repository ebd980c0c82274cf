"""The choices of the gated-attention study and of Gated DeltaNet's ablations, as fields of `ModelConfig`.

No released config.json has these keys. The defaults describe the released models and are not written.
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
    """Choices that no released model makes. `AttentionVariant` and `DeltaNetVariant` explain each field.

    Softmax attention: `attention_gate_*` set the gate's position, form, activation and input; `attention_output_*`
    norm or activate attention's output before the gate; `attention_switch*` mix several projections per key head.
    Gated DeltaNet: `linear_*`. `sandwich_norm` normalises the outputs of mixers and feed-forwards before they are
    added to the residual stream.
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
        """The fields of this class whose name starts with `prefix` and whose value differs from the released models."""
        found = {f.name: getattr(self, f.name) for f in fields(Variants) if f.name.startswith(prefix)}
        return {name: value for name, value in found.items() if value != RELEASED[name]}

    def check_variants(self, gate: str) -> None:
        """Check these fields. `gate` is the configuration's attention_gate.

        Raises: ValueError for an unknown choice, or choices that contradict each other or `gate`.
        """
        if gate not in GRANULARITIES:
            raise ValueError(f"attention_gate {gate!r} is unknown: choose one of {', '.join(GRANULARITIES)}.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: choose one of {', '.join(known)}.")
        idle = [f"attention_gate_{part}" for part in OF_THE_GATE if f"attention_gate_{part}" in self.chosen()]
        if gate == "none" and idle:
            raise ValueError(
                f"{idle[0]} is {getattr(self, idle[0])!r} but attention_gate is 'none': choose a gate, or leave "
                "that field out."
            )
        if self.attention_gate_position == "G5" and gate != "elementwise":
            raise ValueError(f"A gate at G5 has no heads: attention_gate must be 'elementwise', got {gate!r}.")
        experts, top_k = self.attention_switch_experts, self.attention_switch_top_k
        if self.attention_switch == "none" and (experts, top_k) != (1, 1):
            raise ValueError("attention_switch_experts and attention_switch_top_k need attention_switch 'v' or 'kv'.")
        if top_k > experts:
            raise ValueError(f"attention_switch_top_k is {top_k}, but attention_switch_experts is {experts}: lower it.")
        if self.linear_negative_eigenvalues and not self.linear_delta:
            raise ValueError("linear_negative_eigenvalues needs linear_delta: set linear_delta, or leave it out.")


RELEASED: dict[str, Any] = {f.name: f.default for f in fields(Variants)}
