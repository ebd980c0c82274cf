"""Shared parts of measurements: description and limits of the machine, peak memory, processes, result files."""

import ctypes
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from layers.linear import linear
from qwen3next.files.atomic import fresh_file

HERE = Path(__file__).parent


def machine() -> dict[str, str]:
    """Machine, versions, commit and date, to be written with every result."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        commit = run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    gpu = gpu_name()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {gpu}",
        "versions": f"torch {torch.__version__}, transformers {_release('transformers')}",
    }


def gpu_name() -> str:
    """The first GPU's name. Asked of the driver's own program: torch would take memory of the device for the answer."""
    if not torch.cuda.is_available():
        return "no GPU"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []
    return names[0].strip() if names and names[0].strip() else torch.cuda.get_device_name()


def _release(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0]}" if names else platform.machine()


def read_bandwidth(device: torch.device | str = "cpu", *, of: torch.Tensor | None = None) -> float:
    """Bytes per second of memory reads: the best of a few sums over 512 MiB, or over `of`."""
    x = random_bytes(device) if of is None else of
    return x.nbytes / _best(lambda: x.sum(), 5, 8 if x.device.type == "cuda" else 1)


def random_bytes(device: torch.device | str = "cpu") -> torch.Tensor:
    """512 MiB of random data; equal pages could be merged into one page, which then stays in the CPU caches."""
    return torch.rand(2**27, device=device)


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Floating-point operations per second of a large matrix product: the best of a few, with the faster library."""
    n, calls = (8192, 8) if torch.device(device).type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    with torch.no_grad():
        return 2 * n**3 / _best(lambda: linear(a, b), 5, calls)


def machine_can(dtype: torch.dtype, of: torch.Tensor) -> dict[str, float]:
    """Both limits of the CPU now; other work on the machine or its host may change them."""
    return {"flops_per_second": matmul_rate(dtype), "read_bytes_per_second": read_bandwidth(of=of)}


def _best(run: Any, times: int, calls: int = 1) -> float:
    """Seconds of a call: the best of a few times, each with so many calls between two waits for the device."""

    def several() -> None:
        for _ in range(calls):
            run()

    several()
    return min(seconds_of(several) for _ in range(times)) / calls


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Peak:
    """Peak memory in bytes above the level at the start; −1 if unknown."""

    nbytes: int = -1


def give_back() -> None:
    """Return free memory of the allocator to the system, so that the next run's memory can be measured (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak memory inside the block: of the GPU if there is one, else resident memory (Linux)."""
    found = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.nbytes = torch.cuda.max_memory_allocated() - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = _status("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.nbytes = _status("VmHWM") - before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def in_own_process(module: str, job: Mapping[str, Any], most_seconds: float) -> dict[str, Any]:
    """Run `python -m MODULE --worker` with a job as JSON, and return the JSON that it prints.

    A separate process has its own peak memory. Returns {"failed": reason} if the process fails or exceeds the time.
    """
    command = [sys.executable, "-m", module, "--worker"]
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=most_seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {most_seconds:.0f} s"}
    if done.returncode < 0:
        return {"failed": "out of memory" if done.returncode == -9 else f"killed by signal {-done.returncode}"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return {"failed": last[0] if last else f"status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def seconds_told(run: Callable[[], object]) -> float:
    """Seconds of one call; of one that returns a float, that number, which it measured itself."""
    told: list[object] = []
    took = seconds_of(lambda: told.append(run()))
    return told[0] if isinstance(told[0], float) else took


def write_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a .png file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with fresh_file(path) as fresh:
        figure.savefig(fresh, format="png", dpi=120)


def write_results(out: Path, content: Mapping[str, Any], markdown: str) -> None:
    """Write OUT.json and OUT.md, each atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (out.with_suffix(".json"), json.dumps(content, indent=2) + "\n"),
        (out.with_suffix(".md"), markdown),
    ):
        with fresh_file(path) as fresh:
            fresh.write_text(text, encoding="utf-8")
