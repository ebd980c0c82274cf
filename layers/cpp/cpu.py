"""What this processor can do, or what QWEN3NEXT_CPU says it can: everything that depends on the processor asks here.

QWEN3NEXT_CPU is one of:
    native: what the processor has. The default.
    none: no compiled kernels, as on a machine without a compiler; torch is left as it is.
    avx2, avx512, avx512_bf16: our kernels are compiled for these instructions, torch is bounded by them, and what is
        picked on "auto" is what is picked on a processor that has no more.
    amx: what is picked is what is picked on a processor with AMX. Nothing is bounded, so that AMX itself runs only
        where the processor has it; our own kernels have no AMX instructions.
"""

import math
import os
import platform
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# What each level needs beyond the one before it, in the words of /proc/cpuinfo.
LEVELS = {
    "avx2": ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"),
    "avx512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}
X86 = ("x86_64", "AMD64")
CHOICES = ("none", *LEVELS, "native")
# For GCC and Clang; x86-64-v3 and -v4 are the AVX2 and AVX-512 generations.
ARCHITECTURE = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16"),
}
# What bounds ATen, oneDNN and MKL. Each reads its variable once, before its first operation.
TORCH = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def choice() -> str:
    """QWEN3NEXT_CPU. Raises: ValueError for an unknown choice, or one that this processor cannot execute."""
    wanted = os.environ.get("QWEN3NEXT_CPU") or "native"
    if wanted not in CHOICES:
        raise ValueError(f"QWEN3NEXT_CPU is {wanted!r}: choose {', '.join(CHOICES[:-1])} or {CHOICES[-1]}.")
    if wanted not in possible():
        able = " or ".join(possible())
        raise ValueError(f"QWEN3NEXT_CPU is {wanted!r}, which this processor cannot execute: choose {able}.")
    return wanted


def can(level: str) -> bool:
    """Whether the processor, or the one that was chosen, has a level's instructions."""
    chosen = choice()
    if chosen not in LEVELS:
        return executes(level)
    return list(LEVELS).index(level) <= list(LEVELS).index(chosen)


def kind() -> str:
    """The highest level that the processor, or the one that was chosen, has; "other" for none of them."""
    return next((level for level in reversed(LEVELS) if can(level)), "other")


def name() -> str:
    """The processor's name and its features, for what is kept per machine; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted(set(re.findall(r"^(?:flags|Features|model name)\b.*$", text, re.MULTILINE))))


def processors(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processors this process may keep busy: those it is bound to, or fewer by the quota of its container.

    Args:
        cgroup: the folder in which Linux tells the quota, of version 2 (cpu.max) or 1.
    """
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        allowed = math.ceil(int(quota) / int(period)) if int(quota) > 0 else able
    except (OSError, ValueError):  # no quota: "max", or no such file
        allowed = able
    return max(1, min(able, allowed))


def executes(level: str) -> bool:
    """Whether this processor itself has a level's instructions, whatever was chosen."""
    names = list(LEVELS)
    features = _features()
    return all(feature in features for name in names[: names.index(level) + 1] for feature in LEVELS[name])


def possible() -> list[str]:
    """The choices that can be made on this machine."""
    x86 = platform.machine() in X86
    return [name for name in CHOICES if name not in LEVELS or (x86 and (name == "amx" or executes(name)))]


def flags() -> tuple[str, ...]:
    """What the compiler is told about the processor."""
    return ARCHITECTURE.get(choice(), ("-march=native",))


def bound_torch() -> None:
    """Set the variables that keep torch to the choice, in this process and its children.

    It acts on what torch has not run yet, so `import layers` does it, and has to come before torch is used. A wrong
    choice sets nothing here. `choice` raises at its first use, where the caller can report it; an import cannot.
    """
    with suppress(ValueError):
        os.environ.update(TORCH.get(choice(), {}))


def wait_briefly() -> None:
    """Have OpenMP's threads sleep soon at a barrier instead of spinning; what the user has set stays.

    A spinning thread keeps the one it waits for from running where other processes are busy. OpenMP reads the variable
    when torch is loaded, so it acts if `layers` or `qwen3next` is imported before torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@cache
def _features() -> frozenset[str]:
    """The features, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return _told_by_torch()
    features = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return frozenset(features[1].split() if features else ())


def _told_by_torch() -> frozenset[str]:
    """The features of a processor that is not under Linux, as far as torch knows those that decide the precision."""
    import torch

    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found = [level for level in ("avx512_bf16", "amx") if able.get({"amx": "amx_bf16"}.get(level, level))]
    last = list(LEVELS).index(found[-1]) if found else -1
    return frozenset(feature for level in list(LEVELS)[: last + 1] for feature in LEVELS[level])
