"""Store fused tensors in pieces, so that every piece can be divided by heads.

Gated DeltaNet's in_proj_qkv and convolution hold q, k and v one above the other: a block of rows of the whole is no
share of the heads. On many processes q, k and v are parameters of their own, in every layout, so that a checkpoint does
not depend on the layout. The same goes for gate and up of experts, which get an axis of their own.

    in_proj_qkv.weight        in_proj_qkv.q, in_proj_qkv.k, in_proj_qkv.v
    conv_weight               conv_q, conv_k, conv_v
    experts.gate_up_proj      the same name, (e, 2 · inner, width) as (e, 2, inner, width)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from layers.moe import Experts

FUSED = {"in_proj_qkv.weight": "in_proj_qkv.{}", "conv_weight": "conv_{}"}  # within a Gated DeltaNet layer
GATE_UP = "experts.gate_up_proj"


def in_pieces(config: q.ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The pieces of one of the model's parameters, by name; views. Moments and gradients alike."""
    if name.endswith(GATE_UP):
        return {name: tensor.unflatten(1, (2, -1))}
    fused = _fused(config, name)
    if fused is None:
        return {name: tensor}
    return dict(zip(fused, tensor.split(_rows(config)), strict=True))


def whole(config: q.ModelConfig, name: str, piece: Callable[[str], Tensor]) -> Tensor:
    """A parameter of the model from its pieces, which `piece` gives by name."""
    if name.endswith(GATE_UP):
        return piece(name).flatten(1, 2)
    fused = _fused(config, name)
    return piece(name) if fused is None else torch.cat([piece(part) for part in fused])


def piece_names(config: q.ModelConfig, name: str) -> list[str]:
    """Names of the pieces of a parameter."""
    return _fused(config, name) or [name]


def rows_of(config: q.ModelConfig, name: str, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The rows of each projection in a piece of a parameter, from those in the parameter; () for one projection."""
    return () if name.endswith(GATE_UP) or _fused(config, name) is not None else rows


def _fused(config: q.ModelConfig, name: str) -> list[str] | None:
    prefix, dot, leaf = name.partition(".linear_attn.")
    if leaf not in FUSED or not _released_deltanet(config):
        return None
    return [f"{prefix}{dot}{FUSED[leaf].format(part)}" for part in "qkv"]


def _released_deltanet(config: q.ModelConfig) -> bool:
    return not config.chosen("linear_")


def _rows(config: q.ModelConfig) -> tuple[int, int, int]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return keys, keys, config.linear_num_value_heads * config.linear_value_head_dim


def divide(model: nn.Module) -> None:
    """Replace the fused parameters of a model by their pieces; `regions.substituted` puts them together for a call."""
    for module in model.modules():
        if type(module) is GatedDeltaNet:
            rows = module.split
            for owner, leaf, name in (
                (module.in_proj_qkv, "weight", "{}"),
                (module, "conv_weight", "conv_{}"),
            ):
                fused = owner._parameters[leaf]
                assert fused is not None
                for part, piece in zip("qkv", fused.detach().split(rows), strict=True):
                    owner.register_parameter(name.format(part), nn.Parameter(piece.clone()))
                owner._parameters[leaf] = None  # filled during a call
        elif type(module) is Experts:
            module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().unflatten(1, (2, -1)))
