"""What torch.autocast changes: the dtype in which products are made."""

import torch
from torch import Tensor

from layers.dispatch.backends import Like, choose_for


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def as_multiplied(x: Tensor, *, head_dim: int = 0) -> Like:
    """What a backend is chosen by for products of x."""
    return Like(x.device, product_dtype(x), head_dim)


def under_autocast(x: Tensor, backend: str) -> str:
    """The backend of `linear` for products of x. Autocast multiplies in another dtype, so a named one becomes "torch".

    Raises: as `linear`, for the backend that was asked for.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return backend
    choose_for("linear", backend, x.device, torch.float32)  # the weights' dtype; x may be a product in another
    return "auto" if backend == "auto" else "torch"
