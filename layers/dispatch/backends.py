"""Choose the implementation of an operation, run it, and explain the choice.

"auto" picks the fastest implementation that can run: on the CPU by measured figures (layers/dispatch/speeds.py), else
in the order below. A backend that is named runs or raises.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layers.deprecation import renamed_names, warn_renamed
from layers.dispatch import availability as can
from layers.dispatch import speeds
from layers.dispatch.availability import Refusal
from layers.dispatch.registry import function_of, special_cases


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation, and its conditions: each gives the reason in a sentence, or None.

    Attributes:
        missing: why it cannot run for tensors of a device and dtype.
        passed_over: why "auto" does not pick it although it can run.
        head_dims: why it cannot run for heads of a width.
        except_for: for which calls another implementation runs in its place.
        on_auto_except_for: for which calls in addition, if it was not named.
    """

    name: str
    why: str
    missing: Callable[[torch.device, torch.dtype], str | None] = lambda _device, _dtype: None
    passed_over: Callable[[torch.device, torch.dtype], str | None] = lambda _device, _dtype: None
    head_dims: Callable[[torch.device, torch.dtype, int], str | None] = lambda _device, _dtype, _head_dim: None
    except_for: str = ""
    on_auto_except_for: str = ""

    def cannot(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run for such tensors, whose heads are so wide (0: unknown), or None."""
        return self.missing(device, dtype) or (self.head_dims(device, dtype, head_dim) if head_dim else None)

    def unfit(self, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
        """Why "auto" does not pick it for such tensors, or None."""
        return self.cannot(device, dtype, head_dim) or self.passed_over(device, dtype)


_ONE_TOKEN = "a token by itself takes the token loop"
_ONE_EXPERT_AT_A_TIME = "a token by itself takes one expert after another"
_ONE_QUERY = "one query behind more than 4096 keys takes plain products"

# Fastest first, as far as is known without figures: "auto" takes the first that can run.
OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "decode": (
        Implementation("cpp", "a step of a few tokens as one call into compiled code", can.compiled_step),
        Implementation("graph", "a step of a token a row as one CUDA graph", can.cuda_graph),
        Implementation("torch", "the modules, one operation after another"),
    ),
    "linear": (
        Implementation(
            "onednn",
            "uses AVX-512 where torch's own fp32 products do not",
            can.onednn,
            can.without_figure,
            except_for="under autocast products are made in bf16",
            on_auto_except_for="fewer than 16 rows take torch's linear",
        ),
        Implementation(
            "widened",
            "products of bf16 numbers in fp32, for processors without bf16 instructions",
            can.widened,
            can.without_figure,
            on_auto_except_for="fewer than 16 rows take torch's linear",
        ),
        Implementation("torch", "torch's linear"),
    ),
    "delta_rule": (
        Implementation("fla", "fused Triton kernels", can.fla_rule),
        Implementation("cpp", "a memory at a time in a core's caches", can.cpp, except_for=_ONE_TOKEN),
        Implementation(
            "chunked_recompute",
            "chunks of 64 tokens, a few at a time, in torch",
            passed_over=can.for_caches,
            except_for=_ONE_TOKEN,
        ),
        Implementation("chunked", "matrix products over chunks of 64 tokens, in torch", except_for=_ONE_TOKEN),
        Implementation("recurrent", "token loop, the definition"),
    ),
    "simple_gla": (  # the delta rule's place in layers without the delta
        Implementation("chunked", "matrix products over chunks of 64 tokens, in torch", except_for=_ONE_TOKEN),
        Implementation("recurrent", "token loop, the definition"),
    ),
    "causal_conv": (
        Implementation(
            "fla",
            "fused Triton kernel",
            can.fla_conv,
            except_for="a token by itself, and rows that begin with padding, take torch",
        ),
        Implementation(
            "cpp", "one pass over memory", can.cpp, except_for="padded and packed rows and a token by itself take torch"
        ),
        Implementation("torch", "one pass a tap, in torch"),
    ),
    "attention": (
        Implementation("flash", "flash-attn's kernels", can.flash, head_dims=can.flash_heads),
        Implementation(
            "sdpa_flash",
            "torch's fused attention, never its math kernel",
            can.sdpa_flash,
            head_dims=can.sdpa_flash_heads,
        ),
        Implementation(
            "cpp",
            "in tiles, without gradients",
            can.cpp_without_gradients,
            on_auto_except_for=f"fewer than 16 queries take sdpa, and {_ONE_QUERY}",
        ),
        Implementation("sdpa", "torch's fused attention", passed_over=can.math_kernel, on_auto_except_for=_ONE_QUERY),
        Implementation("eager", "shows scores and pattern"),
    ),
    "elementwise": (
        Implementation(
            "triton",
            "a norm, gate or activation as one Triton kernel",
            can.triton_rows,
            except_for="gates of a variant, hooks inside a norm, and traced graphs take torch",
        ),
        Implementation("fla", "the gated norm as one Triton kernel, the others in torch", can.fla, can.rounds_once),
        Implementation(
            "cpp",
            "a norm, gate or activation in one pass over memory",
            can.cpp,
            except_for="gates of a variant, and tensors of unequal dtypes, take torch",
        ),
        Implementation("torch", "step by step, in torch"),
    ),
    "cross_entropy": (
        Implementation("fla", "logits in eight parts, with fused Triton kernels", can.fla, can.unmeasured),
        Implementation("torch", "logits some rows at a time, gradients made with them"),
    ),
    "experts": (
        Implementation(
            "cpp",
            "sorted, multiplied and summed in C++",
            can.cpp,
            can.slower_than_amx,
            on_auto_except_for=_ONE_EXPERT_AT_A_TIME,
        ),
        Implementation(
            "sorted",
            "sorted and summed in C++, with one expert's products after another's in torch's libraries",
            can.cpp,
            on_auto_except_for=_ONE_EXPERT_AT_A_TIME,
        ),
        Implementation(
            "grouped",
            "one grouped matmul for all experts; a few tokens read what they chose",
            can.grouped,
            on_auto_except_for=_ONE_EXPERT_AT_A_TIME,
        ),
        Implementation("loop", "one expert after another, the definition"),
        Implementation(
            "gathered",
            "a copy of every choice's weights, for a few tokens; torch's operators alone, for export",
            passed_over=can.for_export,
        ),
    ),
}


def why_not(operation: str, name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 0) -> str | None:
    """Why the named backend cannot run on such tensors, in a sentence, or None; a `head_dim` of 0 is not checked.

    Raises: ValueError for a backend that the operation does not have.
    """
    name = current_name(name)
    for implementation in OPERATIONS[operation]:
        if implementation.name == name:
            return implementation.cannot(device, dtype, head_dim)
    known = ", ".join(repr(i.name) for i in OPERATIONS[operation])
    raise ValueError(f"{operation} has no backend {name!r}: choose 'auto', {known}.")


def current_name(backend: str) -> str:
    """The name of a backend, also where it is given by the name that it had before release 0.2."""
    if backend != "piecewise":
        return backend
    warn_renamed("The backend 'piecewise'", "'chunked_recompute'", stacklevel=4)
    return "chunked_recompute"


class Like(NamedTuple):
    """What a choice depends on, for `run` in a tensor's place. `head_dim` 0 leaves the width of heads open."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0


def choose(operation: str, backend: str, like: Tensor, *, head_dim: int = 0) -> str:
    """The name of the implementation that runs for a tensor `like` this one.

    Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
    """
    return choose_for(operation, backend, like.device, like.dtype, head_dim=head_dim)


def choose_for(operation: str, backend: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 0) -> str:
    """`choose` for tensors that need not exist."""
    if backend != "auto":
        backend = current_name(backend)
        reason = why_not(operation, backend, device, dtype, head_dim=head_dim)
        if reason is not None:
            raise RuntimeError(f"The {backend!r} backend of {operation} cannot run here: {reason}.")
        return backend
    for implementation in _in_order(operation, device, dtype):
        reason = implementation.unfit(device, dtype, head_dim)
        if reason is None:
            return implementation.name
        if isinstance(reason, Refusal):
            _warn_once(operation, implementation.name, reason)
    raise AssertionError(f"{operation} has no implementation that always runs")


def _in_order(operation: str, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, ...]:
    """The implementations, the fastest first."""
    found = OPERATIONS[operation]
    if device.type != "cpu":
        return found
    by_name = {implementation.name: implementation for implementation in found}
    names = speeds.order(operation, tuple(by_name), dtype, torch.is_grad_enabled())
    return tuple(by_name[name] for name in names)


def run(operation: str, backend: str, like: Tensor | Like, *args: Any, **kwargs: Any) -> Any:
    """Call the implementation that `choose` picks for a tensor `like` this one, or on "auto" a special case.

    Raises: as `choose`.
    """
    if backend == "auto":
        for takes, function in special_cases(operation):
            if takes(*args, **kwargs):
                return function(*args, **kwargs)
    head_dim = like.head_dim if isinstance(like, Like) else 0
    chosen = choose_for(operation.partition(".")[0], backend, like.device, like.dtype, head_dim=head_dim)
    return function_of(operation, chosen)(*args, **kwargs)


@cache
def _warn_once(operation: str, name: str, reason: str) -> None:
    warnings.warn(f"The {name!r} backend of {operation} is not used: {reason}.", stacklevel=4)


@dataclass(frozen=True)
class Explanation:
    """One row of `explain`: what runs for an operation, why, and what would be faster."""

    operation: str
    runs: str
    why: str
    faster: str


def explain_operation(
    operation: str, backend: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 0
) -> Explanation:
    """Say what `choose` picks for such tensors where no gradients are taken, and why nothing faster runs."""
    with torch.no_grad():
        runs = choose_for(operation, backend, device, dtype, head_dim=head_dim)
        why = "named" if backend != "auto" else "fastest that can run here"
        faster: list[str] = []
        for implementation in _in_order(operation, device, dtype):
            if implementation.name == runs:
                break
            reason = implementation.unfit(device, dtype, head_dim)
            faster.append(f"{implementation.name}: {reason or 'choose it or auto'}")
    why = f"{why}: {implementation.why}"
    if device.type == "cpu" and backend == "auto" and len(OPERATIONS[operation]) > 1:
        with torch.no_grad():
            why += f"; {speeds.verdict(operation, dtype, False) or 'no figure for it on this kind of processor'}"
    excepted = implementation.except_for, implementation.on_auto_except_for if backend == "auto" else ""
    why += "".join(f"; {words}" for words in excepted if words)
    with torch.enable_grad():
        reason = why_not(operation, runs, device, dtype, head_dim=head_dim)
        training = choose_for(operation, backend, device, dtype, head_dim=head_dim) if backend == "auto" else runs
    if training != runs:
        why += f"; with gradients, {training}" + (f", as {reason}" if isinstance(reason, Refusal) else "")
    elif reason is not None:
        why += f"; not with gradients: {reason}"
    return Explanation(operation, runs, why, "; ".join(faster) or "-")


_MOVED = ("fla_missing", "flash_module", "generation", "missing", "release", "triton_refused")
__getattr__ = renamed_names(__name__, {name: f"layers.dispatch.availability.{name}" for name in _MOVED})
