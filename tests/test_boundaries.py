"""layers imports no other package of ours, qwen3next only layers, nothing recipes; heavy packages load lazily."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
                assert top in {"layers", "torch", "jaxtyping", "fla"} | sys.stdlib_module_names, (
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
