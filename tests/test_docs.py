"""Every ```python block of the pages runs, and all relative links and anchors resolve."""

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN = [page for page in PAGES if page.name == "README.md" or ROOT / "docs" in page.parents]

BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line number and code of each block to run; the others are tagged `no-run`."""
    text = page.read_text(encoding="utf-8")
    found = [(text[: m.start()].count("\n") + 2, m[1].strip(), m[2]) for m in BLOCK.finditer(text)]
    unknown = [tag for _, tag, _ in found if tag not in ("", "no-run")]
    assert not unknown, f"{page.name}: unknown tags {unknown}"
    return [(line, code) for line, tag, code in found if not tag]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in RUN if blocks(p)], ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    """A page is one program: its blocks share their names and a temporary folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__page__"}
    for line, code in blocks(page):
        # Padded with empty lines, so that tracebacks have the line numbers of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as on code hosts and on the site."""
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in HEADING.findall(prose(page))]
    found = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts]
    assert len(found) == len(set(found)), f"{name(page)} has two headings with the same anchor: rename one"
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{name(page)} points to {link}"
        assert not anchor or anchor in anchors(target.resolve()), f"{name(page)} points to {link}"


def test_the_site_lists_every_page():
    """Every page is in the navigation of mkdocs.yml; `make docs` fails for a missing page."""
    listed = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}
    assert set(listed) == pages | {"index.md", "contributing.md", "changelog.md"}  # generated from files in the root
    assert len(listed) == len(set(listed))


def test_pages_are_found():
    """The pages are found, so that a moved folder cannot disable these tests."""
    assert ROOT / "docs" / "hooks.md" in RUN
    assert sum(len(blocks(page)) for page in RUN) >= 10
