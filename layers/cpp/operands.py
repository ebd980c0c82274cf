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
    if rows and x.stride(-1) == 1:
        contiguous = False
    return side_by_side(x) if contiguous or x.is_neg() else x


def side_by_side(x: Tensor) -> Tensor:
    """x, or a copy of it whose numbers lie one after the other and as they are. Raises: as `address`."""
    if x.is_contiguous() and not x.is_neg():
        return x
    if not isinstance(x, FakeTensor):
        check_memory(x)
    return x.resolve_neg().contiguous()


def readable(x: Tensor) -> tuple[Tensor, int]:
    """`side_by_side` and its `address`, in one look where x lies as it should. Raises: as `address`."""
    if (
        x.is_contiguous()
        and not x.is_neg()
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.itemsize
    ):
        return x, x.data_ptr()
    x = side_by_side(x)
    return x, address(x)


def address(x: Tensor) -> int:
    """Where the numbers of a tensor begin. Raises: ValueError where it has no memory here for all of them."""
    if x.is_neg():
        raise ValueError("Compiled code reads numbers as they lie: resolve_neg() first.")
    check_memory(x)
    return x.data_ptr()


def check_memory(x: Tensor) -> None:
    """Raises: ValueError where a tensor has no memory here for all of its numbers."""
    if x.device.type != "cpu" or x.layout is not torch.strided:
        raise ValueError(f"Compiled code reads dense tensors on the CPU; this one is {x.layout} on {x.device}.")
    count = x.numel()
    if count and not x.is_contiguous():  # up to the last number of all
        count = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    held = x.untyped_storage().nbytes()
    if held < (x.storage_offset() + count) * x.itemsize and count:
        raise ValueError(
            f"A tensor of shape {tuple(x.shape)} has {held} bytes of memory, fewer than its numbers need: "
            "its storage was freed or shrunk. Give it its memory back before it is used."
        )
