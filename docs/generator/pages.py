"""An mkdocs hook: every relative link of README and docs works on the site as it does on a code host.

README.md becomes the site's home page. For each file or folder outside docs/ that a page links to, such as
../layers/norm.py, a page with its text is generated. So the site does not need the address of a repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".toml": "toml", ".json": "json"}
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def site_path(path: str) -> str:
    """The site's path of a file or folder, from its path in the repository."""
    if path in HOME or path == "docs":
        return HOME.get(path, "index.md")
    if path.startswith("docs/") and not path.endswith(".py") and (ROOT / path).is_file():
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def targets(text: str, path: str) -> dict[str, str]:
    """The relative links of a page that exist, as written, with their paths in the repository."""
    found = {m[1]: posixpath.normpath(posixpath.join(posixpath.dirname(path), m[1])) for m in LINK.finditer(text)}
    return {link: path for link, path in found.items() if not path.startswith("..") and (ROOT / path).exists()}


def source_page(path: str) -> str:
    """A page with the text of a file, or with the list of a folder's files; search does not index it."""
    head = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        return head + "\n".join(f"- [`{p.name}`]({posixpath.basename(path)}/{p.name})" for p in members(path)) + "\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f'{head}~~~~{language} linenums="1"\n{(ROOT / path).read_text(encoding="utf-8")}\n~~~~\n'


def members(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).iterdir() if p.suffix in LANGUAGES or (p / "__init__.py").exists())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages in the root of the repository and the sources that pages link to."""
    made = {path: (ROOT / path).read_text(encoding="utf-8") for path in HOME}
    pages = made | {f"docs/{file.src_uri}": file.content_string for file in files if file.is_documentation_page()}
    waiting = [target for path, text in pages.items() for target in targets(text, path).values()]
    while waiting:
        path = waiting.pop()
        if path not in made and site_path(path).startswith("source/"):
            made[path] = source_page(path)
            waiting += [str(p.relative_to(ROOT)) for p in members(path)] if (ROOT / path).is_dir() else []
    for path, text in made.items():
        files.append(File.generated(config, site_path(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Rewrite links from a page's path in the repository to its path on the site."""
    here = page.file.src_uri
    path = {site: root for root, site in HOME.items()}.get(here, f"docs/{here}")
    if here.startswith("source/"):
        path = here.removeprefix("source/").removesuffix(".md")
    turned = {
        link: posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")
        for link, target in targets(markdown, path).items()
    }
    markdown = markdown.replace("\n```python no-run\n", "\n```python\n")  # the tag is for tests, unknown to the site
    return LINK.sub(lambda m: f"]({turned.get(m[1], m[1])}{m[2] or ''})", markdown)
