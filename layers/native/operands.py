"""What a compiled function may read: checked here, once a call, before an address leaves Python."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def operand(
    where: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype, contiguous: bool = True, rows: bool = False
) -> Tensor:
    """x, contiguous (or with contiguous `rows`, its last axis), of this shape and one of these dtypes.

    Raises: ValueError that names the operation and the argument, as `where` does, and what it must be.
    """
    right = x.dtype in dtypes and x.shape == shape and x.device.type == "cpu" and x.layout is torch.strided
    if not right and not isinstance(x, FakeTensor):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{where} must be {wanted} of shape {tuple(shape)} on the CPU; it is "
            f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)} on {x.device}."
        )
    x = x.resolve_neg() if x.is_neg() else x
    if rows:
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x.contiguous() if contiguous else x


def address(x: Tensor) -> int:
    """Where the numbers of a checked tensor begin. Raises: ValueError where it has no memory for all of them."""
    count = x.numel()
    if count and not x.is_contiguous():  # up to the last number of all
        count = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    held = x.untyped_storage().nbytes()
    if held < (x.storage_offset() + count) * x.itemsize and count:
        raise ValueError(
            f"A tensor of shape {tuple(x.shape)} has {held} bytes of memory, fewer than its numbers need: "
            "its storage was freed or shrunk. Give it its memory back before it is used."
        )
    return x.data_ptr()
