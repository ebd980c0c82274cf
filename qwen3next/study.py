"""The rows of the gated-attention study (arXiv:2505.06708) as presets. A row changes some fields of a baseline.

q.presets.named("moe_15b_g1_elementwise")()       # a row of its tables 1, 3 and 6 at the paper's size
ROWS["g1_elementwise"].of(baseline)               # the same choice on a baseline of another size
matched(ROWS["g1_elementwise"].of(c), like=c)     # with the feed-forward narrowed to equal parameters
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen3next.checkpoints.state_dict_adapter import tensor_specs
from qwen3next.config import ModelConfig

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: the row's number in docs/gated_attention.md, 1 to 25; 0 for rows not in that table.
        what: a description in words.
        changes: fields that differ from the baseline's, or a function of the baseline that returns them.
        added: added parameters in millions, as the paper prints them; None if it prints none.
    """

    number: int
    what: str
    changes: Changes | Callable[[ModelConfig], Changes]
    added: float | None = None

    def of(self, baseline: ModelConfig) -> ModelConfig:
        """The baseline with this row's changes."""
        return baseline.replace(**(self.changes(baseline) if callable(self.changes) else self.changes))


def _gate(granularity: str = "elementwise", position: str = "G1", **more: str) -> dict[str, str]:
    extra = {f"attention_gate_{name}": value for name, value in more.items()}
    return {"attention_gate": granularity, "attention_gate_position": position, **extra}


def _switch(kind: str, experts: int, top_k: int) -> dict[str, str | int]:
    return {"attention_switch": kind, "attention_switch_experts": experts, "attention_switch_top_k": top_k}


def _more_experts(c: ModelConfig) -> Changes:
    """1/32 more experts and 1/2 more experts per token: 132 instead of 128, 12 instead of 8."""
    if not c.num_experts:
        raise ValueError("The row more_experts needs a mixture of experts, but this model is dense: choose another.")
    more, top_k = max(c.num_experts // 32, 1), c.num_experts_per_tok
    return {"num_experts": c.num_experts + more, "num_experts_per_tok": top_k + max(top_k // 2, 1)}


ROWS = {
    "baseline": Row(1, "no gate", {}, 0.0),
    "more_kv_heads": Row(2, "twice the key heads", lambda c: {"num_key_value_heads": 2 * c.num_key_value_heads}, 50.0),
    "more_query_heads": Row(
        3, "half as many query heads again", lambda c: {"num_attention_heads": 3 * c.num_attention_heads // 2}, 201.0
    ),
    "more_experts": Row(4, "more experts, in all and for a token", _more_experts, 400.0),
    "g1_elementwise": Row(5, "G1 (attention's answer), elementwise", _gate(), 201.0),
    "g2_elementwise": Row(6, "G2 (value), elementwise", _gate(position="G2"), 25.0),
    "g3_elementwise": Row(7, "G3 (key), elementwise", _gate(position="G3"), 25.0),
    "g4_elementwise": Row(8, "G4 (query), elementwise", _gate(position="G4"), 201.0),
    "g5_elementwise": Row(9, "G5 (the layer's output), elementwise", _gate(position="G5"), 100.0),
    "g1_headwise": Row(10, "G1, headwise", _gate("headwise"), 1.6),
    "g2_headwise": Row(11, "G2, headwise", _gate("headwise", "G2"), 0.2),
    "g1_head_shared": Row(12, "G1, averaged over heads", _gate("head_shared"), 201.0),
    "g2_head_shared": Row(13, "G2, averaged over heads", _gate("head_shared", "G2"), 25.0),
    "g1_additive_silu": Row(14, "G1, additive, SiLU", _gate(form="additive", activation="silu"), 201.0),
    "g1_silu": Row(15, "G1, SiLU", _gate(activation="silu"), 201.0),
    "output_norm": Row(16, "RMSNorm of each head's answer", {"attention_output_norm": True}),
    "output_silu": Row(17, "SiLU of the answer", {"attention_output_activation": "silu"}),
    "g1_additive_identity": Row(18, "G1, additive, no activation", _gate(form="additive", activation="identity")),
    "g1_constant": Row(19, "G1, independent of the input", _gate(input="constant")),
    "g1_ns_sigmoid": Row(20, "G1, non-sparse sigmoid", _gate(activation="ns_sigmoid")),
    "switch_kv_8_top8": Row(21, "keys and values mixed of 8", _switch("kv", 8, 8)),
    "switch_kv_4_top4": Row(22, "keys and values mixed of 4", _switch("kv", 4, 4)),
    "switch_v_4_top4": Row(23, "values mixed of 4", _switch("v", 4, 4)),
    "switch_v_8_top2": Row(24, "values mixed of the best 2 of 8", _switch("v", 8, 2)),
    "switch_v_1_top1": Row(25, "values weighed by a sigmoid a head", _switch("v", 1, 1)),
    "sandwich_norm": Row(0, "norms behind mixers and feed-forwards", {"sandwich_norm": True}),
}

# The ablations of arXiv:2412.06464 and related architectures, for a baseline with Gated DeltaNet layers.
LINEAR_ROWS = {
    "gdn": Row(0, "Gated DeltaNet as released", {}),
    "gdn_sigmoid_gate": Row(0, "output gate by sigmoid", {"linear_output_gate": "sigmoid"}),
    "gdn_no_gate": Row(0, "no output gate", {"linear_output_gate": "none"}),
    "gdn_no_conv": Row(0, "no convolution", {"linear_use_conv": False}),
    "gdn_no_norm": Row(0, "no output norm", {"linear_output_norm": False}),
    "gdn_negative": Row(0, "write strength up to 2", {"linear_negative_eigenvalues": True}),
    "deltanet": Row(0, "no decay: the plain delta rule", {"linear_decay": False}),
    "mamba2_like": Row(0, "no delta: a decaying sum", {"linear_delta": False}),
    "linear_attention": Row(0, "neither decay nor delta", {"linear_decay": False, "linear_delta": False}),
}


def moe_15b(row: str = "baseline", **changes: Any) -> ModelConfig:
    """The study's mixture of experts, "15B-A2.54B": 24 layers, 128 experts, 8 per token.

    The paper does not print norms, RoPE base and loss weights: these are Qwen3's and this project's defaults.
    """
    values: dict[str, Any] = {
        "num_hidden_layers": 24,
        "full_attention_interval": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "zero_centred_norms": False,
        "attention_gate": "none",
        "max_position_embeddings": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "shared_expert_intermediate_size": 0,
        "mtp_num_hidden_layers": 0,
        "router_z_loss_coef": 1e-3,
    }
    return ROWS[row].of(ModelConfig(**values)).replace(**changes)


def dense_1_7b(row: str = "baseline", *, layers: int = 28, **changes: Any) -> ModelConfig:
    """The study's dense models: 28 layers, or 48 layers with a smaller hidden size.

    With a gate, the feed-forward is narrowed until the number of parameters equals the baseline's.
    Raises: ValueError for another number of layers.
    """
    if layers not in (28, 48):
        raise ValueError(f"layers must be 28 or 48, as in the study's dense models, got {layers}.")
    baseline = ModelConfig(
        model_type="qwen3",
        num_hidden_layers=layers,
        hidden_size=2048 if layers == 28 else 1536,
        intermediate_size=6144 if layers == 28 else 4608,
        full_attention_interval=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e4,
        partial_rotary_factor=1.0,
        zero_centred_norms=False,
        attention_gate="none",
        max_position_embeddings=4096,
        num_experts=0,
        mtp_num_hidden_layers=0,
        tie_word_embeddings=True,
    )
    config = ROWS[row].of(baseline)
    return (matched(config, like=baseline) if config.attention_gate != "none" else config).replace(**changes)


def count(config: ModelConfig) -> int:
    """Number of parameters, from the shapes of the tensors; nothing is allocated."""
    return sum(math.prod(entry.shape) for entry in tensor_specs(config))


def matched(config: ModelConfig, *, like: ModelConfig, multiple_of: int = 1) -> ModelConfig:
    """`config` with the feed-forward size changed so that the number of parameters is closest to that of `like`.

    The remaining difference is at most half the parameters of `multiple_of` hidden units in every feed-forward.
    Raises: ValueError if no feed-forward would be left, or if some layers are dense and some sparse.
    """
    sparse = {config.is_sparse(i) for i in range(config.num_hidden_layers)}
    if len(sparse) > 1:
        raise ValueError("Some layers are dense and some are sparse: make all of them dense or all of them sparse.")
    field, number = ("moe_intermediate_size", config.num_experts) if sparse.pop() else ("intermediate_size", 1)
    a_unit = 3 * config.hidden_size * number * (config.num_hidden_layers + config.mtp_num_hidden_layers)
    width = getattr(config, field) - multiple_of * round((count(config) - count(like)) / (a_unit * multiple_of))
    if width < 1:
        raise ValueError(f"{field} would have to be {width} to match the parameters: start from a larger one.")
    return config.replace(**{field: width})


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    **{f"moe_15b_{name}": partial(moe_15b, name) for name, row in ROWS.items() if row.number},
    **{
        f"dense_{layers}_layers_{name}": partial(dense_1_7b, name, layers=layers)
        for layers, names in (
            (28, ("baseline", "g1_elementwise")),
            (48, ("baseline", "g1_elementwise", "g1_headwise", "sandwich_norm")),
        )
        for name in names
    },
}
