"""The bundle for a GPU machine without a network has all that the check and its tests import there."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from recipes import gpu_bundle
from recipes.gpu_bundle import BUNDLED, OPTIONAL, PRUNED, TARGET, canonical, imports, needed, required, uncovered

MODULES = {module for modules in BUNDLED.values() for module in modules}


def test_every_import_is_in_the_bundle_or_on_the_machine():
    assert uncovered() == set()


def test_the_lists_hold_nothing_that_nothing_needs():
    """Bundled modules are imported by us, or required by a bundled distribution."""
    ours = needed(lazy=True) | {"triton"}  # which fla imports
    wanted = {module.replace("_", "-") for module in ours}
    for name in BUNDLED:
        try:
            wanted |= required(importlib.metadata.requires(canonical(name)) or [], "3.12")
        except importlib.metadata.PackageNotFoundError:
            wanted |= {"einops", "fla-core"}  # required by those that are not installed here
    assert {module.replace("_", "-") for module in MODULES} - wanted <= {"fla"}
    assert ours >= OPTIONAL


def test_what_bundled_packages_require_is_there():
    known = {canonical(name) for name in (*BUNDLED, *TARGET)}
    seen = 0
    for name in BUNDLED:
        try:
            lines = importlib.metadata.requires(canonical(name)) or []
        except importlib.metadata.PackageNotFoundError:  # checked in the wheel when the bundle is made
            continue
        seen += 1
        assert required(lines, "3.12") <= known, name
    assert seen >= 6


def test_an_import_that_is_nowhere_is_found(tmp_path, monkeypatch):
    """At the top, inside a function, named by a string, and behind a module of the project."""
    for name, code in {
        "a": "import scipy.linalg\nimport torch",
        "b": "def f():\n    from sklearn import svm",
        "c": 'import pytest\npytest.importorskip("pandas.core")',
        "d": 'import importlib\nimportlib.import_module("polars")',
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    assert set(imports(tmp_path / "a.py", lazy=False)) == {"scipy.linalg", "torch"}
    assert set(imports(tmp_path / "b.py", lazy=False)) == set()
    assert "sklearn" in set(imports(tmp_path / "b.py", lazy=True))
    monkeypatch.setattr(gpu_bundle, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_bundle, "_our_files", lambda: {"d": tmp_path / "d.py"})
    assert needed(entries=("[abc].py",)) == {"scipy", "torch", "pytest", "pandas"}
    (tmp_path / "a.py").write_text("from d import x")
    assert needed(entries=("a.py",)) == {"polars"}


def test_beartype_is_found_although_only_a_string_names_it():
    assert "beartype" in needed()


@pytest.mark.parametrize(
    "name, pruned",
    [
        ("triton/backends/nvidia/bin/ptxas", True),
        ("triton/backends/nvidia/bin/ptxas-blackwell", True),
        ("triton/backends/nvidia/lib/cupti/libcupti.so", True),
        ("triton/_C/libproton.so", True),
        ("triton/backends/nvidia/lib/libdevice.10.bc", False),
        ("triton/backends/nvidia/include/cuda.h", False),
        ("triton/_C/libtriton.so", False),
        ("triton/knobs.py", False),
    ],
)
def test_what_is_left_out_of_triton(name, pruned):
    assert bool(PRUNED.match(name)) == pruned


def test_the_environment_file_sets_the_paths(tmp_path):
    """Unpacked from wheels that are made here."""
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("only_in_the_bundle.py", "x = 1")
        archive.writestr("triton/profiler/y.py", "")
    site = tmp_path / "site"
    site.mkdir()
    gpu_bundle.unpack([wheel], site)
    assert sorted(path.name for path in site.iterdir()) == ["env.sh", "only_in_the_bundle.py"]
    code = (
        f". {site}/env.sh; {sys.executable} -c 'import only_in_the_bundle'; echo $TRITON_PTXAS_PATH; echo $PYTHONPATH"
    )
    run = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=Path(gpu_bundle.ROOT))
    ptxas, path = run.stdout.splitlines()
    assert ptxas.endswith("ptxas")
    assert path.split(":")[:2] == [str(site), str(gpu_bundle.ROOT)]
