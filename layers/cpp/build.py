"""Compile the C++ kernels of this folder on first use, keep the result, load it.

They use the instructions of the machine they were compiled on, or those that QWEN3NEXT_CPU names (cpu.py): the file's
name is a digest of sources, compiler, flags, that choice and processor.

They share torch's OpenMP threads: linked without an OpenMP library, they find torch's in the process.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from layers.cpp import cpu
from layers.cpp.signatures import declare

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # a product and a sum are two roundings, as in torch, unless the source says fma
)


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")

MORE_FLAGS = {"decode.cpp": ("-pthread",)}


@cache
def library() -> ctypes.CDLL | str:
    """The kernels, or in a sentence why they cannot be had. Compiled once a machine, which takes some seconds."""
    try:
        return declare(ctypes.CDLL(str(_compiled())))
    except _Unavailable as reason:
        sentence = str(reason)
    except OSError as error:  # found another way to fail: no folder to write to, an OpenMP that is not torch's
        sentence = f"the C++ kernels cannot be loaded ({str(error).splitlines()[0]})"
    warnings.warn(f"On this CPU torch's own operations run, which are slower: {sentence}.", stacklevel=2)
    return sentence


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    found = library()
    return found if isinstance(found, str) else None


class _Unavailable(Exception):
    pass


def _compiled() -> Path:
    """The path of the compiled kernels."""
    if cpu.choice() == "none":
        raise _Unavailable("the environment variable QWEN3NEXT_CPU is none, which turns the C++ kernels off")
    if platform.system() != "Linux":
        raise _Unavailable(f"the C++ kernels are written for Linux, this is {platform.system()}")
    compiler = _compiler()
    flags = [*FLAGS, *cpu.flags(), *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    if os.environ.get("QWEN3NEXT_SANITIZE"):  # `make test-sanitize`, which loads the sanitizers' library first
        flags += SANITIZERS
    sources = sorted(FOLDER.glob("*.cpp"))
    digest = hashlib.sha256()
    version, tools = _run([compiler, "--version"]), f"{' '.join(flags)} {MORE_FLAGS!r}"
    for part in (version, tools, cpu.choice(), cpu.name(), torch.__version__, digest_of_sources()):
        digest.update(part.encode())
    name = f"kernels-{digest.hexdigest()[:16]}.so"
    kept = _folder() / name
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            objects = [str(Path(folder) / source.with_suffix(".o").name) for source in sources]
            running = [
                subprocess.Popen(
                    [compiler, *flags, *MORE_FLAGS.get(source.name, ()), "-c", str(source), "-o", target],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for source, target in zip(sources, objects, strict=True)
            ]
            errors = [process.communicate()[1] for process in running]
            for process, error in zip(running, errors, strict=True):
                if process.returncode:
                    raise _Unavailable(f"{compiler} cannot compile the C++ kernels ({_first_error(error)})")
            _run([compiler, "-shared", *objects, "-o", str(Path(folder) / name)])
            os.replace(Path(folder) / name, kept)  # whole or not at all, also while other processes compile it
    return kept


@cache
def digest_of_sources() -> str:
    """What the kernels are compiled from."""
    digest = hashlib.sha256()
    for file in (*sorted(FOLDER.glob("*.cpp")), *sorted(FOLDER.glob("*.h"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if found := shutil.which(name):
            return found
    raise _Unavailable("no C++ compiler was found; install g++ (or name one in the environment variable CXX)")


def _folder() -> Path:
    """Where compiled kernels are kept: a cache of the user's, else a folder for this process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "qwen3next"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="qwen3next-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="qwen3next-"))


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    except (subprocess.SubprocessError, OSError) as error:
        told = getattr(error, "stderr", None) or str(error)
        raise _Unavailable(f"{command[0]} does not work ({_first_error(told)})") from None


def _first_error(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a word")
