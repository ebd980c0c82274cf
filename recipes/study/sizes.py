"""Presets of the study: models, data and training length for a laptop, for one GPU, and as in the paper."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import qwen3next as q
from qwen3next.study import dense_1_7b, moe_15b
from recipes.study.toy import VOCABULARY

SIX = ("baseline", "g1_elementwise", "g1_headwise", "g1_head_shared", "g2_elementwise", "g1_ns_sigmoid")
FOUR = ("baseline", "g1_elementwise", "g1_headwise", "g2_elementwise")
GDN = ("gdn", "gdn_no_gate", "gdn_no_conv", "gdn_no_norm", "deltanet", "mamba2_like")
STABILITY = ("baseline", "g1_elementwise", "sandwich_norm")


@dataclass(frozen=True)
class Size:
    """One experiment at one scale.

    Attributes:
        baseline: returns the model of the arm without a gate, for a vocabulary size.
        arms: default arms; empty means all arms of the baseline.
        seeds: default seeds.
        steps: steps of each run, unless a budget allows fewer.
        tokens: the tokenizer.
        equal: whether arms get the baseline's number of parameters.
        multiple_of: steps in which the feed-forward size changes to match it.
        rates: multiples of `lr` (ladder).
        precisions: precisions of training; the ladder uses all, other experiments the first.
        looks: windows measured during training.
    """

    baseline: Callable[[int], q.ModelConfig]
    arms: tuple[str, ...]
    steps: int
    batch_size: int
    window: int
    lr: float
    warmup: int
    seeds: tuple[int, ...] = (0,)
    accumulate: int = 1
    schedule: str = "wsd"
    clip: float = 1.0
    tokens: str = "bpe:4096"
    equal: bool = True
    multiple_of: int = 1
    rates: tuple[float, ...] = (1.0,)
    precisions: tuple[str, ...] = ("fp32",)
    looks: int = 64


def softmax_model(layers: int, width: int, heads: int, kv_heads: int, inner: int, **changes: Any) -> q.ModelConfig:
    """Dense with softmax attention only, as in the study: QK-norm, RoPE over whole heads of 32 or 64, no gate."""
    values: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "full_attention_interval": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "zero_centred_norms": True,
        "attention_gate": "none",
        "num_experts": 0,
        "mtp_num_hidden_layers": 0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    return q.ModelConfig(**(values | changes))


def _moe(config: q.ModelConfig, *, experts: int, top_k: int, inner: int) -> q.ModelConfig:
    return config.replace(
        model_type="qwen3_next",
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=0,
        router_aux_loss_coef=1e-2,  # with 1e-3, tiny mixtures route every token to one expert
        router_z_loss_coef=1e-3,
    )


def _hybrid(config: q.ModelConfig, *, heads: int) -> q.ModelConfig:
    """Three of four layers Gated DeltaNet, the fourth softmax attention with the released gate."""
    return config.replace(
        model_type="qwen3_next",
        full_attention_interval=4,
        attention_gate="elementwise",
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )


def _tiny(vocabulary: int) -> q.ModelConfig:
    return softmax_model(3, 96, 4, 2, 256, vocab_size=vocabulary)


def _sixty_million(vocabulary: int) -> q.ModelConfig:
    return softmax_model(10, 768, 12, 4, 2048, head_dim=64, vocab_size=vocabulary)


TOY = Size(
    baseline=lambda _: softmax_model(1, 64, 4, 2, 128, vocab_size=VOCABULARY + 1, tie_word_embeddings=False),
    arms=(),
    seeds=(0, 1, 2),
    steps=2000,
    batch_size=32,
    window=64,
    lr=3e-3,
    warmup=50,
    equal=False,
)
# Steps matter more than tokens here: sinks form after some thousand steps at any batch size (docs/log.md).
CPU_LM = Size(_tiny, SIX, steps=16_000, batch_size=8, window=64, lr=6e-3, warmup=100, seeds=(0, 1, 2))
GPU_LM = Size(
    _sixty_million, FOUR, 3052, 64, 1024, 2e-3, 200, tokens="bpe:8192", multiple_of=8, precisions=("bf16",), looks=32
)
PAPER = Size(
    lambda vocabulary: dense_1_7b(vocab_size=vocabulary),
    FOUR[:2],
    100_000,
    8,
    4096,
    4e-3,
    1000,
    accumulate=128,
    schedule="cosine",
    tokens="tokenizer.json",
    multiple_of=8,
    precisions=("bf16",),
)


@dataclass(frozen=True)
class Preset:
    """The experiments at one scale; `lm` has one for each kind of model."""

    toy: Size
    lm: dict[str, Size]
    ladder: Size
    extension: dict[str, float] = field(default_factory=lambda: {"longer": 4, "share": 0.1, "theta": 100.0, "yarn": 4})


PRESETS = {
    "cpu": Preset(
        toy=TOY,
        lm={
            "dense": CPU_LM,
            "moe": replace(CPU_LM, baseline=lambda v: _moe(_tiny(v), experts=8, top_k=2, inner=96), multiple_of=4),
            "hybrid": replace(
                CPU_LM, baseline=lambda v: _hybrid(_tiny(v).replace(num_hidden_layers=4), heads=3), arms=GDN
            ),
        },
        ladder=Size(
            lambda v: softmax_model(12, 64, 2, 1, 192, vocab_size=v),
            STABILITY,
            steps=800,
            batch_size=8,
            window=64,
            lr=3e-3,  # the best of 0.75, 1.5, 3 and 6e-3 without a gate, or equally good (docs/log.md)
            warmup=20,
            looks=16,
            clip=100.0,  # practically no clipping, which would hide the spikes that the ladder measures
            rates=(1.0, 2.0, 4.0, 8.0),
            precisions=("fp32", "bf16"),
        ),
    ),
    "gpu": Preset(
        toy=TOY,
        lm={
            "dense": GPU_LM,
            "moe": replace(GPU_LM, baseline=lambda v: _moe(_sixty_million(v), experts=16, top_k=4, inner=512)),
            "hybrid": replace(GPU_LM, baseline=lambda v: _hybrid(_sixty_million(v), heads=12), arms=GDN),
        },
        ladder=Size(
            lambda v: softmax_model(48, 384, 6, 2, 1024, head_dim=64, vocab_size=v),
            STABILITY,
            steps=2000,
            batch_size=64,
            window=512,
            lr=2e-3,
            warmup=100,
            clip=100.0,
            tokens="bpe:8192",
            multiple_of=8,
            rates=(1.0, 2.0, 4.0, 8.0),
            precisions=("bf16", "fp32"),
        ),
    ),
    "paper": Preset(
        toy=TOY,
        lm={"dense": PAPER, "moe": replace(PAPER, baseline=lambda v: moe_15b(vocab_size=v), lr=2e-3, equal=False)},
        ladder=replace(
            PAPER,
            baseline=lambda v: dense_1_7b(layers=48, vocab_size=v),
            arms=STABILITY,
            rates=(1.0, 2.0),
            precisions=("bf16",),
        ),
    ),
}
