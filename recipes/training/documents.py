"""Read documents from a source of text, and split off held-out ones.

    plan = plan_split("stdlib")
    for split, name, text in split_documents("stdlib", plan): ...

A document is a name and a text. Sources are the running Python's standard library, folders, globs, single files, and
datasets of Hugging Face.
"""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HUB = "hf:"  # before the name of a dataset of Hugging Face
# Third-party code and tests are left out, because they differ between machines more than the library does.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def documents(source: str | Path, *, skipped: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) in an order that does not depend on the file system.

    Args:
        source: "stdlib" (the *.py files of the running Python's standard library, without tests and
            site-packages), a folder (its files, without hidden ones), a glob, or one file. Each line of a .jsonl file
            (field "text") and each row of a .parquet file (column "text") is a document; any other file is one
            document. "hf:NAME" or "hf:NAME:CONFIGURATION" streams the training split of a dataset through the package
            `datasets`, whose rows have the field "text".
        skipped: receives the names of documents that are not UTF-8, cannot be read, or have null as text.
    Raises: ValueError for a missing or empty source, or one without the field "text".
    """
    skipped = [] if skipped is None else skipped
    if str(source).startswith(HUB):
        yield from _hub(str(source).removeprefix(HUB), skipped)
        return
    for name, path in files_of(str(source)):
        if path.suffix == ".jsonl":
            yield from _jsonl(name, path, skipped)
        elif path.suffix == ".parquet":
            yield from _parquet(name, path, skipped)
        else:
            try:
                yield name, path.read_bytes().decode()  # not read_text, which would turn \r\n into \n
            except (OSError, UnicodeDecodeError):
                skipped.append(name)


def _hub(dataset: str, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """The rows of a dataset of Hugging Face, streamed. Raises: ValueError where it cannot be read."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"Reading hf:{dataset} needs the package datasets: pip install datasets.") from error
    path, _, configuration = dataset.partition(":")
    number = -1
    try:
        rows = load_dataset(path, configuration or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            if "text" not in row:
                raise ValueError(f'hf:{dataset} has no field "text" but {", ".join(row)}: choose another dataset.')
            if isinstance(row["text"], str):
                yield f"{dataset}:{number}", row["text"]
            else:
                skipped.append(f"{dataset}:{number}")
    except Exception as error:  # the package raises errors of many libraries
        if isinstance(error, ValueError) and "has no field" in str(error):
            raise
        after = f" after {number + 1} rows" if number >= 0 else ""
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"hf:{dataset} cannot be read{after} ({why}): where the hub cannot be reached, copy the dataset's parquet "
            "or jsonl files here and name their folder."
        ) from error


def files_of(source: str) -> list[tuple[str, Path]]:
    """Files with names relative to the source, so that a copied corpus keeps its names and therefore its split."""
    path = Path(source)
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [p for p in root.rglob("*.py") if STDLIB_LEFT_OUT.isdisjoint(p.relative_to(root).parts)]
    elif path.is_file():
        return [(path.name, path)]
    elif path.is_dir():
        root = path
        found = [p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts)]
    elif glob.has_magic(source):
        fixed = [str(p) for p in [*reversed(path.parents)] if not glob.has_magic(str(p))]
        root = Path(fixed[-1])
        found = [Path(p) for p in glob.glob(source, recursive=True)]
    else:
        raise ValueError(f'There is nothing at {source}: give "stdlib", a folder, a glob or a file.')
    files = sorted((p.relative_to(root).as_posix(), p) for p in found if p.is_file())
    if not files:
        raise ValueError(f"{source} holds no files: give a folder or a glob that does.")
    return files


def _jsonl(name: str, path: Path, skipped: list[str]) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}): correct or remove it.") from error
            if not isinstance(row, dict) or "text" not in row:
                raise ValueError(f'{path} line {number} has no field "text": rename the field that holds it.')
            try:
                row["text"].encode()
            except (AttributeError, UnicodeEncodeError):  # not a string, or an unpaired surrogate
                skipped.append(f"{name}:{number}")
            else:
                yield f"{name}:{number}", row["text"]


def _parquet(name: str, path: Path, skipped: list[str]) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"Reading {path} needs pyarrow: pip install pyarrow.") from error
    file = parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise ValueError(f'{path} has no column "text": rename the column that holds it.')
    rows = (text for rows in file.iter_batches(columns=["text"]) for text in rows.column(0).to_pylist())
    for number, text in enumerate(rows):
        if isinstance(text, str):
            yield f"{name}:{number}", text
        else:
            skipped.append(f"{name}:{number}")


@dataclass(frozen=True)
class Plan:
    """The split of each document, decided before encoding.

    Attributes:
        splits: document name -> "train" or "val".
        digests: document name -> sha256 of its UTF-8 text.
        cut: position at which a single document is split, in characters; None for several documents.
        skipped: number of documents left out, by reason.
    """

    splits: dict[str, str]
    digests: dict[str, str]
    cut: int | None
    skipped: dict[str, int]


def plan_split(source: str | Path, *, validation_share: float = 0.05, seed: int = 0) -> Plan:
    """Hold out about `validation_share` of the documents, at least one, by a hash of seed and text.

    The split of a document depends neither on other documents nor on its name, so it is held out in every corpus and
    under every name. Empty documents are left out. Of exact copies only the
    one whose name sorts first is kept, because a held-out text that is also trained on would measure memorisation. A
    single document is split near the end of a line, and its last part is held out.

    Raises: ValueError for a share outside (0, 1), or a source without enough text to split.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}: choose one between 0 and 1, such as 0.05.")
    unreadable: list[str] = []
    name_of: dict[str, str] = {}  # by digest
    count = empty = 0
    for name, text in documents(source, skipped=unreadable):
        count += 1
        empty += not text
        if text:
            key = digest(text)
            name_of[key] = min(name, name_of.get(key, name))
    skipped = {"unreadable": len(unreadable), "empty": empty, "copies": count - empty - len(name_of)}
    if not name_of:
        raise ValueError(f"{source} holds no text (left out: {skipped}): give a source of UTF-8 text.")
    if len(name_of) == 1:
        return _plan_cut(source, next(iter(name_of.values())), validation_share, skipped)

    digests = {name: key for key, name in name_of.items()}
    drawn = {name: share_of(key, seed) for name, key in digests.items()}
    held_out = {name for name in drawn if drawn[name] < validation_share} or {min(drawn, key=drawn.__getitem__)}
    if len(held_out) == len(drawn):
        held_out.remove(max(drawn, key=drawn.__getitem__))
    return Plan({name: "val" if name in held_out else "train" for name in digests}, digests, None, skipped)


def _plan_cut(source: str | Path, name: str, share: float, skipped: dict[str, int]) -> Plan:
    text = next(text for candidate, text in documents(source) if candidate == name)
    if len(text) < 2:
        raise ValueError(f"{source} holds one character: give a longer text, so that a part can be held out.")
    wanted = min(max(round(len(text) * (1 - share)), 1), len(text) - 1)
    after_line = text.rfind("\n", 0, wanted) + 1
    cut = after_line or wanted
    head, tail = f"{name} (head)", f"{name} (tail)"
    digests = {head: digest(text[:cut]), tail: digest(text[cut:])}
    return Plan({head: "train", tail: "val"}, digests, cut, skipped)


def split_documents(source: str | Path, plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield ("train" or "val", name, text) of every document in the plan.

    Raises: ValueError if a text has changed since the plan was made.
    """
    found = 0
    for name, text in documents(source):
        pieces = [(name, text)]
        if plan.cut is not None:
            pieces = [(f"{name} (head)", text[: plan.cut]), (f"{name} (tail)", text[plan.cut :])]
        for piece, content in pieces:
            if piece in plan.splits:
                if digest(content) != plan.digests[piece]:
                    raise ValueError(f"{name} in {source} changed while it was read: run again.")
                found += 1
                yield plan.splits[piece], piece, content
    if found != len(plan.splits):
        raise ValueError(f"{source} lost documents while it was read: run again.")


def share_of(text_digest: str, seed: int) -> float:
    """A number in [0, 1) for a text: it is held out where this is below the validation share."""
    return int(digest(f"{seed}\n{text_digest}")[:13], 16) / 16**13


def digest(text: str) -> str:
    """Hex sha256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
