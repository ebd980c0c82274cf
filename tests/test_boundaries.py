"""layers imports no other package of ours, qwen3next only layers, nothing recipes; heavy packages load lazily."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import codebase

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "layers": {"layers"},
    "qwen3next": {"layers", "qwen3next"},
    "recipes": {"layers", "qwen3next", "recipes"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrow"
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_the_arrow_of_imports(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top = name.split(".")[0]
            if top in ALLOWED:
                assert top in ALLOWED[package], f"{path} imports {name}"
            if package == "layers":
                assert top in {"layers", "torch", "jaxtyping", "fla", "triton"} | sys.stdlib_module_names, (
                    f"{path} imports {name}"
                )


def test_importing_the_model_imports_no_kernels_and_no_transformers():
    code = "import sys, qwen3next; print(sorted({'fla', 'triton', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_another_package_called_layers_is_noticed(tmp_path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import qwen3next"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "does not belong to qwen3next" in out.stderr


def test_imports_form_no_circle():
    """Modules, and packages too; imports inside functions and under TYPE_CHECKING count."""
    files = codebase.modules()
    graph = codebase.import_graph(files)
    assert len(graph) > 200
    assert codebase.circles(graph) == []
    assert codebase.circles(codebase.rooms(graph, files)) == []


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert codebase.circles(graph) == [["a", "b", "c"]]


def test_packages_import_only_those_that_the_page_puts_before_them():
    files, order = codebase.modules(), codebase.package_order()
    place = {name: i for i, row in enumerate(order) for name in row}
    graph = codebase.rooms(codebase.import_graph(files), files)
    assert place.keys() == graph.keys()
    for name, imported in graph.items():
        for other in imported:
            assert place[other] < place[name], f"{name} imports {other}, which docs/architecture.md puts after it"


INTRUDERS = re.compile(
    r"data_ptr|ctypes|layers\.cpp|layers\.kernels|in.parts\b|\bplan\b|\bgraph\b|\bslot\b|\btape\b", re.I
)


def test_the_reading_path_is_short_and_free_of_kernels():
    path = codebase.reading_order()
    assert len(path) >= 14
    assert sum(map(codebase.code_lines, path)) <= codebase.READING_LIMIT
    for file in path:
        lines = [x for x in file.read_text(encoding="utf-8").splitlines() if INTRUDERS.search(x)]
        assert not lines, file


def test_lines_of_code_leave_out_what_a_reader_may_skip(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        '"""Doc\n\nstring."""\n\n# A comment.\nx = """a\nb"""\n\n\ndef f():\n    """Doc."""\n    return x\n'
    )
    assert codebase.code_lines(file) == 4
