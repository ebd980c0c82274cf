"""The shape of the source tree: files, import circles, the order of packages, the reading path, long functions.

    python -m recipes.codebase                                        # a table
    python -m recipes.codebase --picture docs/figures/imports.png     # the packages and what they import

Lines of code leave out blank lines, comments and docstrings. Imports count wherever they stand, inside functions and
under TYPE_CHECKING too. tests/test_boundaries.py holds the circles, the order and the length of the reading path.
"""

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("layers", "qwen3next", "recipes")
READING_LIMIT = 1500
Graph = dict[str, set[str]]
_LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
}  # fmt: skip


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module by name, its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def import_graph(files: dict[str, Path]) -> Graph:
    """The modules of ours that each module imports. `from package import module` imports the module."""
    graph: Graph = {}
    for name, path in files.items():
        found = graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found |= {full} if full in files else {node.module} & files.keys()
        found.discard(name)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes that import each other in a circle: strongly connected components of two or more."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def room(module: str, files: dict[str, Path]) -> str:
    """The subpackage of a module; a module at the top of its package is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 or files[module].name == "__init__.py" else module


def rooms(graph: Graph, files: dict[str, Path]) -> Graph:
    """The graph of subpackages, top-level modules apart."""
    found: Graph = {}
    for name, imported in graph.items():
        here = room(name, files)
        found.setdefault(here, set()).update(r for other in imported if (r := room(other, files)) != here)
    return found


def code_lines(path: Path) -> int:
    """Lines of code: blank lines, comments and docstrings aside."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def section(title: str, page: Path) -> str:
    """The text below a heading of a page."""
    text = page.read_text(encoding="utf-8")
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def reading_order(root: Path = ROOT) -> list[Path]:
    """The files of docs/architecture.md's reading order: links in the first column of the table, in order."""
    table = [row for row in section("Reading order", root / "docs" / "architecture.md").splitlines() if row[:1] == "|"]
    return [root / link for row in table for link in re.findall(r"\]\(\.\./([\w/]+\.py)\)", row.split("|")[1])]


def package_order(root: Path = ROOT) -> list[list[str]]:
    """docs/architecture.md's order of subpackages, lowest first: rows of the table, whose names stand in backquotes."""
    table = [
        row for row in section("Order of imports", root / "docs" / "architecture.md").splitlines() if row[:1] == "|"
    ]
    return [names for row in table if (names := re.findall(r"`([\w.]+)`", row.split("|")[2]))]


def functions(files: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Lines and name of every function, its docstring aside."""
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                begin = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                yield (node.end_lineno or 0) - begin.lineno + 1, f"{name}.{node.name}"


def reduced(graph: Graph) -> Graph:
    """The graph without the imports that follow from others: a → c where a → b → c. It has no circle."""
    below: Graph = {}

    def reach(node: str) -> set[str]:
        if node not in below:
            below[node] = set().union(*({other} | reach(other) for other in graph.get(node, ())))
        return below[node]

    return {node: {x for x in to if not any(x in reach(y) for y in to if y != x)} for node, to in graph.items()}


def draw(graph: Graph, order: list[list[str]], path: Path) -> None:
    """A panel for each package: a row for each step of the order, lowest at the bottom, arrows for imports.

    Imports that follow from drawn ones are left out, and so are those from one package into the next.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"layers": "#cfe3f5", "qwen3next": "#fbdcc0", "recipes": "#d5ecd0"}
    rows = {
        package: [r for row in order if (r := [n for n in row if n.split(".")[0] == package])] for package in PACKAGES
    }
    wide = [max(map(len, rows[package])) for package in PACKAGES]
    high = max(map(len, rows.values()))
    figure, panels = plt.subplots(1, 3, figsize=(1.5 * sum(wide), 0.55 * high), width_ratios=wide)
    for ax, package, width in zip(panels, PACKAGES, wide, strict=True):
        place = {n: (i - (len(row) - 1) / 2, y) for y, row in enumerate(rows[package]) for i, n in enumerate(row)}
        arrows = reduced({name: graph.get(name, set()) & place.keys() for name in place})
        for name, (x, y) in place.items():
            for other in arrows[name]:
                far = y - place[other][1] > 1 and x == place[other][0]
                style = {
                    "arrowstyle": "-|>", "color": "#888888", "lw": 0.7, "mutation_scale": 8, "shrinkA": 8, "shrinkB": 8,
                    "connectionstyle": f"arc3,rad={0.25 if far else 0}",
                }  # fmt: skip
                ax.annotate("", xy=place[other], xytext=(x, y), arrowprops=style, zorder=0)
            box = {"boxstyle": "round,pad=0.3", "fc": colours[package], "ec": "#555555", "lw": 0.7}
            ax.text(x, y, name.partition(".")[2] or "__init__", ha="center", va="center", fontsize=7, bbox=box)
        ax.set(xlim=(-width / 2, width / 2), ylim=(-0.6, high - 0.4), title=f"{package}/")
        ax.axis("off")
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


def report() -> str:
    files = modules()
    graph, lines = import_graph(files), []
    for package in PACKAGES:
        own = [p for name, p in files.items() if name.split(".")[0] == package]
        top = sum(p.parent == ROOT / package for p in own)
        lines.append(f"{package}: {len(own)} files, {top} at its top, {sum(map(code_lines, own))} lines of code")
    found = circles(graph)
    lines.append(f"import circles: {len(found)}" + "".join(f"\n  {len(c)}: {', '.join(c)}" for c in found))
    path = [(p.relative_to(ROOT).as_posix(), code_lines(p)) for p in reading_order()]
    total = sum(n for _, n in path)
    lines.append(f"reading order: {len(path)} files, {total} lines of code (limit {READING_LIMIT})")
    lines += [f"  {n:5d}  {name}" for name, n in path]
    lines.append("longest functions:")
    lines += [f"  {n:5d}  {name}" for n, name in sorted(functions(files), reverse=True)[:10]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Files, import circles, reading path, long functions.")
    parser.add_argument("--picture", type=Path, help="draw the packages and their imports to this file")
    options = parser.parse_args()
    print(report())
    if options.picture:
        files = modules()
        draw(rooms(import_graph(files), files), package_order(), options.picture)


if __name__ == "__main__":
    main()
