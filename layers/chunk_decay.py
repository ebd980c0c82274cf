"""Decay inside a chunk of tokens: what every chunked algorithm of linear attention needs."""

import torch
from torch import Tensor

from layers.norm import at_least_fp32

CHUNK = 64  # tokens
FORGOTTEN = -1000.0  # e to this is zero in fp32 and fp64: a smaller log decay forgets no more


def bounded(log_decay: Tensor) -> Tensor:
    """Log decays that can be summed: the same forgetting, the same gradients (zero where all is forgotten), no −∞."""
    return log_decay.clamp(min=FORGOTTEN)


def decays(log_decay: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The decay from a chunk's start to each of its tokens, from each token to its end, and between each two tokens.

    Sums and their differences are fp64: the decay between two neighbours is the difference of two sums that hold all
    stronger decays before them, and fp32 would have no digits left for it.

    Args:
        log_decay: (… C), from `bounded`.
        resets: (… C) True where a sequence begins: nothing is kept across; None where none does.
    Returns: γ (… C), γ_C / γ (… C) and Γ (… C C), fp32 or better; Γ is zero above the diagonal.
    """
    dtype = at_least_fp32(log_decay).dtype
    since_start = log_decay.double().cumsum(-1)
    gamma, to_end = since_start.to(dtype).exp(), (since_start[..., -1:] - since_start).to(dtype).exp()
    apart = torch.ones(*log_decay.shape[-1:] * 2, dtype=torch.bool, device=log_decay.device).triu(1)
    if resets is not None:
        number = resets.long().cumsum(-1)
        gamma, to_end = gamma * (number == 0), to_end * (number == number[..., -1:])
        apart = apart | (number[..., :, None] != number[..., None, :])
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    between = (since_start[..., :, None] - since_start[..., None, :]).to(dtype)
    return gamma, to_end, between.masked_fill_(apart, -torch.inf).exp_()
