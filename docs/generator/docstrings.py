"""A griffe extension: reads the sections of this project's docstrings, and the names that a package exports.

Docstrings here have one-line sections ("Raises: ValueError for …") and entries with several names ("k, v: …"), which
griffe does not know.
"""

import re
from contextlib import suppress

from griffe import AliasResolutionError, Extension, Module, Object

ONE_LINE = re.compile(r"^(Returns|Raises|Sources?|Shapes): +(?=\S)")
LISTS = re.compile(r"^(Args|Attributes):$")
ENTRY = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$")


class HouseStyle(Extension):
    def on_instance(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: object) -> None:
        """Names that the package imports are what it imports, also where a module has the name of its function."""
        exported: dict[str, Object] = {}
        for name, path in pkg.imports.items():
            with suppress(KeyError, AliasResolutionError):
                found = pkg[path.removeprefix(f"{pkg.path}.")]
                found = found.members.get(name, found) if found.is_module else found
                exported[name] = found.final_target if found.is_alias else found
        pkg.members.update(exported)


def rewritten(docstring: str) -> str:
    """One-line sections as paragraphs with their name in bold; an entry of several names as one entry a name."""
    lines: list[str] = []
    inside, entries = "", list[list[str]]()
    for line in docstring.splitlines():
        if ONE_LINE.match(line) or LISTS.match(line):
            inside, entries = line[:4], []
            lines += ["", ONE_LINE.sub(lambda m: f"**{m[1]}:** ", line)]
            continue
        if line and not line.startswith(" "):
            inside, entries = "", []
        if inside in ("Args", "Attr") and (m := ENTRY.match(line)):
            entries = [[f"{m[1]}{name}: {m[3]}"] for name in m[2].split(", ")]
            lines.append("")  # filled when the entry is complete
        elif entries and line.startswith("        "):
            for entry in entries:
                entry.append(line)
        else:
            entries = []
            lines.append(line.lstrip() if inside and not inside.startswith(("Args", "Attr")) else line)
            continue
        lines[-1] = "\n".join(part for entry in entries for part in entry)
    return "\n".join(lines)
