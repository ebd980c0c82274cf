"""What the pages say runs: every ```python block, page by page; and every relative link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN = [page for page in PAGES if page.name == "README.md" or ROOT / "docs" in page.parents]

BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line number and code of each block that is meant to run; others are tagged `no-run`."""
    text = page.read_text(encoding="utf-8")
    found = [(text[: m.start()].count("\n") + 2, m[1].strip(), m[2]) for m in BLOCK.finditer(text)]
    unknown = [tag for _, tag, _ in found if tag not in ("", "no-run")]
    assert not unknown, f"{page.name}: unknown tags {unknown}"
    return [(line, code) for line, tag, code in found if not tag]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in RUN if blocks(p)], ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    """A page is one program: its blocks share their names and a folder of their own."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__page__"}
    for line, code in blocks(page):
        # Padded with empty lines, so that a traceback points into the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    relative = [link for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in relative if not (page.parent / link.split("#")[0]).exists()]
    assert not missing, f"{name(page)} points to {missing}"


def test_pages_are_found():
    """A moved folder must not turn these tests into nothing."""
    assert ROOT / "docs" / "hooks.md" in RUN
    assert sum(len(blocks(page)) for page in RUN) >= 10
