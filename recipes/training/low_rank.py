"""LoRA for training: a frozen weight plus scale · B A, of which only A and B are trained; experts are one stack.

Source: arXiv:2106.09685. The result is written as a folder of PEFT's, which `q.load(adapters=…)` and PEFT open.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import qwen3next as q
from layers.moe import Experts, SparseMoE
from qwen3next.checkpoints.lora import LoraPart, write_adapter


class LowRank(nn.Module):
    """weight + scale · B A, for a matrix (out in) or a stack of them (e out in); B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        *stack, out, inner = weight.shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(*stack, rank, inner, device=weight.device) * inner**-0.5)
        self.b = nn.Parameter(torch.zeros(*stack, out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * (self.b @ self.a)).to(weight.dtype)


def add_low_rank(model: q.Qwen3Next, *, rank: int, alpha: float, targets: str) -> list[str]:
    """Freeze the model and give every weight whose name matches a LowRank; returns their names.

    Args:
        targets: a regular expression that is searched in names such as `blocks.3.self_attn.q_proj.weight` and
            `blocks.0.mlp.experts.gate_up_proj`. Routers, embedding, head and the MTP layer are never changed.
    Raises: ValueError where no weight matches.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    chosen: list[tuple[str, nn.Module, str]] = []
    routers = {id(m.router) for m in model.modules() if isinstance(m, SparseMoE)}
    for path, module in model.named_modules():
        leaves: tuple[str, ...] = ("gate_up_proj", "down_proj") if type(module) is Experts else ()
        if isinstance(module, nn.Linear) and id(module) not in routers and path != "lm_head":
            leaves = ("weight",)
        if not path.startswith("mtp."):
            chosen += [(f"{path}.{leaf}", module, leaf) for leaf in leaves if re.search(targets, f"{path}.{leaf}")]
    if not chosen:
        raise ValueError(f"No weight matches --targets {targets!r}: give a part of names such as self_attn.q_proj.")
    for _, module, leaf in chosen:
        weight = getattr(module, leaf)
        parametrize.register_parametrization(module, leaf, LowRank(weight, rank, alpha / rank))
    return [name for name, _, _ in chosen]


@torch.no_grad()
def write_low_rank(model: q.Qwen3Next, names: list[str], folder: Path) -> None:
    """Write the adapter as a PEFT folder."""
    parts = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        own = model.get_submodule(f"{path}.parametrizations.{leaf}.0")
        assert isinstance(own, LowRank)
        a, b, experts = own.a.detach().cpu(), own.b.detach().cpu(), 0
        if a.ndim == 3:  # as LoraPart has them: (experts · r, in), and (out, r · experts), the expert changing fastest
            experts = len(a)
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        parts.append(LoraPart(name, (), a.contiguous(), b.contiguous(), own.scale, experts))
    write_adapter(folder, parts, model.config)


def merge_low_rank(model: q.Qwen3Next, names: list[str]) -> None:
    """Add the products to the weights, which are plain parameters again."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(path), leaf, leave_parametrized=True)
