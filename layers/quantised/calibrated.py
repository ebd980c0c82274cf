"""Rounding that takes the inputs of a matrix into account.

The error of a column is made up for by the columns that are not rounded yet, so that the outputs for the inputs seen
change least. Source: GPTQ, arXiv:2210.17323, algorithm 1, with the columns in their own order.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from layers.quantised.group_weight import GroupWeight, best_scale, coded, group_size_for

DAMPING = 0.01  # share of the mean of the diagonal that is added to it, so that the inverse exists
BLOCK = 128  # columns whose corrections of later columns are made together


def quantise_for(
    weight: Float[Tensor, "*e out in"],
    gram: Float[Tensor, "*e in in"],
    bits: int,
    group_size: int | None = None,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> GroupWeight:
    """Round a weight so that its outputs for inputs with this Gram matrix change little.

    Args:
        gram: Σ x xᵀ over the inputs x. Zeros, for a matrix that saw no input, round to the nearest.
        group_size: as `quantise`.
    Raises: ValueError as `quantise`.
    """
    w, columns = weight.detach().float().clone(), weight.shape[-1]
    size = group_size_for(columns, bits, group_size)
    scale = best_scale(w.unflatten(-1, (-1, size)), bits, scale_dtype)  # also the check of the weights
    upper, most = _upper(gram.float()), 2 ** (bits - 1) - 1
    codes = torch.empty_like(w)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = torch.zeros_like(w[..., begin:end])
        for i in range(begin, end):
            if i % size == 0:  # the scale of what is to be rounded now, corrections included
                group = w[..., i : i + size]
                scale[..., i // size] = best_scale(group[..., None, :], bits, scale_dtype)[..., 0]
            step = scale[..., i // size].float()
            codes[..., i] = (w[..., i] / step).round().clamp(-most, most)
            wrong = (w[..., i] - codes[..., i] * step) / upper[..., i, i, None]
            w[..., i:end] -= wrong[..., None] * upper[..., i, None, i:end]
            errors[..., i - begin] = wrong
        w[..., end:] -= errors @ upper[..., begin:end, end:]
    return coded(codes, scale, bits)


def _upper(gram: Float[Tensor, "*e in in"]) -> Float[Tensor, "*e in in"]:
    """The upper Cholesky factor of the inverse of the damped Gram matrix."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    added = torch.where(mean > 0, DAMPING * mean, 1.0).expand_as(diagonal)
    added = added + torch.where(diagonal > 0, 0.0, mean)  # an input that was always zero
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag_embed(added)))
    return torch.linalg.cholesky(inverse, upper=True)


def output_error(
    piece: GroupWeight, weight: Float[Tensor, "*e out in"], gram: Float[Tensor, "*e in in"]
) -> tuple[float, float]:
    """Σ ‖(rounded − weight) x‖² and Σ ‖weight x‖² over the inputs x of a Gram matrix."""
    weight, gram = weight.float(), gram.float()
    wrong = piece.dequantise() - weight
    return float(((wrong @ gram) * wrong).sum()), float(((weight @ gram) * weight).sum())
