"""The optimizers of a run, and the average of its weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from recipes.training.muon import Muon, matrices
from recipes.training.settings import Settings
from recipes.training.steps import parameter_groups


def optimizers(model: nn.Module, settings: Settings) -> list[Optimizer]:
    """AdamW for all parameters; or Muon for the matrices and AdamW for the rest (`muon.matrices`)."""
    rows = matrices(model) if settings.optimizer == "muon" else {}
    groups = parameter_groups(model, settings.weight_decay)
    rest: list[dict[str, Any]] = [
        {**group, "params": [p for p in group["params"] if p not in rows]} for group in groups
    ]
    found: list[Optimizer] = [AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), fused=True)]
    if rows:
        kinds: dict[tuple[int, ...], list[Tensor]] = {}
        for p, split in rows.items():
            kinds.setdefault(split, []).append(p)
        dtype = torch.bfloat16 if next(iter(rows)).is_cuda else torch.float32  # CPUs may emulate bf16 slowly
        together = [{"params": params, "rows": split} for split, params in kinds.items()]
        found.append(Muon(together, lr=settings.lr, weight_decay=settings.weight_decay, dtype=dtype))
    return found


class WeightAverage:
    """The exponential moving average of a model's parameters, in fp32.

    Attributes:
        tensors: the averages by name; they are saved with a training state.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after `step`, counted from 1; early steps count less, so that the start is soon forgotten."""
        decay = min(self.decay, step / (step + 9))
        for name, p in model.named_parameters():
            self.tensors[name].lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Put the averages into the model, and its weights in their place."""
        for name, p in model.named_parameters():
            before = p.detach().clone()
            p.copy_(self.tensors[name])
            self.tensors[name].copy_(before)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The gradient's norm over all parameters of a kind: embedding, linear_attn, self_attn, router, experts, …"""
    squares: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            kind = _kind(name)
            squares[kind] = squares.get(kind, torch.zeros((), device=p.device)) + p.grad.detach().float().square().sum()
    return {kind: square.sqrt().item() for kind, square in squares.items()}


def _kind(name: str) -> str:
    if name.startswith("mtp."):
        return "mtp"
    if name.startswith(("embed_tokens", "lm_head")):
        return name.split(".")[0]
    for kind in ("linear_attn", "self_attn", "router", "shared_expert", "experts", "mlp"):
        if f".{kind}." in name or f".{kind}_" in name:
            return kind
    return "norm"
