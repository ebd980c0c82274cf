"""A griffe extension for this project's docstrings and exported names.

Docstrings here have one-line sections ("Raises: ValueError for …") and entries with several names ("k, v: …"), which
griffe does not parse.
"""

import re
from contextlib import suppress

from griffe import AliasResolutionError, Extension, Module, Object

PARAGRAPH = re.compile(r"^(Returns|Raises|Sources?|Shapes): +(\S.*(?:\n {4}.*)*)", re.MULTILINE)
LIST = re.compile(r"^(Args|Attributes):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class HouseStyle(Extension):
    def on_instance(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: object) -> None:
        """Let `qwen3next.generate` mean the exported function: griffe takes the module of the same name."""
        exported: dict[str, Object] = {}
        for name, path in pkg.imports.items():
            with suppress(KeyError, AliasResolutionError):
                found = pkg[path.removeprefix(f"{pkg.path}.")]
                found = found.members.get(name, found) if found.is_module else found
                exported[name] = found.final_target if found.is_alias else found
        pkg.members.update(exported)


def rewritten(docstring: str) -> str:
    """One-line sections as paragraphs with their name in bold; an entry of several names as one entry a name."""
    text = PARAGRAPH.sub(lambda m: f"\n**{m[1]}:** " + re.sub(r"\n +", "\n", m[2]), docstring)
    text = LIST.sub(r"\n\1:", text)
    return ENTRY.sub(lambda m: "\n".join(f"    {name}: {m[2]}" for name in m[1].split(", ")), text)
