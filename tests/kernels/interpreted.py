"""Triton's interpreter, made to compute as a GPU in bf16: as it is, it truncates casts and multiplies bit patterns.

Importing this mends it. Triton must have been imported with TRITON_INTERPRET set, as `make test-kernels` does.
"""

import numpy as np
import triton.language as tl
from triton.language.standard import sum as one_of_triton_s
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

if isinstance(one_of_triton_s, JITFunction):
    raise RuntimeError(
        "Triton was imported without its interpreter: run `make test-kernels`, which sets TRITON_INTERPRET."
    )

_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def _as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _as_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _convert_float(data, source, target, rounding_mode):
    if (source, target) == (tl.bfloat16, tl.float32):
        return _as_float(data)
    if (source, target) == (tl.float32, tl.bfloat16):
        return _as_bfloat16(data)
    return _convert(data, source, target, rounding_mode)


def _create_dot(self, a, b, d, *options):
    if a.dtype.scalar != tl.bfloat16:
        return _dot(self, a, b, d, *options)
    product = np.matmul(_as_float(a.data), _as_float(b.data), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
