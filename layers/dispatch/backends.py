"""Which implementation of an operation runs here, and why.

"auto" picks the fastest that can run and may fall back. A backend that was named runs or raises.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layers.dispatch.registry import function_of, special_cases
from layers.kernels.cpp import cpu
from layers.kernels.cpp.build import missing


class Refusal(str):
    """Why a kernel that is installed and meant for this device is not used; "auto" warns of it, once."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    `missing` says in a sentence why it cannot run for a tensor, or None, and `head_dims` why not for heads so wide;
    `passed_over` why "auto" leaves it although it can. `except_for` says for which calls something else runs in its
    place, and `on_auto_except_for` for which more where it was not named.
    """

    name: str
    why: str
    missing: Callable[[torch.device, torch.dtype], str | None] = lambda _device, _dtype: None
    passed_over: Callable[[torch.device, torch.dtype], str | None] = lambda _device, _dtype: None
    head_dims: Callable[[int], str | None] = lambda _head_dim: None
    except_for: str = ""
    on_auto_except_for: str = ""

    def cannot(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run for such tensors, whose heads are so wide (0: unknown), or None."""
        return self.missing(device, dtype) or (self.head_dims(head_dim) if head_dim else None)

    def unfit(self, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
        """Why "auto" does not pick it for such tensors, or None."""
        return self.cannot(device, dtype, head_dim) or self.passed_over(device, dtype)


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


@cache
def release(package: str) -> tuple[int, ...] | None:
    """The numbers of an installed package's release, None where it is not installed."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


@cache
def generation(device: torch.device) -> int:
    """The first number of a GPU's compute capability: 8 Ampere and Ada, 9 Hopper, 10 and up Blackwell; 0 if unknown."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


# Triton releases that miscompile the gradients of FLA's gated delta rule on Hopper; FLA raises there (its #640).
WRONG_TRITON = (3, 4, 0), (3, 7, 1)  # from the first, up to the second


def triton_refused(device: torch.device) -> Refusal | None:
    """Why the gradients of FLA's gated delta rule cannot be had with this Triton on this GPU, or None."""
    triton, (first, fixed) = release("triton"), WRONG_TRITON
    if triton is None or generation(device) != 9 or not first <= triton < fixed:
        return None
    return Refusal(
        f"triton {'.'.join(map(str, triton))} miscompiles the gradients of its gated delta rule on Hopper GPUs: "
        f"pip install 'triton>={'.'.join(map(str, fixed))}'"
    )


def _self_check(operation: str, name: str, device: torch.device, dtype: torch.dtype) -> Refusal | None:
    from layers.dispatch.self_check import failed  # which uses what is chosen here

    reason = failed(operation, name, device, dtype)
    return None if reason is None else Refusal(reason)


def _fla_rule(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _fla(device, dtype):
        return reason
    if torch.is_grad_enabled() and (reason := triton_refused(device)):  # the forward is compiled correctly
        return reason
    return _self_check("delta_rule", "fla", device, dtype)


def _fla_conv(device: torch.device, dtype: torch.dtype) -> str | None:
    return _fla(device, dtype) or _self_check("causal_conv", "fla", device, dtype)


# flash-attn's releases 3, 4 and 2, the fastest first, and the generations of GPUs that each is built for.
FLASH = (("flash_attn_interface", (9,)), ("flash_attn.cute", (9, 10)), ("flash_attn", (8, 9, 10, 12)))


@cache
def flash_module(gpu: int) -> str | None:
    """The flash-attn to import for a GPU of that `generation`, 0 for any, or None."""
    for name, generations in FLASH:
        if gpu and gpu not in generations:
            continue
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):  # not there, or built for another torch
            continue
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
            return name
    return None


def _flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-attn's kernels run on CUDA, the tensors are on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "flash-attn's kernels have float16 and bfloat16 alone"
    if flash_module(generation(device)) is None:
        return "no flash-attn for this GPU can be imported: pip install 'qwen3next[flash]', or flash-attn"
    return _self_check("attention", "flash", device, dtype)


def _flash_heads(head_dim: int) -> str | None:
    fits = head_dim <= 256 and head_dim % 8 == 0
    return None if fits else f"flash-attn's heads are multiples of 8 up to 256 wide, not {head_dim}"


def _sdpa_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"torch's fused kernels that it picks from run on CUDA, the tensors are on {device.type}"
    if dtype == torch.float64:
        return "torch's fused kernels have no float64"
    return _self_check("attention", "sdpa_flash", device, dtype)


def _math_kernel(device: torch.device, _dtype: torch.dtype) -> str | None:
    return "it may run torch's math kernel, which holds all scores: name it" if device.type == "cuda" else None


def _rounds_once(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else "it rounds once where the checkpoints' order rounds three times: name it"


def _unmeasured(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return "which of the two is faster has not been measured: name it"


def _for_caches(device: torch.device, _dtype: torch.dtype) -> str | None:
    return (
        None if device.type == "cpu" else f"its pieces are sized for a CPU's caches, the tensors are on {device.type}"
    )


def _onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"it is for float32 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    return None


def _mkl_uses_all() -> bool:
    """MKL leaves AVX-512 unused on processors that are not Intel's; elsewhere there is nothing to gain."""
    return cpu.intel() or not cpu.can("avx512")


MKL_USES_ALL = _mkl_uses_all()


def _mkl_serves(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return "MKL, which torch uses, is as fast on this processor" if MKL_USES_ALL else None


def _cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    return missing()


def _cpp_without_gradients(device: torch.device, dtype: torch.dtype) -> str | None:
    return "it has no gradients: use it under torch.no_grad()" if torch.is_grad_enabled() else _cpp(device, dtype)


def _grouped(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.float32, torch.bfloat16) else f"torch's grouped_mm has no {dtype}"


def _graph(device: torch.device, _dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else f"it is for CUDA, the tensors are on {device.type}"


def _step(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it is for the CPU, the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"it has no {dtype}"
    return missing()


_ONE_TOKEN = "a token by itself takes the token loop"
_ONE_EXPERT_AT_A_TIME = "a token by itself takes one expert after another"
_ONE_QUERY = "one query behind more than 4096 keys takes plain products"

# Fastest first: "auto" takes the first that can run.
OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "decode": (
        Implementation("cpp", "a step of a few tokens as one call into compiled code", _step),
        Implementation("graph", "a step of a token a row as one CUDA graph", _graph),
        Implementation("torch", "the modules, one operation after another"),
    ),
    "linear": (
        Implementation(
            "onednn",
            "uses AVX-512 where torch's own fp32 products do not",
            _onednn,
            _mkl_serves,
            except_for="under autocast torch's linear multiplies in bf16",
            on_auto_except_for="fewer than 16 rows take torch's linear",
        ),
        Implementation("torch", "torch's linear"),
    ),
    "delta_rule": (
        Implementation("fla", "fused Triton kernels", _fla_rule),
        Implementation("cpp", "a memory at a time in a core's caches", _cpp, except_for=_ONE_TOKEN),
        Implementation(
            "piecewise",
            "chunks of 64 tokens, a few at a time, in torch",
            passed_over=_for_caches,
            except_for=_ONE_TOKEN,
        ),
        Implementation("chunked", "matrix products over chunks of 64 tokens, in torch", except_for=_ONE_TOKEN),
        Implementation("recurrent", "token loop, the definition"),
    ),
    "linear_rule": (  # the delta rule's place in layers without the delta
        Implementation("chunked", "matrix products over chunks of 64 tokens, in torch", except_for=_ONE_TOKEN),
        Implementation("recurrent", "token loop, the definition"),
    ),
    "causal_conv": (
        Implementation("fla", "fused Triton kernel", _fla_conv, except_for="padded and packed rows take torch"),
        Implementation(
            "cpp", "one pass over memory", _cpp, except_for="padded and packed rows and a token by itself take torch"
        ),
        Implementation("torch", "one pass a tap, in torch"),
    ),
    "attention": (
        Implementation("flash", "flash-attn's kernels", _flash, head_dims=_flash_heads),
        Implementation("sdpa_flash", "torch's fused attention, never its math kernel", _sdpa_flash),
        Implementation(
            "cpp",
            "in tiles, without gradients",
            _cpp_without_gradients,
            on_auto_except_for=f"fewer than 16 queries take sdpa, and {_ONE_QUERY}",
        ),
        Implementation("sdpa", "torch's fused attention", passed_over=_math_kernel, on_auto_except_for=_ONE_QUERY),
        Implementation("eager", "shows scores and pattern"),
    ),
    "elementwise": (
        Implementation("fla", "the gated norm as one Triton kernel, the others in torch", _fla, _rounds_once),
        Implementation(
            "cpp",
            "a norm, gate or activation in one pass over memory",
            _cpp,
            except_for="gates of a variant, and tensors of unequal dtypes, take torch",
        ),
        Implementation("torch", "step by step, in torch"),
    ),
    "cross_entropy": (
        Implementation("fla", "logits in eight parts, with fused Triton kernels", _fla, _unmeasured),
        Implementation("torch", "logits some rows at a time, gradients made with them"),
    ),
    "experts": (
        Implementation("cpp", "sorted and summed in one pass each", _cpp, on_auto_except_for=_ONE_EXPERT_AT_A_TIME),
        Implementation(
            "grouped",
            "one grouped matmul for all experts; a few tokens read what they chose",
            _grouped,
            on_auto_except_for=_ONE_EXPERT_AT_A_TIME,
        ),
        Implementation("loop", "one expert after another, the definition"),
    ),
}


def why_not(operation: str, name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 0) -> str | None:
    """Why the named backend cannot run on such tensors, in a sentence, or None; `head_dim` 0 leaves that open.

    Raises: ValueError for a backend that the operation does not have.
    """
    for implementation in OPERATIONS[operation]:
        if implementation.name == name:
            return implementation.cannot(device, dtype, head_dim)
    known = ", ".join(repr(i.name) for i in OPERATIONS[operation])
    raise ValueError(f"{operation} has no backend {name!r}: choose 'auto', {known}.")


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
        reason = why_not(operation, backend, device, dtype, head_dim=head_dim)
        if reason is not None:
            raise RuntimeError(f"The {backend!r} backend of {operation} cannot run here: {reason}.")
        return backend
    for implementation in OPERATIONS[operation]:
        reason = implementation.unfit(device, dtype, head_dim)
        if reason is None:
            return implementation.name
        if isinstance(reason, Refusal):
            _warn_once(operation, implementation.name, reason)
    raise AssertionError(f"{operation} has no implementation that always runs")


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
        for implementation in OPERATIONS[operation]:
            if implementation.name == runs:
                break
            reason = implementation.unfit(device, dtype, head_dim)
            faster.append(f"{implementation.name}: {reason or 'choose it or auto'}")
    why = f"{why}: {implementation.why}"
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
