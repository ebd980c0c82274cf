"""What measurements have in common: the machine in words and its own limits in the same run, memory, files."""

import ctypes
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3next.atomic import fresh_file


def machine() -> dict[str, str]:
    """What ran where, to be written beside every number."""
    import transformers

    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
        commit = run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {gpu}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0]}" if names else platform.machine()


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes a second at which memory is read, the best of a few sums over 512 MiB."""
    x = torch.rand(2**27, device=device)  # not constant: equal pages may be one in memory
    return x.nbytes / _best(lambda: x.sum(), 5)


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Floating-point operations a second of a large matrix product, the best of a few."""
    n = 4096 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    return 2 * n**3 / _best(lambda: a @ b, 5)


def _best(run: Any, times: int) -> float:
    run()
    found = []
    for _ in range(times):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def synchronize() -> None:
    """Wait until the GPU, where there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Peak:
    """Bytes by which memory rose at most over what it was at the beginning; −1 where that cannot be known."""

    nbytes: int = -1


def give_back() -> None:
    """Let the allocator return what is free, so that what a run takes is seen (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the most memory taken inside the block: of the GPU where there is one, else resident (Linux)."""
    found = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.nbytes = torch.cuda.max_memory_allocated() - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
        before = _status("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.nbytes = _status("VmHWM") - before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def write_results(out: Path, content: Mapping[str, Any], markdown: str) -> None:
    """OUT.json and OUT.md, each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (out.with_suffix(".json"), json.dumps(content, indent=2) + "\n"),
        (out.with_suffix(".md"), markdown),
    ):
        with fresh_file(path) as fresh:
            fresh.write_text(text, encoding="utf-8")
