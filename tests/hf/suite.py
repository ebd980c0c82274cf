"""transformers' own model tests on our class and on theirs: python tests/hf/suite.py (make test-hf).

The tests come from transformers' source distribution, which pip fetches; nothing of it is kept here. What they import
and the distribution lacks (`generation`, `exporters`) is replaced by empty classes. Each test must end on our class at
least as well as on theirs: what passes there passes here, or is named in ALLOWED with its reason, which docs/hf.md
repeats.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

VERSION = "5.23.0"
HERE = Path(__file__).parent
# Files of transformers' tests that the model tests import.
TAKEN = ("test_modeling_common.py", "test_configuration_common.py")
STAND_INS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
# What passes on transformers' class and not on ours, by name, and why: nothing.
ALLOWED: dict[str, str] = {}


def sources(folder: Path, given: str | None) -> Path:
    """The folder `tests` of transformers' source distribution: given, or fetched."""
    if given:
        return Path(given)
    wanted = [f"transformers=={VERSION}", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted, "--dest", str(folder)], check=True)
    archive = next(folder.glob("*.tar.gz"))
    subprocess.run(["tar", "-xzf", archive.name], cwd=folder, check=True)
    return folder / f"transformers-{VERSION}" / "tests"


def prepared(folder: Path, tests: Path) -> Path:
    """A package of transformers' tests and ours (suite_models.py) to run."""
    package = folder / "suite"
    for name, text in STAND_INS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    for name in TAKEN:
        (package / name).write_text((tests / name).read_text(encoding="utf-8"), encoding="utf-8")
    (package / "test_models.py").write_text((HERE / "suite_models.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    generate\n    torch_compile_test\n", encoding="utf-8")
    return package


def outcomes(folder: Path, kind: str, chosen: str) -> dict[str, tuple[str, str]]:
    """Outcome and message of every test, by name, on the classes of this kind: "native" or "ours"."""
    report = folder / f"{kind}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-k", chosen] if chosen else []
    command += [f"--junitxml={report}", "suite/test_models.py"]
    path = f"{folder}:{HERE.parent.parent}"
    environment = {**os.environ, "SUITE_CLASSES": kind, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with (folder / f"{kind}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        text = "" if child is None else (child.get("message") or "").splitlines()
        found[case.get("name") or ""] = ("passed" if child is None else child.tag, text[0] if text else "")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", help="the folder tests of an unpacked source distribution; fetched if not given")
    parser.add_argument("--keep", help="a folder to work in, which is kept with pytest's logs")
    parser.add_argument("-k", default="", help="pytest's expression for the tests to run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.keep or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepared(folder, sources(folder, given.sources))
        theirs, ours = (outcomes(folder, kind, given.k) for kind in ("native", "ours"))
    return report(theirs, ours)


def report(theirs: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> int:
    """Print the comparison; 1 if ours is worse in a test that is not excused."""
    for name, found in (("transformers", theirs), ("ours", ours)):
        kinds = [kind for kind, _ in found.values()]
        print(name, {kind: kinds.count(kind) for kind in sorted(set(kinds))})
    worse = 0
    for name in sorted(theirs):
        kind, message = ours.get(name, ("absent", ""))
        if kind == "passed" or (theirs[name][0] != "passed" and kind == "skipped"):
            continue
        excused = theirs[name][0] != "passed" or name in ALLOWED
        worse += not excused
        print(f"{'-' if excused else 'WORSE'} {name}: {theirs[name][0]} there, {kind} here: {message[:160]}")
    better = [name for name in theirs if theirs[name][0] != "passed" and ours.get(name, ("", ""))[0] == "passed"]
    print("passed here alone:", ", ".join(better) or "-")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
