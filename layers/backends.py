"""Which implementation of an operation runs here, and why.

"auto" picks the fastest that can run and may fall back. A backend that was named runs or raises.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation. `missing` says in a sentence why it cannot run for a tensor, or None."""

    name: str
    why: str
    missing: Callable[[torch.device, torch.dtype], str | None] = lambda _device, _dtype: None


@cache
def fla_missing() -> str | None:
    """Why flash-linear-attention's kernels cannot be imported here, or None."""
    for module, package in (("triton", "triton"), ("fla", "flash-linear-attention")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'qwen3next[cuda]'"
    return None


def _fla(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-linear-attention's kernels run on CUDA, the tensors are on {device.type}"
    if dtype == torch.float64:
        return "flash-linear-attention's kernels have no float64"
    return fla_missing()


def _grouped(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.float32, torch.bfloat16) else f"torch's grouped_mm has no {dtype}"


# Fastest first: "auto" takes the first that can run.
OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "delta_rule": (
        Implementation("fla", "fused Triton kernels", _fla),
        Implementation("chunked", "matrix products over chunks of 64 tokens, in torch"),
        Implementation("recurrent", "token loop, the definition"),
    ),
    "linear_rule": (  # the delta rule's place in layers without the delta
        Implementation("chunked", "matrix products over chunks of 64 tokens, in torch"),
        Implementation("recurrent", "token loop, the definition"),
    ),
    "causal_conv": (
        Implementation("fla", "fused Triton kernel", _fla),
        Implementation("torch", "one pass a tap, in torch"),
    ),
    "attention": (
        Implementation("sdpa", "torch's fused attention"),
        Implementation("eager", "shows scores and pattern"),
    ),
    "experts": (
        Implementation(
            "grouped", "one grouped matmul for all experts; a single token reads its own in place", _grouped
        ),
        Implementation("loop", "one expert after another, the definition"),
    ),
}


def why_not(operation: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the named backend cannot run on such tensors, in a sentence, or None.

    Raises: ValueError for a backend that the operation does not have.
    """
    for implementation in OPERATIONS[operation]:
        if implementation.name == name:
            return implementation.missing(device, dtype)
    known = ", ".join(repr(i.name) for i in OPERATIONS[operation])
    raise ValueError(f"{operation} has no backend {name!r}: choose 'auto', {known}.")


def choose(operation: str, backend: str, like: Tensor) -> str:
    """The name of the implementation that runs for a tensor `like` this one.

    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    return choose_for(operation, backend, like.device, like.dtype)


def choose_for(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """`choose` for tensors that need not exist."""
    if backend != "auto":
        reason = why_not(operation, backend, device, dtype)
        if reason is not None:
            raise RuntimeError(f"The {backend!r} backend of {operation} cannot run here: {reason}.")
        return backend
    for implementation in OPERATIONS[operation]:
        if implementation.missing(device, dtype) is None:
            return implementation.name
    raise AssertionError(f"{operation} has no implementation that always runs")


@dataclass(frozen=True)
class Explanation:
    """One row of `explain`: what runs for an operation, why, and what would be faster."""

    operation: str
    runs: str
    why: str
    faster: str


def explain_operation(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> Explanation:
    """Say what `choose` picks for such tensors, and why nothing faster runs."""
    runs = choose_for(operation, backend, device, dtype)
    why = "named" if backend != "auto" else "fastest that can run here"
    faster: list[str] = []
    for implementation in OPERATIONS[operation]:
        if implementation.name == runs:
            return Explanation(operation, runs, f"{why}: {implementation.why}", "; ".join(faster) or "-")
        reason = implementation.missing(device, dtype)
        faster.append(f"{implementation.name}: {reason or 'choose it or auto'}")
    raise AssertionError
