"""Which experts a token chooses, and their rows choice by choice, for hooks that read or replace them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.hook_point import HookPoint
from layers.norm import at_least_fp32


def top_experts(logits: Float[Tensor, "*batch e"], k: int) -> Int[Tensor, "*batch k"]:
    """Numbers of the k largest logits, the largest first; of equal ones the lower number first.

    bf16 logits are often equal, and torch's topk leaves open which of them it takes: another choice on another device,
    or for another number of tokens. Compiled decoding follows the same rule.
    """
    if logits.dtype == torch.float64:
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # One integer a logit, in the order of the rule: the float's bits, which for negative ones count downwards, and then
    # the expert's number from the end. Adding 0 makes -0 and 0 equal.
    bits = (logits.detach().float() + 0.0).view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    e = logits.shape[-1]
    return ((rising << 32) | torch.arange(e - 1, -1, -1, device=logits.device)).topk(k, dim=-1).indices


def expert_numbers(indices: Tensor) -> list[int]:
    """The numbers of experts. Raises: ValueError for a negative one, which an index would count from the end."""
    numbers = indices.flatten().tolist()
    if numbers and min(numbers) < 0:
        raise ValueError(f"A token is routed to the expert {min(numbers)}: experts are counted from 0.")
    return numbers


def check_experts(indices: Tensor, count: int) -> None:
    """Raises: ValueError for indices that name no expert of `count`."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(
            f"Tokens are routed to the experts {int(indices.min())} to {int(indices.max())}, "
            f"and there are 0 to {count - 1}."
        )


def choice_by_choice(
    experts: nn.Module,
    x: Float[Tensor, "b t width"],
    weights: Float[Tensor, "b t k"],
    indices: Int[Tensor, "b t k"],
    hook: HookPoint,
) -> Float[Tensor, "b t width"]:
    """What `experts` gives, from rows (b t k width) that pass `hook` before their weights; for experts of any kind.

    Every choice is a call with weight 1. The rows are added in the order in which `experts` adds them, so that
    rounding is the same.
    """
    flat, one = x.flatten(0, 1), torch.ones_like(weights[:1, :1, 0])
    if len(flat) == 1 and not torch.is_grad_enabled() and getattr(experts, "backend", "auto") == "auto":
        # Of a single token the rows are added in the order of its choices, in x's dtype.
        rows = torch.stack([experts(flat, one, chosen) for chosen in indices[0].split(1, dim=1)], dim=1)
        rows, y = hook(rows.view(*indices.shape, -1)), torch.zeros_like(x)
        for row, weight in zip(rows.unbind(2), weights.split(1, dim=-1), strict=True):
            y = torch.addcmul(y, row, weight)
        return y
    repeated = flat.repeat_interleave(indices.shape[-1], dim=0)
    rows = experts(repeated, one.expand(len(repeated), 1), indices.reshape(-1, 1))
    rows = hook(rows.view(*indices.shape, -1))
    order = indices.argsort(dim=-1, stable=True)
    rows, weights = rows.gather(2, order[..., None].expand_as(rows)), weights.gather(2, order)
    y = torch.zeros_like(at_least_fp32(x))
    for row, weight in zip(rows.unbind(2), weights.split(1, dim=-1), strict=True):
        y = y + at_least_fp32(row) * weight
    return y.to(x.dtype)
