"""From documents to batches: token shards on disk, packed windows, validation.

    meta = build_shards("stdlib", byte_tokenizer(), "runs/data")
    train = PackedWindows("runs/data", "train", window=1024, seed=0)
    batch = train.batch(samples_seen, 8)

Shapes: b rows of a batch, w tokens of a window. Documents are kept apart everywhere: a split is by whole
documents, each ends with `<|endoftext|>`, and every batch says which token belongs to which.
"""

import gzip
import io
import json
import lzma
import math
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import Tensor

from recipes.documents import Plan, digest, plan_split, split_documents
from recipes.tokenizer import document_encoder, eos_id, explain_full_disk

SPLITS = ("train", "val")

# ---- shards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meta:
    """What the shards in a folder hold (meta.json); the counts are by split.

    Attributes:
        fingerprint: sha256 over tokenizer, split, and every document's name and content.
        tokens, documents, utf8_bytes: counts; tokens include one `<|endoftext|>` a document, bytes do not.
        val_names, val_bytes: the held-out documents in shard order, and the UTF-8 bytes of each.
        skipped: how many documents were left out, by reason.
        note: what to tell the user about the split; empty where it is the usual one.
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
    progress: bool = True,
) -> Meta:
    """Encode a source into `folder`, or keep what is there if it is the same text, tokenizer and split.

    Writes, for each split, SPLIT.bin (token ids, uint32, little-endian) and SPLIT.idx.npy (where each
    document starts, int64, and the end), then meta.json. Everything is written beside the old files first and
    moved in when whole, so a failure leaves the old shards as they were. A process that is killed leaves at
    most a `.building-*` folder, which the next build removes, and, killed during the move, no shards at all.

    Args:
        source, validation_share, seed: as in `documents` and `plan_split`.
        progress: show a bar, and say what was left out, on stderr.
    Raises: ValueError for a source or tokenizer that does not serve; OSError, in a sentence, for a full disk.
    """
    folder = Path(folder)
    eos = eos_id(tokenizer)
    if folder.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{folder} lies inside {source}, whose text it would become: choose another folder.")
    plan = plan_split(source, validation_share=validation_share, seed=seed)
    parts = ["1", tokenizer.to_str(), validation_share, seed, sorted(plan.splits.items())]
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
            counts = _write_tokens(source, plan, tokenizer, eos, staging, console)
            note = "" if plan.cut is None else "One document only: its head is for training, its tail is held out."
            vocab_size = tokenizer.get_vocab_size()
            meta = Meta(fingerprint, eos, vocab_size, "uint32", *counts, plan.skipped, note)
            _write_synced(staging / "meta.json", json.dumps(asdict(meta), indent=1).encode())
            # Old tokens must never stand beside a new index: without a meta.json there are no shards.
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
    """Read a shard folder's meta.json and hold the token files' sizes against it.

    Raises: ValueError if shards are missing, cut short, or not what meta.json says.
    """
    folder = Path(folder)
    file = folder / "meta.json"
    if not file.is_file():
        raise ValueError(f"There are no shards in {folder}: build_shards writes them.")
    try:
        meta = Meta(**json.loads(file.read_bytes()))
        for split in SPLITS:
            path = folder / f"{split}.bin"
            size, expected = path.stat().st_size if path.is_file() else 0, 4 * meta.tokens[split]
            if size != expected:
                raise ValueError(f"{path} has {size} bytes where {expected} belong")
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, error) from error
    return meta


def _open_split(folder: Path, split: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Tokens (memory-mapped) and where documents start, the end included."""
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
            _open_split(folder, split)
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
    source: str | Path, plan: Plan, tokenizer: Tokenizer, eos: int, folder: Path, console: Console
) -> TokenCounts:
    encode = document_encoder(tokenizer)
    starts = {split: array("q", [0]) for split in SPLITS}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = {split: array("q") for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        bar = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        task = bar.add_task("encoding documents", total=len(plan.splits))
        texts = split_documents(source, plan)
        while some := list(islice(texts, 64)):  # together, because the tokenizer encodes them in parallel
            for (split, name, text), ids in zip(some, encode([text for *_, text in some]), strict=True):
                # write, not ndarray.tofile: that one reports a full disk without saying so.
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


def _remove_dead_builds(folder: Path) -> None:
    """Delete what killed processes of this machine left: `.building-PID-*` whose process is gone."""
    for left in folder.glob(".building-*-*"):
        try:
            os.kill(int(left.name.split("-")[1]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            pass  # another user's, and alive


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# ---- training batches ----------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of consecutive tokens; `document_ids` numbers the documents within each row, from 0."""

    input_ids: Int64[Tensor, "b w"]
    document_ids: Int64[Tensor, "b w"]


class PackedWindows:
    """Windows of the token stream in a seeded order, as a pure function of the number of samples seen.

    An epoch cuts the stream into windows from an offset drawn for that epoch, so documents meet window edges
    at different places each time, and visits them in a drawn order. The stream is a ring: a window that
    reaches its end goes on with the first document. An epoch leaves out `tokens % window` tokens.

    Nothing is remembered between calls: rank r of n asks for batch(seen + r * size, size), the run then adds
    n * size to the one integer it saves, and a resumed run, on any number of ranks, sees the same samples.

    Args:
        folder: what build_shards wrote.
        split: "train" or "val".
        window: tokens in a row.
        seed: of order and offsets.
    Raises: ValueError for shards that are missing or damaged, or hold less than one window.
    """

    def __init__(self, folder: str | Path, split: str, *, window: int, seed: int = 0) -> None:
        self.tokens, self.starts = _open_split(Path(folder), split)
        if not 1 <= window <= len(self.tokens):
            raise ValueError(
                f"A window is {window} tokens and the {split} split has {len(self.tokens)}: "
                "choose a window between 1 and that, or give more text."
            )
        self.window = window
        self.seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self.tokens) // self.window

    def batch(self, first_sample: int, batch_size: int) -> Batch:
        """Samples first_sample to first_sample + batch_size - 1, counted from the start of training.

        Raises: ValueError for a batch of no samples.
        """
        _check_batch_size(batch_size)
        begins = [self._begin(sample) for sample in range(first_sample, first_sample + batch_size)]
        positions = (np.array(begins)[:, None] + np.arange(self.window)) % len(self.tokens)  # (b, w)
        documents_at = np.searchsorted(self.starts, positions, side="right") - 1
        opens = self.starts[documents_at] == positions
        opens[:, 0] = False  # whatever a row begins with is its document 0
        input_ids = self.tokens[positions].astype(np.int64)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(opens.cumsum(axis=1, dtype=np.int64)))

    def _begin(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self))
        if epoch not in self._orders:
            generator = np.random.default_rng([self.seed, epoch])
            begins = generator.integers(self.window) + self.window * generator.permutation(len(self))
            # A batch spans few epochs: keeping the latest two bounds the memory.
            self._orders = dict([*self._orders.items(), (epoch, begins)][-2:])
        return int(self._orders[epoch][place])


# ---- validation ----------------------------------------------------------------------------------


class ValidationBatch(NamedTuple):
    """Rows that hold part of one document each; `document_ids` is 0, or -1 on the padding at the end.

    `documents` says which held-out document a row belongs to, by its number in shard order.
    """

    input_ids: Int64[Tensor, "b w"]
    document_ids: Int64[Tensor, "b w"]
    documents: Int64[Tensor, "b"]


class ValidationBatches:
    """All held-out tokens, document by document, every token but a document's first predicted exactly once.

    Consecutive windows of a document share one token: the last of one, predicted there, is the first of the
    next, where it is only context. So in every row each token after the first is to be predicted, and padding
    (document id -1) is not. A document's own first token has nothing before it; `bits_per_byte` charges it as
    if every id were equally likely.

    Args:
        folder, window: as for PackedWindows.
        batch_size: rows; the last batch may have fewer.
        documents: only these, by their number in shard order; None means all.
    Raises: ValueError for shards that are missing or damaged, a window below 2 or a batch of no rows.
    """

    def __init__(
        self, folder: str | Path, *, window: int, batch_size: int, documents: Sequence[int] | None = None
    ) -> None:
        if window < 2:
            raise ValueError(f"A window of {window} predicts nothing: choose 2 tokens or more.")
        _check_batch_size(batch_size)
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.tokens, self.starts = _open_split(self.folder, "val")
        self.window = window
        self.batch_size = batch_size
        self.documents = range(len(self.meta.val_bytes)) if documents is None else documents

    def __len__(self) -> int:
        """Batches in one pass."""
        predicted = np.diff(self.starts)[list(self.documents)] - 1
        rows = int((-(-predicted // (self.window - 1))).sum())
        return -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        rows = self._rows()
        while some := list(islice(rows, self.batch_size)):
            input_ids = torch.full((len(some), self.window), self.meta.eos_id)
            document_ids = torch.full((len(some), self.window), -1)
            for row, (_, begin, end) in enumerate(some):
                input_ids[row, : end - begin] = torch.from_numpy(self.tokens[begin:end].astype(np.int64))
                document_ids[row, : end - begin] = 0
            yield ValidationBatch(input_ids, document_ids, torch.tensor([document for document, *_ in some]))

    def _rows(self) -> Iterator[tuple[int, int, int]]:
        for document in self.documents:
            start, end = self.starts[document : document + 2].tolist()
            for begin in range(start, end - 1, self.window - 1):
                yield document, begin, min(begin + self.window, end)

    def bytes_of(self, document: int) -> int:
        """UTF-8 bytes of a document's original text."""
        return self.meta.val_bytes[document]

    def bits_per_byte(self, nats: float, *, document: int | None = None) -> float:
        """Bits to send the text with the model, per UTF-8 byte of it.

        A whole code length, so it compares with a file compressor's: it counts every predicted token,
        `<|endoftext|>` included, and log2(vocab_size) bits for each document's first.

        Args:
            nats: cross-entropy summed over the predicted tokens, of one document or of all.
            document: which one; None for all that are iterated over.
        """
        measured = self.documents if document is None else [document]
        size = sum(map(self.bytes_of, measured))
        return (nats / math.log(2) + len(measured) * math.log2(self.meta.vocab_size)) / size

    def part(self, tokens: int) -> "ValidationBatches":
        """About so many of the held-out tokens, at least one document: a fixed draw, for a look during training."""
        lengths, chosen = np.diff(self.starts), []
        for document in np.random.default_rng(0).permutation(list(self.documents)).tolist():
            if tokens >= lengths[document]:
                chosen.append(document)
                tokens -= int(lengths[document])
        chosen = sorted(chosen) or [min(self.documents, key=lambda document: lengths[document])]
        return ValidationBatches(self.folder, window=self.window, batch_size=self.batch_size, documents=chosen)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: choose 1 or more.")


class Baseline(NamedTuple):
    """What file compressors make of a document, in bits per UTF-8 byte of it."""

    name: str
    utf8_bytes: int
    gzip: float
    xz: float


def compression_baselines(texts: Iterable[tuple[str, str]]) -> list[Baseline]:
    """Compress each (name, text) by itself with gzip -9 and xz -9: a bar that a trained model should pass."""
    results = []
    for name, text in texts:
        raw = text.encode()
        # xz -9 with its dictionary no larger than the text: the same output for a fraction of its 674 MiB.
        lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(raw), 4096), 64 << 20)}
        sizes = len(gzip.compress(raw, 9, mtime=0)), len(lzma.compress(raw, filters=[lzma2]))
        results.append(Baseline(name, len(raw), *(8 * size / len(raw) for size in sizes)))
    return results
