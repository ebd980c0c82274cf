"""Bundle the packages that a GPU machine without a network lacks, in one file that is small enough to carry.

    python -m recipes.gpu_bundle OUT.txz                  about three minutes; needs pip's index, xz and strip

The machine is Linux x86-64 with Python 3.12, torch 2.11 for CUDA 13 (with triton 3.6), transformers 5.17, numpy, pytest
and nvcc 13. The bundle has flash-linear-attention, a Triton whose gradients are right on Hopper, and the small packages
that the project imports. Triton's profilers and its copies of NVIDIA's programs are left out; the machine's own ptxas
is used. On that machine, in the checkout:

    site=$(mktemp -d); tar xJf OUT.txz -C $site; . $site/env.sh
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import tyro

from qwen3next.files.atomic import fresh_file
from qwen3next.files.sizes import binary
from recipes import codebase

ROOT = codebase.ROOT
MOST = 64 * 2**20  # bytes
# What is bundled, by the names of its distributions, with a release where it matters; and the modules in it.
BUNDLED = {
    "triton==3.7.1": ("triton",),
    "fla-core==0.6.0": ("fla",),
    "flash-linear-attention==0.6.0": ("fla",),
    "einops": ("einops",),
    "jaxtyping": ("jaxtyping",),
    "wadler-lindig": ("wadler_lindig",),
    "beartype": ("beartype",),
    "tyro": ("tyro",),
    "docstring-parser": ("docstring_parser",),
    "typeguard": ("typeguard",),
}
# What the machine has, of what the project and the bundled packages import. Those in the second and third line are
# there because torch and transformers require them.
TARGET = {
    "torch", "transformers", "numpy", "pytest",
    "jinja2", "typing_extensions", "setuptools",
    "safetensors", "tokenizers", "huggingface_hub", "rich",
}  # fmt: skip
# Imported inside functions that the check and its tests on a GPU do not call.
OPTIONAL = {"datasets", "llama_cpp", "llguidance", "matplotlib", "pyarrow"}
ENTRIES = ("recipes/gpu_check.py", "recipes/gpu/*.py", "tests/conftest.py", "tests/gpu/*.py")
# Functions that import a module named by a string, and which of their arguments that is.
BY_STRING = {"importorskip": 0, "import_module": 0, "install_import_hook": 1}
TEST_FOLDERS = ("tests", "tests/layers", "tests/decoding", "tests/checkpoints", "tests/commands", "tests/recipes")
# Of Triton: programs that the machine has, and the profilers with their libraries.
PRUNED = re.compile(
    r"triton/(backends/nvidia/bin/(ptxas|ptxas-blackwell|nvdisasm|cuobjdump)$|backends/nvidia/lib/cupti/"
    r"|_C/libproton\.so$|instrumentation/.*\.so$|profiler/)"
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
ENVIRONMENT = """\
# Source this in bash, in a checkout: . SITE/env.sh
export PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd):$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_PTXAS_PATH="$(command -v ptxas || echo /usr/local/cuda/bin/ptxas)"
export TRITON_PTXAS_BLACKWELL_PATH="$TRITON_PTXAS_PATH"
"""


@dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
        out: the file, with the ending .txz.
        python_version: of the machine.
    """

    out: tyro.conf.Positional[Path]
    python_version: str = "3.12"


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules that a file imports when it is imported; with `lazy`, those that it imports inside functions too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            place = BY_STRING.get(ast.unparse(node.func).rpartition(".")[2], 99)
            if place < len(node.args) and isinstance(node.args[place], ast.Constant):
                yield ast.literal_eval(node.args[place])
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if lazy or not inside:
            waiting += ast.iter_child_nodes(node)


def needed(*, lazy: bool = False, entries: Iterable[str] = ENTRIES) -> set[str]:
    """Third-party modules, by their first names, that the check and the tests on a GPU import, directly or not."""
    ours, found = _our_files(), set()
    waiting = [path for pattern in entries for path in sorted(ROOT.glob(pattern))]
    seen = set(waiting)
    while waiting:
        for name in imports(waiting.pop(), lazy=lazy):
            parts = name.split(".")
            files = [ours[m] for i in range(len(parts)) if (m := ".".join(parts[: i + 1])) in ours]
            if not files and parts[0] not in sys.stdlib_module_names:
                found.add(parts[0])
            waiting += [file for file in files if file not in seen]
            seen |= set(files)
    return found


def _our_files() -> dict[str, Path]:
    """Modules of the project, and those that tests import by name."""
    found = codebase.modules()
    for folder in TEST_FOLDERS:
        found |= {path.stem: path for path in sorted((ROOT / folder).glob("*.py"))}
    return found


def uncovered() -> set[str]:
    """Third-party modules that are imported and neither in the bundle nor on the machine."""
    there = TARGET | {module for modules in BUNDLED.values() for module in modules}
    return (needed() - there) | (needed(lazy=True) - there - OPTIONAL)


def required(lines: Iterable[str], python_version: str) -> set[str]:
    """The distributions that requirements, such as "tyro>=1; python_version < '4'", name on the machine."""
    from packaging.requirements import Requirement

    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": ""}
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(environment)]
    return {canonical(r.name) for r in wanted}


def canonical(name: str) -> str:
    """A distribution's name in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>~! ]", name)[0]).lower()


def download(folder: Path, python_version: str) -> list[Path]:
    """The wheels. Raises: ValueError where pip finds one not, or one requires a package that is not there."""
    tag = python_version.replace(".", "")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", tag, "--implementation", "cp", "-d", str(folder)]
    command += [x for platform in PLATFORMS for x in ("--platform", f"{platform}_x86_64")]
    if subprocess.run([*command, *BUNDLED], check=False).returncode:
        raise ValueError("pip could not download the wheels: see its message above.")
    wheels = sorted(folder.glob("*.whl"))
    known = {canonical(name) for name in (*BUNDLED, *TARGET)}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            lines = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
        missing = required(lines, python_version) - known
        if missing:
            raise ValueError(f"{wheel.name} requires {', '.join(sorted(missing))}: add it to BUNDLED or TARGET.")
    return wheels


def unpack(wheels: list[Path], site: Path) -> None:
    """The wheels' files, without what is pruned, and env.sh."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not PRUNED.match(name):
                    archive.extract(name, site)
    for library in site.glob("triton/_C/libtriton*.so"):
        subprocess.run(["strip", "-s", str(library)], check=True)
    (site / "env.sh").write_text(ENVIRONMENT, encoding="utf-8")


def main(options: Options) -> None:
    """Download, prune, pack. Raises: ValueError for what is missing, or a bundle that is too large."""
    for program in ("xz", "strip", "tar"):
        if shutil.which(program) is None:
            raise ValueError(f"{program} is not installed here: install it to make a bundle.")
    if missing := uncovered():
        raise ValueError(f"The check imports {', '.join(sorted(missing))}: add it to BUNDLED or TARGET.")
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site = Path(temporary) / "wheels", Path(temporary) / "site"
        wheels.mkdir()
        site.mkdir()
        unpack(download(wheels, options.python_version), site)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with fresh_file(options.out) as fresh:
            names = sorted(path.name for path in site.iterdir())
            pack = ["tar", "--use-compress-program=xz -6 -T0", "-cf", str(fresh), "-C", str(site), *names]
            subprocess.run(pack, check=True)
            if (size := fresh.stat().st_size) > MOST:
                raise ValueError(f"The bundle has {binary(size)}, more than {binary(MOST)}: prune more.")
    print(f"{options.out}: {binary(size)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as mistake:
        sys.exit(str(mistake))
