"""Write documents as token shards on disk: built once, atomically, and identified by a fingerprint.

meta = build_shards("stdlib", byte_tokenizer(), "runs/data")
"""

import io
import json
import os
import shutil
import tempfile
from array import array
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from recipes.training.documents import Plan, digest, plan_split, split_documents
from recipes.training.tokenizer import document_decoder, document_encoder, eos_id, explain_full_disk

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Meta:
    """The contents of the shards in a folder (meta.json); counts are by split.

    Attributes:
        fingerprint: sha256 over tokenizer, split, and every document's name and content.
        tokens, documents, utf8_bytes: counts; tokens include one `<|endoftext|>` per document, bytes do not.
        val_names, val_bytes: the held-out documents in shard order, and the UTF-8 bytes of each.
        skipped: number of documents left out, by reason.
        note: message to the user about an unusual split; else empty.
    """

    fingerprint: str
    eos_id: int
    vocab_size: int
    dtype: str
    tokens: dict[str, int]
    documents: dict[str, int]
    utf8_bytes: dict[str, int]
    val_names: list[str]
    val_bytes: list[int]
    skipped: dict[str, int]
    note: str


def build_shards(
    source: str | Path,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    validation_share: float = 0.05,
    seed: int = 0,
    exact: bool = True,
    progress: bool = True,
) -> Meta:
    """Encode a source into `folder`, or keep existing shards of the same text, tokenizer and split.

    Writes for each split SPLIT.bin (token ids, uint32, little-endian) and SPLIT.idx.npy (start of each document, int64,
    and the end), then meta.json. All files are written to a `.building-*` folder and then moved, so a failure leaves
    the old shards unchanged. A killed process leaves at most that folder, which the next build removes, and no shards
    if it was killed during the move.

    Args:
        source, validation_share, seed: as in `documents` and `plan_split`.
        exact: refuse a document that does not equal its decoded tokens. Its bits per byte would be meaningless, because
            text that the tokenizer loses costs no bits.
        progress: show a progress bar and the documents left out, on stderr.
    Raises: ValueError for an invalid source or tokenizer; OSError for a full disk.
    """
    folder = Path(folder)
    eos = eos_id(tokenizer)
    if folder.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{folder} lies inside {source} and would become part of it: choose another folder.")
    plan = plan_split(source, validation_share=validation_share, seed=seed)
    parts = ["2" if exact else "1", tokenizer.to_str(), validation_share, seed, sorted(plan.splits.items())]
    fingerprint = digest(json.dumps([*parts, sorted(plan.digests.items())]))
    existing = _whole_shards(folder)
    if existing is not None and existing.fingerprint == fingerprint:
        return existing

    console = Console(stderr=True, quiet=not progress)
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_dead_builds(folder)
        staging = Path(tempfile.mkdtemp(prefix=f".building-{os.getpid()}-", dir=folder))
        try:
            counts = _write_tokens(source, plan, tokenizer, eos, staging, console, exact)
            note = "" if plan.cut is None else "One document only: its end is held out, the rest is for training."
            vocab_size = tokenizer.get_vocab_size()
            meta = Meta(fingerprint, eos, vocab_size, "uint32", *counts, plan.skipped, note)
            _write_synced(staging / "meta.json", json.dumps(asdict(meta), indent=1).encode())
            # Old tokens must never be read with a new index: shards without meta.json are invalid.
            (folder / "meta.json").unlink(missing_ok=True)
            for split in SPLITS:
                os.replace(staging / f"{split}.bin", folder / f"{split}.bin")
                os.replace(staging / f"{split}.idx.npy", folder / f"{split}.idx.npy")
            os.replace(staging / "meta.json", folder / "meta.json")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    left_out = ", ".join(f"{count} {reason}" for reason, count in plan.skipped.items() if count)
    sentence = f"{meta.documents['train']} documents to train on, {meta.documents['val']} held out"
    console.print(f"{folder}: {sentence}; left out: {left_out or 'none'}. {meta.note}", markup=False)
    return meta


def read_meta(folder: str | Path) -> Meta:
    """Read a shard folder's meta.json and check the sizes of the token files.

    Raises: ValueError if shards are missing, truncated, or contradict meta.json.
    """
    folder = Path(folder)
    file = folder / "meta.json"
    if not file.is_file():
        raise ValueError(f"There are no shards in {folder}: write them with build_shards.")
    try:
        meta = Meta(**json.loads(file.read_bytes()))
        for split in SPLITS:
            path = folder / f"{split}.bin"
            size, expected = path.stat().st_size if path.is_file() else 0, 4 * meta.tokens[split]
            if size != expected:
                raise ValueError(f"{path} has {size} bytes instead of {expected}")
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, error) from error
    return meta


def open_split(folder: Path, split: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Tokens (memory-mapped) and the starts of documents, followed by the end."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose train or val.")
    meta = read_meta(folder)
    try:
        starts = np.load(folder / f"{split}.idx.npy", allow_pickle=False)
        if len(starts) != meta.documents[split] + 1 or starts[-1] != meta.tokens[split]:
            raise ValueError(f"{split}.idx.npy does not fit meta.json")
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise _damaged(folder, error) from error
    return np.memmap(folder / f"{split}.bin", dtype="<u4", mode="r"), starts


def _whole_shards(folder: Path) -> Meta | None:
    try:
        for split in SPLITS:
            open_split(folder, split)
        return read_meta(folder)
    except ValueError:
        return None


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"The shards in {folder} are damaged ({error}): delete the folder and build them again.")


class TokenCounts(NamedTuple):
    tokens: dict[str, int]
    documents: dict[str, int]
    utf8_bytes: dict[str, int]
    val_names: list[str]
    val_bytes: list[int]


def _write_tokens(
    source: str | Path, plan: Plan, tokenizer: Tokenizer, eos: int, folder: Path, console: Console, exact: bool
) -> TokenCounts:
    encode, decode = document_encoder(tokenizer), document_decoder(tokenizer)
    starts = {split: array("q", [0]) for split in SPLITS}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = {split: array("q") for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        bar = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        task = bar.add_task("encoding documents", total=len(plan.splits))
        texts = split_documents(source, plan)
        while some := list(islice(texts, 64)):  # the tokenizer encodes a batch in parallel
            encoded = encode([text for *_, text in some])
            if exact:
                for (_, name, text), back in zip(some, decode(encoded), strict=True):
                    _refuse_loss(name, text, back)
            for (split, name, text), ids in zip(some, encoded, strict=True):
                # ndarray.tofile does not report a full disk as such.
                files[split].write(np.append(ids, np.uint32(eos)).astype("<u4").tobytes())
                starts[split].append(starts[split][-1] + len(ids) + 1)
                sizes[split].append(len(text.encode()))
                names[split].append(name)
            bar.advance(task, len(some))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for split in SPLITS:
        index = io.BytesIO()
        np.save(index, np.array(starts[split], dtype=np.int64))
        _write_synced(folder / f"{split}.idx.npy", index.getvalue())
    return TokenCounts(
        tokens={split: starts[split][-1] for split in SPLITS},
        documents={split: len(names[split]) for split in SPLITS},
        utf8_bytes={split: sum(sizes[split]) for split in SPLITS},
        val_names=names["val"],
        val_bytes=sizes["val"].tolist(),
    )


def _refuse_loss(name: str, text: str, back: str) -> None:
    """Raises: ValueError if a document differs from its decoded tokens."""
    if back == text:
        return
    pairs = zip(text, back, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
    raise ValueError(
        f"The tokenizer loses text of the document {name}: at character {at} {text[at : at + 12]!r} becomes "
        f"{back[at : at + 12]!r}, so bits per byte would be too low. Choose a tokenizer that keeps every text "
        '("bytes", "bpe:4096"), or leave the document out.'
    )


def _remove_dead_builds(folder: Path) -> None:
    """Delete `.building-PID-*` folders of processes that no longer run on this machine."""
    for left in folder.glob(".building-*-*"):
        try:
            os.kill(int(left.name.split("-")[1]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            pass  # a running process of another user


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
