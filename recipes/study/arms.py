"""The arms of the study: the baseline with one change each, all starting from equal weights."""

import hashlib

import torch
from torch import Tensor, nn

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from layers.moe import Experts
from qwen3next.study import LINEAR_ROWS, ROWS, Row, matched

ARMS: dict[str, Row] = ROWS | LINEAR_ROWS


def arms_of(baseline: q.ModelConfig) -> list[str]:
    """The names of a baseline's arms: variants of Gated DeltaNet if it has such layers, else the paper's rows."""
    names = list(LINEAR_ROWS if "linear_attention" in baseline.layer_types else ROWS)
    return [name for name in names if name != "more_experts" or baseline.num_experts]


def arm_config(name: str, baseline: q.ModelConfig, *, equal: bool, multiple_of: int = 1) -> q.ModelConfig:
    """The baseline with the change of one arm.

    Args:
        equal: resize feed-forwards, in steps of `multiple_of`, to match the baseline's number of parameters.
    Raises: ValueError for an arm that the baseline does not have, or for which it is too small.
    """
    known = arms_of(baseline)
    if name not in known:
        raise ValueError(f"There is no arm {name!r} here: choose {', '.join(known)}.")
    config = ARMS[name].of(baseline)
    return matched(config, like=baseline, multiple_of=multiple_of) if equal and config != baseline else config


@torch.no_grad()
def build(config: q.ModelConfig, seed: int) -> q.Qwen3Next:
    """A model with each parameter sampled from the seed and its name, so that shared parameters of arms are bit-equal.

    Distributions are those of `Qwen3Next.reset_parameters`. Parameters with equal names and row lengths but different
    shapes, as in a narrower feed-forward, start with the same numbers.
    """
    model = q.Qwen3Next(config)
    std = config.initializer_range
    with torch.random.fork_rng(devices=[]):

        def normal(name: str, parameter: Tensor) -> None:
            _seed(seed, name)
            parameter.normal_(std=std)

        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight is not model.embed_tokens.weight:
                normal(f"{name}.weight", module.weight)
            elif isinstance(module, Experts):
                normal(f"{name}.gate_up_proj", module.gate_up_proj)
                normal(f"{name}.down_proj", module.down_proj)
            elif isinstance(module, GatedDeltaNet):
                _seed(seed, f"{name}.conv_weight")
                module.reset_convolution()
                _seed(seed, f"{name}.A_log")
                module.reset_decay()
        normal("embed_tokens.weight", model.embed_tokens.weight)  # sampled once, also if the head is tied to it
    return model


def _seed(seed: int, name: str) -> None:
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1)
