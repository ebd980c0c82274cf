"""C++ beside this file, compiled once for this machine and kept in the user's cache folder; its structures."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: in a shared library it makes the whole process flush denormal numbers. Sums are reordered where the
# source says so.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fopenmp-simd", "-pthread", "-shared", "-fPIC")


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int8: 3}


class Mat(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), ("dtype", ctypes.c_int64)]


class Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_scale", "v_scale")),
        *((name, ctypes.c_int64) for name in ("n", "row", "head", "scale_row", "scale_head")),
    ]


def _fields(text: str) -> list[tuple[str, Any]]:
    """Of a C structure: `name` is a matrix, `*name` a pointer, `#name` a whole number."""
    kinds = {"*": ctypes.c_void_p, "#": ctypes.c_int64}
    return [(name.lstrip("*#"), kinds.get(name[0], Mat)) for name in text.split()]


class Layer(ctypes.Structure):
    _fields_ = _fields(
        "#softmax #sparse norm_in norm_post in_qkv in_z in_b in_a conv a_log dt_bias out_norm out "
        "*conv_before *conv_after *memory_before *memory_after #memory_dtype "
        "*tape_inputs *tape_k *tape_u *tape_decay "
        "q q_bias k k_bias v v_bias gate gate_bias o o_bias q_norm k_norm *parts #part_count #kv_dtype #gate_rows "
        "router experts_in experts_out shared_gate shared_up shared_down shared_weight"
    )


class Ends(ctypes.Structure):
    _fields_ = _fields("embedding norm head *ids *hidden *logits #vocab")


class Sizes(ctypes.Structure):
    _fields_ = [
        *_fields(
            "#layers #b #t #width #dtype #heads #kv_heads #head_dim #rotary #zero_centred "
            "#key_heads #value_heads #key_dim #value_dim #taps "
            "#experts #top_k #inner #shared_inner #dense_inner #renormalise"
        ),
        ("eps", ctypes.c_double),
    ]


@cache
def missing() -> str | None:
    """Why compiled code cannot run here, in a sentence without a full stop, or None."""
    try:
        load("decode")
    except RuntimeError as error:
        return str(error)
    return None


@cache
def load(name: str) -> ctypes.CDLL:
    """The library of `layers/NAME.cpp`. Raises: RuntimeError, in a sentence, where it cannot be made."""
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = os.environ.get("CXX") or next((found for x in COMPILERS if (found := shutil.which(x))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (g++ or clang++, or the one that CXX names)")
    flags = (*FLAGS, *(("-mprefer-vector-width=512",) if "AVX512" in torch.backends.cpu.get_cpu_capability() else ()))
    key = hashlib.sha256(repr((source.read_bytes(), compiler, flags, _processor(), torch.__version__)).encode())
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3next" / "native"
    library = place / f"{name}-{key.hexdigest()[:16]}.so"
    try:
        if not library.exists():
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place) as folder:
                fresh = Path(folder) / library.name
                command = [compiler, *flags, str(source), "-o", str(fresh)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
                    raise RuntimeError(f"{compiler} could not compile {source.name} ({lines[0][:200]})")
                fresh.replace(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RuntimeError(f"{library} cannot be made or loaded ({error})") from error


def _processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), platform.processor())
