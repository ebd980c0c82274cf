"""Checks before a model runs: token ids, segments, labels, names of dtypes and devices."""

from typing import Any

import torch
from torch import Tensor

from layers.segments import UNKNOWN, Segments


def check_ids(ids: Tensor, name: str = "input_ids", *, least: int = 1, ndim: int = 2) -> None:
    """Check that `ids` are integers of shape (b, t), or (b,) if ndim is 1, with at least `least` elements.

    Raises: ValueError otherwise, which names the tensor `name`.
    """
    other = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if other or ids.ndim != ndim or ids.numel() < least:
        shape = "(b, t)" if ndim == 2 else "(b,)"
        kind = str(ids.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be integers of shape {shape}, got {kind} of shape {tuple(ids.shape)}.")


def as_ids(ids: Tensor, name: str = "input_ids", *, least: int = 1, ndim: int = 2) -> Tensor:
    """Token ids as int64, from integers of any dtype. Raises: as `check_ids`."""
    check_ids(ids, name, least=least, ndim=ndim)
    return ids.to(torch.int64)


def as_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Token ids (b, t) as int64; -1, which is no token, where `inputs_embeds` (b, t, width) come without ids.

    Raises: ValueError if there is neither, or if their shapes differ.
    """
    if inputs_embeds is None:
        if input_ids is None:
            raise ValueError("Give input_ids or inputs_embeds.")
        return as_ids(input_ids)
    if inputs_embeds.ndim != 3 or not inputs_embeds.numel():
        raise ValueError(f"inputs_embeds must have shape (b, t, width), got {tuple(inputs_embeds.shape)}.")
    if input_ids is None:
        return torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
    if input_ids.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)} and inputs_embeds {tuple(inputs_embeds.shape)}: make the "
            "first two sizes equal."
        )
    return as_ids(input_ids)


def check_segments(input_ids: Tensor, segments: Segments | None, *, cached: bool) -> None:
    """Check segments against input_ids (b, t); `cached` says whether a cache is used.

    Raises: ValueError for segments of another shape, or, with a cache, ones made inside a traced graph.
    """
    if segments is None:
        return
    if (segments.batch, segments.length) != tuple(input_ids.shape):
        raise ValueError(
            f"segments describe {segments.batch} x {segments.length} tokens, but "
            f"input_ids have shape {input_ids.shape[0]} x {input_ids.shape[1]}: make the segments from these ids."
        )
    if cached and segments.sequences == UNKNOWN:
        raise ValueError("A cache cannot count the sequences of segments made in a traced graph: make them outside it.")


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Check that ids on the CPU are in the vocabulary. On a GPU this would wait for the device, so it is skipped.

    Raises: ValueError for ids outside 0 to vocab_size - 1.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    few = ids.numel() <= 8  # faster than two reductions, which matters in decoding
    found: list[int] = ids.flatten().tolist() if few else [int(ids.min()), int(ids.max())]
    if not 0 <= min(found) <= max(found) < vocab_size:
        raise ValueError(
            f"input_ids are {min(found)} to {max(found)}, outside the vocabulary of "
            f"0 to {vocab_size - 1}: encode the text with this model's tokenizer."
        )


def check_labels(input_ids: Tensor, labels: Tensor, vocab_size: int) -> None:
    """Check labels (b, t) against input_ids (b, t).

    Raises: ValueError for labels of another shape, or with values that are neither ids nor -100.
    """
    check_ids(input_ids)
    check_ids(labels, "labels")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}: make them equal."
        )
    if labels is not input_ids and not torch.compiler.is_compiling():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            raise ValueError(
                f"labels contain {int(wrong[0])}: use ids of 0 to {vocab_size - 1}, or -100 for positions "
                "without a loss."
            )


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """torch's dtype of that name. Raises: ValueError for a dtype that models cannot compute in, such as FP8."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name!r} is not a supported dtype: choose float32, bfloat16, float16 or float64.")
    return dtype


def as_kv_dtype(name: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype of a KV cache; None means `default`. Raises: ValueError for an unsupported dtype."""
    if name in ("int8", torch.int8):
        return torch.int8
    try:
        return default if name is None else as_dtype(name)
    except ValueError:
        known = "float32, bfloat16, float16, float64 or int8"
        raise ValueError(f"{name!r} is not a supported KV cache dtype: choose {known}.") from None


def as_device(name: str | torch.device) -> torch.device:
    """torch's device of that name; "auto" is CUDA if available, else the CPU.

    Raises: ValueError for an unknown device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is not a device: choose auto, cpu, cuda or cuda:0.") from None


def like(model: Any) -> Tensor:
    """A tensor of the model's device and dtype, also where its embedding was replaced by a module without a weight."""
    weight = getattr(model.embed_tokens, "weight", None)
    return weight if isinstance(weight, Tensor) else next(model.parameters())
