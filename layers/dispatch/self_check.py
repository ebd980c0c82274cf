"""Compare a fast kernel with its definition at its first use on a GPU, and refuse it if they differ.

A miscompiled kernel raises no error. A check runs on small inputs, once in a process for each kernel, GPU, dtype and
width of attention heads, and once more with gradients if they are enabled. QWEN3NEXT_SELF_CHECK=0 skips all checks.
"""

import os
from importlib import metadata

import torch
from torch import Tensor

from layers.dispatch.registry import case_of, definition_of

# Relative error of the worst of all results in the Frobenius norm; a wrong kernel is off by about 1. Tensor cores may
# round fp32 to tf32, which has 11 bits; bf16 has 8.
BOUND = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
PACKAGES = ("torch", "triton", "flash-linear-attention", "fla-core", "flash-attn", "flash-attn-3", "flash-attn-4")

Key = tuple[str, str, torch.device, torch.dtype, int, bool]  # as the arguments of `checked`
_results: dict[Key, str | None] = {}
_running = False


def failed(operation: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """What is wrong with this kernel, in a sentence that names the releases; None if nothing, or if not checked."""
    key = (operation, name, device, dtype, head_dim, torch.is_grad_enabled())
    if key in _results:
        return _results[key]
    if os.environ.get("QWEN3NEXT_SELF_CHECK") == "0" or _running or torch.compiler.is_compiling():
        return None
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    return checked(*key)


def checked(
    operation: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool
) -> str | None:
    """Run the case of a kernel by it and, in fp32, by the definition; say what is wrong, or None.

    Raises: TimeoutError where a time limit of the caller passes meanwhile, which says nothing of the kernel.
    """
    global _running
    key = (operation, name, device, dtype, head_dim, gradients)
    if key in _results:
        return _results[key]
    case, definition = case_of(operation, name), definition_of(operation)
    assert case is not None, f"{operation} by {name!r} has no case: register it with checked_by="
    _running = True
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
            expected = case(definition, device, dtype if dtype not in BOUND else torch.float32, head_dim)
            found = case(name, device, dtype, head_dim)
        worst = max(_apart(a, b) for a, b in zip(found, expected, strict=True))
        wrong = "" if worst <= BOUND.get(dtype, 1e-2) else f"is off by {worst:.0%} from the definition"
    except TimeoutError:
        raise
    except torch.OutOfMemoryError:  # not the kernel's fault
        return None
    except Exception as error:  # whatever a kernel raises is a reason not to use it
        wrong = f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        _running = False
    heads = f" with heads of {head_dim}" if head_dim else ""
    what = f"{operation}{' with gradients' if gradients else ''} in {str(dtype).removeprefix('torch.')}{heads}"
    sentence = f"checked here, {what} {wrong} ({_releases()}); QWEN3NEXT_SELF_CHECK=0 uses it all the same"
    _results[key] = sentence if wrong else None
    return _results[key]


def _apart(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, infinite where anything is not a number."""
    error = ((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20)).item()
    return error if error == error else float("inf")


def _releases() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
