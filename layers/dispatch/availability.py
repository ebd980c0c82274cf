"""What can run on this machine. For what cannot run, a function returns the reason as a sentence.

Each condition takes the device and dtype of an operation's tensors and returns None or the reason.
"""

import importlib
import importlib.metadata
import importlib.util
import re
from functools import cache

import torch

from layers.cpp import cpu as processor
from layers.cpp.build import missing
from layers.dispatch import self_check, speeds
from layers.dispatch.registry import parts_of


class Refusal(str):
    """Why a kernel that is installed and made for this device is not used; "auto" warns of it once."""


@cache
def fla_missing() -> str | None:
    """Why flash-linear-attention's kernels cannot be imported here, or None."""
    for module, package in (("triton", "triton"), ("fla", "flash-linear-attention")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'qwen3next[cuda]'"
    return None


def fla(device: torch.device, dtype: torch.dtype) -> str | None:
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


def _self_check(
    operation: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 0
) -> Refusal | None:
    reason = self_check.failed(operation, name, device, dtype, head_dim)
    return None if reason is None else Refusal(reason)


def fla_rule(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := fla(device, dtype):
        return reason
    if torch.is_grad_enabled() and (reason := triton_refused(device)):  # the forward is compiled correctly
        return reason
    return _self_check("delta_rule", "fla", device, dtype)


def fla_conv(device: torch.device, dtype: torch.dtype) -> str | None:
    return fla(device, dtype) or _self_check("causal_conv", "fla", device, dtype)


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


def flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-attn's kernels run on CUDA, the tensors are on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "flash-attn's kernels have float16 and bfloat16 alone"
    if flash_module(generation(device)) is None:
        return "no flash-attn for this GPU can be imported: pip install 'qwen3next[flash]', or flash-attn"
    return None


def flash_heads(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if head_dim > 256 or head_dim % 8:
        return f"flash-attn's heads are multiples of 8 up to 256 wide, not {head_dim}"
    return _self_check("attention", "flash", device, dtype, head_dim)


def sdpa_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"torch's fused kernels that it picks from run on CUDA, the tensors are on {device.type}"
    if dtype == torch.float64:
        return "torch's fused kernels have no float64"
    return None


def sdpa_flash_heads(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return _self_check("attention", "sdpa_flash", device, dtype, head_dim)


def math_kernel(device: torch.device, _dtype: torch.dtype) -> str | None:
    return "it may run torch's math kernel, which holds all scores: name it" if device.type == "cuda" else None


def rounds_once(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else "it rounds once where the checkpoints' order rounds three times: name it"


def unmeasured(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return "which of the two is faster has not been measured: name it"


def for_caches(device: torch.device, _dtype: torch.dtype) -> str | None:
    return (
        None if device.type == "cpu" else f"its pieces are sized for a CPU's caches, the tensors are on {device.type}"
    )


def for_export(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return "it copies the weights of every choice: name it for a step that is exported"


def onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"it is for float32 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    return None


def widened(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"it is for bfloat16 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    return None


def without_figure(_device: torch.device, dtype: torch.dtype) -> str | None:
    """Why another library is not picked without a measurement: on some processors torch's own is as fast."""
    if speeds.known("linear", dtype, torch.is_grad_enabled()):
        return None
    return "no figure says that it is faster on this processor: `qwen3next tune` measures it"


def cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    return missing()


@torch.compiler.assume_constant_result
def _has_amx() -> bool:
    return processor.can("amx")


def slower_than_amx(_device: torch.device, dtype: torch.dtype) -> str | None:
    """Why our products of experts are not picked in bf16 on a processor with AMX, unless measured there."""
    if dtype != torch.bfloat16 or not _has_amx():
        return None
    if speeds.measured("experts", "cpp", dtype, torch.is_grad_enabled()):
        return None
    return "its products do not use AMX: `qwen3next tune` measures whether it is faster all the same"


def cpp_without_gradients(device: torch.device, dtype: torch.dtype) -> str | None:
    return "it has no gradients: use it under torch.no_grad()" if torch.is_grad_enabled() else cpp(device, dtype)


def grouped(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.float32, torch.bfloat16) else f"torch's grouped_mm has no {dtype}"


def one_token_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of a decoding step cannot run, or None."""
    if dtype == torch.float16:
        return "its kernels have no float16"
    return _own_triton("one_token", device, dtype)


def triton_rows(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of norms, gates and activations cannot run, or None."""
    return _own_triton("elementwise", device, dtype)


def _own_triton(operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of layers/triton/ for an operation of several functions cannot run, or None."""
    if device.type != "cuda":
        return f"its kernels run on CUDA, the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'qwen3next[cuda]'"
    if 0 < generation(device) < 8:
        return "its kernels are for GPUs of compute capability 8.0 and higher"
    reasons = (_self_check(f"{operation}.{part}", "triton", device, dtype) for part in parts_of(operation, "triton"))
    return next((reason for reason in reasons if reason is not None), None)


def cuda_graph(device: torch.device, _dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else f"it is for CUDA, the tensors are on {device.type}"


def compiled_step(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it is for the CPU, the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"it has no {dtype}"
    return missing()
