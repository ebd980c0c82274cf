"""Install the wheel in new environments and use it: python tests/install/matrix.py (make test-install).

Each case makes an environment in a temporary folder, installs the wheel with pip, uv or pipx, and runs check.py there,
which uses the model and the command. A line is printed and a file written as each case ends; cases that need what this
machine lacks are named. docs/installation.md shows results.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PINNED = next(
    line.strip()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line[:7] == "torch=="
)


@dataclass
class Case:
    """One way to install.

    Attributes:
        tool: "pip", "uv" or "pipx".
        python: the interpreter's command.
        torch: what is asked of torch, such as "torch==2.13.0".
        more: further requirements.
        compiler: whether a C++ compiler is to be found.
    """

    name: str
    tool: str = "pip"
    python: str = sys.executable
    torch: str = PINNED
    more: tuple[str, ...] = ()
    compiler: bool = True


def cases(given: argparse.Namespace) -> list[Case]:
    found = [
        Case("pip"),
        Case("uv", tool="uv"),
        Case("pipx", tool="pipx"),
        Case("without a compiler", compiler=False),
        Case("with triton, without a GPU", more=("triton",)),
        *(Case(f"{python} with {torch}", python=python, torch=torch) for python, torch in given.also),
    ]
    return [case for case in found if not given.only or any(word in case.name for word in given.only)]


def run(command: list[str], **options: object) -> str:
    """Raises: RuntimeError with the last lines of what it wrote."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:4]))} …: {(done.stdout + done.stderr)[-1500:]}")
    return str(done.stdout)


def installed(case: Case, folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel."""
    if case.tool == "pipx":
        tools = folder / "tools"
        run([sys.executable, "-m", "venv", tools])
        run([tools / "bin/python", "-m", "pip", "install", "--quiet", "pipx"])
        homes = {"PIPX_HOME": folder / "home", "PIPX_BIN_DIR": folder / "bin", "PIPX_MAN_DIR": folder / "man"}
        environment = os.environ | {name: str(path) for name, path in homes.items()}
        pip = f"--constraint={_constraint(case, folder)}"
        run([tools / "bin/pipx", "install", "--python", case.python, f"--pip-args={pip}", wheel], env=environment)
        return folder / "home/venvs/qwen3next/bin/python"
    if case.tool == "uv":
        tools = folder / "tools"
        run([sys.executable, "-m", "venv", tools])
        run([tools / "bin/python", "-m", "pip", "install", "--quiet", "uv"])
        run([tools / "bin/uv", "venv", "--quiet", "--python", case.python, folder / "venv"])
        python = folder / "venv/bin/python"
        links = ["--index-strategy", "unsafe-best-match", "--constraint", _constraint(case, folder)]
        run([tools / "bin/uv", "pip", "install", "--quiet", "--python", python, *links, wheel, *case.more])
        return python
    run([case.python, "-m", "venv", folder / "venv"])
    python = folder / "venv/bin/python"
    run([python, "-m", "pip", "install", "--quiet", case.torch])
    run([python, "-m", "pip", "install", "--quiet", wheel, *case.more])
    return python


def _constraint(case: Case, folder: Path) -> Path:
    path = folder / "constraint.txt"
    path.write_text(case.torch + "\n", encoding="utf-8")
    return path


def checked(case: Case, wheel: Path, cache: Path) -> dict[str, object]:
    """What check.py reported, or why there is no report."""
    if shutil.which(case.python) is None:
        return {"state": "not run", "why": f"{case.python} is not on this machine"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qwen3next-install-") as name:
        folder = Path(name)
        try:
            python = installed(case, folder, wheel)
            path = str(python.parent) if not case.compiler else f"{python.parent}{os.pathsep}{os.environ['PATH']}"
            left_out = ("PYTHONPATH", "CXX", "VIRTUAL_ENV")
            environment = {key: x for key, x in os.environ.items() if key not in left_out}
            environment |= {"PATH": path, "XDG_CACHE_HOME": str(cache)}  # kernels are compiled once
            report = json.loads(run([python, HERE / "check.py"], env=environment, cwd=folder).splitlines()[-1])
        except RuntimeError as error:
            return {"state": "failed", "why": str(error)}
    if report["compiled"] != case.compiler:
        return {"state": "failed", "why": f"compiled kernels: {report['compiled']}"} | report
    return {"state": "passed", "seconds": round(time.perf_counter() - began)} | report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", help="the wheel to install; built if not given")
    parser.add_argument("--only", nargs="*", default=[], help="words, of which a case's name must contain one")
    parser.add_argument(
        "--also",
        nargs=2,
        action="append",
        default=[],
        metavar=("PYTHON", "TORCH"),
        help="another interpreter and torch",
    )
    parser.add_argument("--out", default="test-install.json", help="file for the results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.wheel is None:
            run([sys.executable, "-m", "build", "--wheel", "--outdir", scratch, ROOT])
            given.wheel = next(Path(scratch).glob("*.whl"))
        results: dict[str, object] = {}
        failed = False
        for case in cases(given):
            result = checked(case, Path(given.wheel).resolve(), Path(scratch) / "cache")
            results[case.name] = {**asdict(case), **result}
            failed |= result["state"] == "failed"
            print(f"{case.name}: {result}", flush=True)
            written = Path(f"{given.out}.part")
            written.write_text(json.dumps(results, indent=1), encoding="utf-8")
            written.replace(given.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
