"""`qwen3next doctor`: what this machine can run, what is missing, and the line that brings it."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from layers.cpp import build, cpu
from layers.dispatch import speeds
from qwen3next import presets
from qwen3next.commands.common import print_json, show
from qwen3next.explain import explain
from qwen3next.files.sizes import binary
from qwen3next.inspect import on_meta

# Packages and their oldest versions, by extra of pyproject.toml, and what the extra brings. A test compares the two.
REQUIRED = {
    "torch": "2.11", "numpy": "", "safetensors": "", "jaxtyping": "", "tokenizers": "", "jinja2": "3.1.6", "tyro": "",
    "rich": "",
}  # fmt: skip
EXTRAS = {
    "hf": ("transformers' classes: generate, Trainer, PEFT, TRL, lm-eval", {"transformers": "5.23"}),
    "serve": (
        "qwen3next serve",
        {"starlette": "1.0", "uvicorn": "0.30", "pydantic": "2.8", "prometheus-client": "0.20", "llguidance": "1.9"},
    ),
    "grammar": ("answers that match a JSON schema, a regular expression or a grammar", {"llguidance": "1.9"}),
    "train": ("pictures, logs and parquet files in recipes", {"matplotlib": "", "tensorboard": "", "pyarrow": ""}),
    "cuda": ("Triton kernels on an NVIDIA GPU", {"flash-linear-attention": "0.6", "triton": "3.7.1"}),
    "flash": ("flash-attn on an NVIDIA GPU", {"flash-attn-4": "4.0.0b36"}),
}
# Environment variables that this package reads; docs/command_line.md says what each does.
VARIABLES = (
    "QWEN3NEXT_CPU", "QWEN3NEXT_PRECISION", "QWEN3NEXT_TUNED", "QWEN3NEXT_SELF_CHECK", "QWEN3NEXT_API_KEY",
    "QWEN3NEXT_SANITIZE", "XDG_CACHE_HOME", "CXX", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "HF_TOKEN",
    "HF_HUB_OFFLINE",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "ok"; "missing", what could be had here; "off", what was turned off or this machine has no use for;
            "broken", what is there and does not work.
        bring: the line that mends it, or "".
    """

    what: str
    state: str
    found: str
    bring: str = ""


def doctor(json: bool = False) -> int:
    """Print what this machine can run, what is missing, and the one line that brings it.

    Nothing is installed or changed, except that the C++ kernels are compiled if they never were.
    Exit status: 0, or 1 if something that is installed does not work.

    $ qwen3next doctor
    $ qwen3next doctor --json | python -m json.tool

    Args:
        json: print one JSON object.
    """
    findings = list(examine())
    broken = any(one.state == "broken" for one in findings)
    if json:
        print_json({"healthy": not broken, "findings": [asdict(one) for one in findings]})
        return int(broken)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("what", "state", "found", "what brings it"):
        table.add_column(header, overflow="fold")
    for one in findings:
        table.add_row(*map(Text, (one.what, one.state, one.found, one.bring)))  # brackets are no markup
    show(table)
    return int(broken)


def examine() -> Iterator[Finding]:
    """All findings, the machine first."""
    yield Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield _packages("qwen3next", "the model and this command", REQUIRED, required=True)
    yield Finding("processor", "ok", f"{cpu.processors()} usable, {_instructions()}; {_memory()}")
    kernels = _kernels()
    yield kernels
    gpu = _gpu()
    yield gpu
    yield _implementations()
    yield _speeds(compiled=kernels.state == "ok")
    for extra, (brings, packages) in EXTRAS.items():
        if extra in ("cuda", "flash") and gpu.state != "ok":
            yield Finding(f"[{extra}]", "off", f"{brings}: there is none here")
        else:
            yield _packages(f"[{extra}]", brings, packages)
    yield _cache_folder()
    given = [name for name in VARIABLES if name in os.environ]
    shown = ", ".join(name if "KEY" in name or "TOKEN" in name else f"{name}={os.environ[name]}" for name in given)
    yield Finding("environment variables", "ok", shown or "none is set")


def _packages(what: str, brings: str, packages: dict[str, str], *, required: bool = False) -> Finding:
    """Whether these distributions are installed, in versions that are new enough."""
    name = "qwen3next" if required else f"qwen3next{what}"
    line = f'{sys.executable} -m pip install --upgrade "{name}"'
    found, absent, old = [], [], []
    for package, oldest in packages.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            absent.append(package)
            continue
        found.append(f"{package} {version}")
        if not _at_least(version, oldest):
            old.append(f"{package} {version} is older than {oldest}")
    if old:
        return Finding(what, "broken", "; ".join(old), line)
    if absent:
        return Finding(what, "missing", f"{brings}; not installed: {', '.join(absent)}", line)
    return Finding(what, "ok", f"{brings}; {', '.join(found)}")


def _at_least(version: str, oldest: str) -> bool:
    def numbers(text: str) -> list[int]:
        release = text.partition("+")[0].split(".")
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in release]

    return numbers(version) >= numbers(oldest) if oldest else True


def _instructions() -> str:
    levels = [level for level in cpu.LEVELS if cpu.executes(level)]
    chosen = cpu.choice()
    return f"{platform.machine()} {levels[-1] if levels else ''}".rstrip() + (
        "" if chosen == "native" else f", bounded by QWEN3NEXT_CPU={chosen}"
    )


def _memory() -> str:
    try:
        return f"{binary(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _kernels() -> Finding:
    reason = build.missing()
    what = "C++ kernels"
    if reason is None:
        return Finding(what, "ok", "compiled for this processor; steps, layers and training use them")
    if "QWEN3NEXT_CPU" in reason:
        return Finding(what, "off", reason, "unset QWEN3NEXT_CPU")
    if "no C++ compiler" in reason:
        return Finding(what, "missing", "without them torch's operations run, which are slower", "apt-get install g++")
    if "written for Linux" in reason:
        return Finding(what, "off", reason)
    return Finding(what, "broken", reason, "CXX=/path/to/another/compiler qwen3next doctor")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("NVIDIA GPU", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch cannot use its driver"
        bring = (
            "install a torch with CUDA: https://pytorch.org/get-started" if torch.version.cuda is None else "nvidia-smi"
        )
        return Finding("NVIDIA GPU", "broken", why, bring)
    return Finding("NVIDIA GPU", "off", "there is none: everything runs on the processor")


def _implementations() -> Finding:
    """What "auto" picks for a small model."""
    rows = explain(on_meta(presets.tiny()), device="auto", dtype="float32")
    runs = ", ".join(f"{row.operation} {row.runs}" for row in rows)
    return Finding("implementations", "ok", runs, "qwen3next explain DIR")


def _speeds(*, compiled: bool) -> Finding:
    path = speeds.tuned_path()
    if path.exists():
        return Finding("measured speeds", "ok", f"of this machine, in {path}")
    if not compiled:
        return Finding("measured speeds", "off", "there is nothing to choose from without C++ kernels")
    return Finding("measured speeds", "missing", "shipped figures for this kind of processor decide", "qwen3next tune")


def _cache_folder() -> Finding:
    """Where compiled kernels, figures and prefixes of documents are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3next"
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(parent, os.W_OK):
        bring = "export XDG_CACHE_HOME=/a/folder/of/yours"
        return Finding(
            "cache folder", "broken", f"{parent} cannot be written to: kernels are compiled every time", bring
        )
    return Finding("cache folder", "ok", f"{folder}, {binary(shutil.disk_usage(parent).free)} free")
