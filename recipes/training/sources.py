"""Several sources of text, each with a name and a weight, and the windows that training draws from them.

--data stdlib                                     one source
--data code=my/code@0.7 prose=my/books.jsonl@0.3  70 % of the windows from code, 30 % from prose
--data web=hf:HuggingFaceFW/fineweb-edu           a dataset of Hugging Face, streamed
--data corpora/code                               a folder that `python -m recipes.data` wrote
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.training.data import Batch, LabelledBatch, PackedWindows
from recipes.training.shards import open_split

FORM = re.compile(r"(?:(?P<name>[A-Za-z0-9_.-]+)=)?(?P<place>.+?)(?:@(?P<weight>[0-9.eE+-]+))?$")
BLOCK = 1024  # samples after which each source has had its exact share
SHORTEST_FIM = 16  # tokens of a document's part; shorter ones stay as they are


class Source(NamedTuple):
    """A source of text; weights need not sum to 1."""

    name: str
    place: str
    weight: float = 1.0


def parse_sources(data: Sequence[str]) -> list[Source]:
    """The sources of `--data`. Raises: ValueError for a weight that is no number above 0, or two equal names."""
    found = []
    for text in data:
        match = FORM.match(text)
        place = text if match is None else match["place"]
        name = match["name"] if match and match["name"] else (Path(place.removeprefix("hf:")).stem or "text")
        try:
            weight = float(match["weight"]) if match and match["weight"] else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"The weight of {text!r} is no number above 0: write NAME=SOURCE@0.5.")
        found.append(Source(re.sub(r"[^A-Za-z0-9_.-]", "_", name), place, weight))
    names = [source.name for source in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two sources are called {twice[0]!r}: give each a name, as in code=my/code@0.5.")
    return found


class Windows(Protocol):
    """The source of batches, a pure function of the number of samples seen."""

    def batch(self, first_sample: int, batch_size: int) -> Batch | LabelledBatch: ...


class BestFitWindows:
    """Windows filled with whole documents, each into the fullest window that has room; the rest is padding.

    Documents longer than a window are cut into pieces. So fewer documents are cut than in a stream that is cut every
    `window` tokens, and a token loses its context less often. Source: arXiv:2404.10830, best-fit packing.

    Args and batches are those of `PackedWindows`; padding has document id -1. Packing is the same in every epoch, the
    order of windows is not.
    Raises: as `PackedWindows`.
    """

    def __init__(self, folder: str | Path, split: str, *, window: int, seed: int = 0) -> None:
        self.tokens, starts = open_split(Path(folder), split)
        if window < 2 or not len(self.tokens):
            raise ValueError(f"A window of {window} tokens cannot be packed: choose 2 or more, and give some text.")
        self.window, self.seed = window, seed
        self.begins, self.lengths = _pieces(starts, window)
        self.bins = best_fit(self.lengths, window)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        self.padding = 1 - len(self.tokens) / (len(self.bins) * window)  # share of the tokens of an epoch

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self.bins)

    def batch(self, first_sample: int, batch_size: int) -> Batch:
        """As `PackedWindows.batch`."""
        ids = torch.zeros(batch_size, self.window, dtype=torch.int64)
        documents = torch.full((batch_size, self.window), -1)
        for row in range(batch_size):
            at = 0
            for number, piece in enumerate(self.bins[self._bin(first_sample + row)]):
                begin, length = int(self.begins[piece]), int(self.lengths[piece])
                ids[row, at : at + length] = torch.from_numpy(self.tokens[begin : begin + length].astype(np.int64))
                documents[row, at : at + length] = number
                at += length
        return Batch(ids, documents)

    def _bin(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return int(self._order[1][place])


def _pieces(starts: NDArray[np.int64], window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the pieces of all documents begin, and their lengths."""
    counts = -(-np.diff(starts) // window)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[document] + number * window
    return begins, np.minimum(begins + window, starts[document + 1]) - begins


def best_fit(lengths: NDArray[np.int64], window: int) -> list[list[int]]:
    """Numbers of the pieces in each window, the longest pieces placed first."""
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(window + 1)]  # bins by the tokens that they have room for
    some = 0  # bit s is set where with_space[s] holds a bin
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = some >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            chosen = with_space[space].pop()
            if not with_space[space]:
                some &= ~(1 << space)
            bins[chosen].append(piece)
        else:
            space, chosen = window, len(bins)
            bins.append([piece])
        if space > length:
            with_space[space - length].append(chosen)
            some |= 1 << (space - length)
    return bins


class Mixture:
    """Windows of several sources, each as often as its weight says, as a pure function of the number of samples seen.

    Of every 1024 samples each source has its exact share, in random order.
    """

    def __init__(self, sources: Sequence[Windows], weights: Sequence[float], *, seed: int = 0) -> None:
        shares = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK
        counts = np.floor(shares).astype(np.int64)
        for i in np.argsort(counts - shares, kind="stable")[: BLOCK - int(counts.sum())]:  # the largest remainders
            counts[i] += 1
        if not counts.all():
            raise ValueError(f"A weight is below 1/{BLOCK} of all: leave the source out, or give it more.")
        self.sources, self.counts, self.seed = list(sources), counts, seed
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] = (-1, counts, counts)

    def where(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples of that source came before it."""
        block, place = divmod(sample, BLOCK)
        if self._block[0] != block:
            order = np.repeat(np.arange(len(self.counts)), self.counts)
            order = np.random.default_rng([self.seed, 1, block]).permutation(order)
            rank = np.zeros(BLOCK, dtype=np.int64)
            for source in range(len(self.counts)):
                rank[order == source] = np.arange(self.counts[source])
            self._block = block, order, rank
        source = int(self._block[1][place])
        return source, block * int(self.counts[source]) + int(self._block[2][place])

    def batch(self, first_sample: int, batch_size: int) -> Batch:
        """As `PackedWindows.batch`."""
        rows = [self.where(sample) for sample in range(first_sample, first_sample + batch_size)]
        found = [self.sources[source].batch(index, 1) for source, index in rows]
        return Batch(torch.cat([b.input_ids for b in found]), torch.cat([b.document_ids for b in found]))


class FillInTheMiddle:
    """Turns a share of the documents in each window into prefix, suffix, middle, each behind its own token.

    A document's part in a window keeps its length: its last three tokens, but never the end mark, make room for the
    three marks. The choice is a pure function of the sample's number. Source: arXiv:2207.14255, "PSM" order.

    Args:
        marks: ids of <|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>.
        eos: id that ends a document.
    """

    def __init__(self, windows: Windows, share: float, *, marks: tuple[int, int, int], eos: int, seed: int = 0) -> None:
        self.windows, self.share, self.marks, self.eos, self.seed = windows, share, marks, eos, seed

    def batch(self, first_sample: int, batch_size: int) -> Batch:
        """As `PackedWindows.batch`."""
        batch = self.windows.batch(first_sample, batch_size)
        ids, documents = batch.input_ids.clone(), batch.document_ids
        for row in range(batch_size):
            generator = np.random.default_rng([self.seed, 2, first_sample + row])
            numbers, counts = np.unique(documents[row].numpy(), return_counts=True)
            at = 0
            for number, length in zip(numbers.tolist(), counts.tolist(), strict=True):
                if number < 0:  # padding, which stands at the end but sorts first
                    continue
                if generator.random() < self.share and length >= SHORTEST_FIM:
                    ids[row, at : at + length] = self._turned(ids[row, at : at + length], generator)
                at += length
        return Batch(ids, documents)

    def _turned(self, part: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        end = part[-1:] if int(part[-1]) == self.eos else part[:0]
        body = part[: len(part) - len(end) - 3]
        a, b = sorted(generator.integers(0, len(body) + 1, 2).tolist())
        prefix, suffix, middle = (part.new_tensor([mark]) for mark in self.marks)
        return torch.cat((prefix, body[:a], suffix, body[b:], middle, body[a:b], end))


def training_windows(
    folders: Sequence[Path], weights: Sequence[float], *, packing: str, window: int, seed: int
) -> Windows:
    """The training windows of one source, or of several by their weights."""
    kind = BestFitWindows if packing == "best_fit" else PackedWindows
    found: list[Windows] = [kind(folder, "train", window=window, seed=seed) for folder in folders]
    return found[0] if len(found) == 1 else Mixture(found, weights, seed=seed)
