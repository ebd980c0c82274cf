"""What is checked before a model runs: token ids, where sequences lie, names of dtypes and devices."""

import torch
from torch import Tensor

from layers.segments import UNKNOWN, Segments


def check_ids(ids: Tensor, name: str = "input_ids", *, least: int = 1, ndim: int = 2) -> None:
    """Raises: ValueError where `ids` are no token ids of shape (b, t), or (b,) where ndim is 1, at least `least`."""
    other = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if other or ids.ndim != ndim or ids.numel() < least:
        shape = "(b, t)" if ndim == 2 else "(b,)"
        kind = str(ids.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be integers of shape {shape}, got {kind} of shape {tuple(ids.shape)}.")


def as_ids(ids: Tensor, name: str = "input_ids", *, least: int = 1, ndim: int = 2) -> Tensor:
    """Token ids in int64, from integers of any width. Raises: as `check_ids`."""
    check_ids(ids, name, least=least, ndim=ndim)
    return ids.to(torch.int64)


def check_segments(input_ids: Tensor, segments: Segments | None, *, cached: bool) -> None:
    """Raises: ValueError for segments of another shape, or ones that a cache cannot count."""
    if segments is None:
        return
    if (segments.batch, segments.length) != tuple(input_ids.shape):
        raise ValueError(
            f"segments describe a batch of {segments.batch} x {segments.length} tokens, "
            f"input_ids are {input_ids.shape[0]} x {input_ids.shape[1]}."
        )
    if cached and segments.sequences == UNKNOWN:
        raise ValueError("A cache cannot count sequences in a traced graph: make the segments outside of it.")


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raises: ValueError for ids outside the vocabulary. On a GPU, where asking would wait for it, nothing is asked."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    few = ids.numel() <= 8  # quicker as numbers, which counts in decoding
    found: list[int] = ids.flatten().tolist() if few else [int(ids.min()), int(ids.max())]
    if not 0 <= min(found) <= max(found) < vocab_size:
        raise ValueError(
            f"input_ids hold {min(found)} to {max(found)}; this model knows "
            f"0 to {vocab_size - 1}: was the text encoded with another tokenizer?"
        )


def check_labels(input_ids: Tensor, labels: Tensor, vocab_size: int) -> None:
    """Raises: ValueError for labels of another shape than input_ids, or that are neither ids nor -100."""
    check_ids(input_ids)
    check_ids(labels, "labels")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels are {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}: align them.")
    if labels is not input_ids and not torch.compiler.is_compiling():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            raise ValueError(
                f"labels hold {int(wrong[0])}: give ids of 0 to {vocab_size - 1}, or -100 where nothing is "
                "to be predicted."
            )


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """torch's dtype of that name. Raises: ValueError for one in which nothing is computed, as FP8."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name!r} is no dtype to compute in: choose float32, bfloat16, float16 or float64.")
    return dtype


def as_kv_dtype(name: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype of a KV cache; None is the default. Raises: ValueError for one that keys cannot be kept in."""
    if name in ("int8", torch.int8):
        return torch.int8
    try:
        return default if name is None else as_dtype(name)
    except ValueError:
        known = "float32, bfloat16, float16, float64 or int8"
        raise ValueError(f"Keys and values cannot be kept in {name!r}: choose {known}.") from None


def as_device(name: str | torch.device) -> torch.device:
    """torch's device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises: ValueError for a name that is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no device: choose auto, cpu, cuda or cuda:0.") from None
