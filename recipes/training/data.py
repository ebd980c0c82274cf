"""Make batches from token shards: packed windows for training, held-out documents, and compressors as a baseline.

    train = PackedWindows("runs/data", "train", window=1024, seed=0)
    batch = train.batch(samples_seen, 8)

Shapes: b rows of a batch, w tokens of a window. Documents are always separate sequences: every batch has the document
number of each token.
"""

import gzip
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from recipes.training.shards import open_split, read_meta


class Batch(NamedTuple):
    """Rows of consecutive tokens (b, w); `document_ids` (b, w) numbers the documents within each row from 0."""

    input_ids: Int64[Tensor, "b w"]
    document_ids: Int64[Tensor, "b w"]


class LabelledBatch(NamedTuple):
    """A `Batch` with labels (b, w): the token itself where it is to be predicted, -100 elsewhere."""

    input_ids: Int64[Tensor, "b w"]
    document_ids: Int64[Tensor, "b w"]
    labels: Int64[Tensor, "b w"]


class PackedWindows:
    """Windows of the token stream in random order, as a pure function of the number of samples seen.

    Each epoch cuts the stream into windows from a random offset, so that the cuts differ between epochs, and visits
    them in random order. The stream is a ring: a window at its end continues with the first document. An epoch leaves
    out `tokens % window` tokens.

    Calls are independent: rank r of n takes batch(seen + r * size, size), and the run then adds n * size to `seen`. A
    run that resumes from this integer sees the same samples on any number of ranks.

    Args:
        folder: folder written by build_shards.
        split: "train" or "val".
        window: tokens in a row.
        seed: random seed of order and offsets.
    Raises: ValueError for missing or damaged shards, or fewer tokens than one window.
    """

    def __init__(self, folder: str | Path, split: str, *, window: int, seed: int = 0) -> None:
        self.tokens, self.starts = open_split(Path(folder), split)
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

        Raises: ValueError for a batch_size below 1.
        """
        _check_batch_size(batch_size)
        begins = [self._begin(sample) for sample in range(first_sample, first_sample + batch_size)]
        positions = (np.array(begins)[:, None] + np.arange(self.window)) % len(self.tokens)  # (b, w)
        documents_at = np.searchsorted(self.starts, positions, side="right") - 1
        opens = self.starts[documents_at] == positions
        opens[:, 0] = False  # the first token of a row always belongs to document 0
        input_ids = self.tokens[positions].astype(np.int64)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(opens.cumsum(axis=1, dtype=np.int64)))

    def _begin(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self))
        if epoch not in self._orders:
            generator = np.random.default_rng([self.seed, epoch])
            begins = generator.integers(self.window) + self.window * generator.permutation(len(self))
            # A batch rarely spans more than two epochs; keeping only two bounds the memory.
            self._orders = dict([*self._orders.items(), (epoch, begins)][-2:])
        return int(self._orders[epoch][place])


class ValidationBatch(NamedTuple):
    """Rows (b, w) with part of one document each; `document_ids` is 0, or -1 for the padding at the end.

    `documents` (b) has the number of each row's held-out document, in shard order.
    """

    input_ids: Int64[Tensor, "b w"]
    document_ids: Int64[Tensor, "b w"]
    documents: Int64[Tensor, "b"]


class ValidationBatches:
    """All held-out tokens, document by document; every token except a document's first is predicted exactly once.

    Consecutive windows of a document share one token: the last one of a window, predicted there, is the first of the
    next, where it is only context. So every token after the first of a row is predicted, except padding (document id
    -1). For a document's own first token `bits_per_byte` assumes that all ids are equally likely.

    Args:
        folder, window: as for PackedWindows.
        batch_size: rows; the last batch may have fewer.
        documents: numbers of the documents in shard order; None means all.
    Raises: ValueError for missing or damaged shards, a window below 2 or a batch_size below 1.
    """

    def __init__(
        self, folder: str | Path, *, window: int, batch_size: int, documents: Sequence[int] | None = None
    ) -> None:
        if window < 2:
            raise ValueError(f"A window of {window} predicts nothing: choose 2 tokens or more.")
        _check_batch_size(batch_size)
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.tokens, self.starts = open_split(self.folder, "val")
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
        """Code length of the text under the model, in bits per UTF-8 byte.

        It is complete, so that it can be compared with a file compressor's: it counts every predicted token, including
        `<|endoftext|>`, and log2(vocab_size) bits for each document's first token.

        Args:
            nats: cross-entropy summed over the predicted tokens, of one document or of all.
            document: number of the document; None for all of them.
        """
        measured = self.documents if document is None else [document]
        size = sum(map(self.bytes_of, measured))
        return (nats / math.log(2) + len(measured) * math.log2(self.meta.vocab_size)) / size

    def part(self, tokens: int) -> "ValidationBatches":
        """A fixed random part with about `tokens` held-out tokens, at least one document, for use during training."""
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
    """The compressed size of a document with file compressors, in bits per UTF-8 byte."""

    name: str
    utf8_bytes: int
    gzip: float
    xz: float


def compression_baselines(texts: Iterable[tuple[str, str]]) -> list[Baseline]:
    """Compress each (name, text) separately with gzip -9 and xz -9, as a baseline for a trained model."""
    results = []
    for name, text in texts:
        raw = text.encode()
        # xz -9 with a dictionary no larger than the text: equal output with a fraction of its 674 MiB of memory.
        lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(raw), 4096), 64 << 20)}
        sizes = len(gzip.compress(raw, 9, mtime=0)), len(lzma.compress(raw, filters=[lzma2]))
        results.append(Baseline(name, len(raw), *(8 * size / len(raw) for size in sizes)))
    return results
