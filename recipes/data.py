"""Tokenize a large corpus in parallel, once, into a folder that `recipes.pretrain` reads.

    python -m recipes.data --source my/corpus --tokenizer bpe:16384 --out corpora/mine
    python -m recipes.pretrain --data mine=corpora/mine --out runs/mine

The source is divided into parts; each is tokenized by one process and written under its own name when it is complete.
A run that is killed goes on with the parts that are missing. Then all parts are joined in their order: of exact copies
the first is kept, and a document is held out by a hash of its text. So the result does not depend on the number of
processes, on kills, or on which other documents there are.
"""

import io
import json
import os
import shutil
import sys
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layers.deprecation import renamed_names
from recipes.pretrain import exit_status
from recipes.training.documents import HUB, digest, documents, files_of, share_of
from recipes.training.settings import named_tokenizer
from recipes.training.shards import SPLITS, Meta, read_meta
from recipes.training.tokenizer import (
    document_decoder,
    document_encoder,
    eos_id,
    explain_full_disk,
    load_tokenizer,
    save_tokenizer,
    write_atomically,
)

PARTS = "parts"  # folder of finished parts inside OUT
HUB_ROWS = 20_000  # documents in a part of a dataset of Hugging Face
MOVED = ["Baseline", "Batch", "PackedWindows", "ValidationBatch", "ValidationBatches", "compression_baselines"]

__getattr__ = renamed_names(__name__, {name: f"recipes.training.data.{name}" for name in MOVED})  # it had this name


@dataclass(frozen=True)
class Options:
    """Tokenize a corpus for pretraining.

    Attributes:
        source: "stdlib", a folder, a glob, a .jsonl or .parquet file, or "hf:NAME".
        out: the folder to write.
        tokenizer: "bytes", "bpe:N" (learned from the training documents), a tokenizer.json or a folder with one.
        fim: add the marks of fill-in-the-middle to the tokenizer.
        workers: processes; 0 means one a CPU.
        part_megabytes: text in a part; a smaller number loses less when killed.
        validation_share: share of the documents that are held out.
        seed: of the choice of held-out documents.
    """

    source: str = "stdlib"
    out: Path = Path("corpora/stdlib")
    tokenizer: str = "bpe:4096"
    fim: bool = False
    workers: int = 0
    part_megabytes: float = 32.0
    validation_share: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: choose one between 0 and 1, such as 0.01.")
        if self.workers < 0 or not self.part_megabytes > 0:
            raise ValueError("workers must not be negative, and part_megabytes must be above 0.")


class Piece(NamedTuple):
    """Documents of one part: all of a file, lines of a .jsonl file, or rows of a .parquet file or a dataset.

    `begin` and `end` count bytes of a .jsonl file, and row groups of a .parquet file; (0, -1) is all of the file.
    """

    name: str
    path: str
    begin: int = 0
    end: int = -1


@dataclass(frozen=True)
class Report:
    """What `prepare` made; also OUT/report.json.

    Attributes:
        skipped: documents left out, by reason: "unreadable", "empty", "copies".
        seconds: of this call, without those before a kill.
    """

    documents: dict[str, int]
    tokens: dict[str, int]
    utf8_bytes: dict[str, int]
    skipped: dict[str, int]
    bytes_per_token: float
    parts: int
    seconds: float


def prepare(options: Options, *, console: Console | None = None) -> Report:
    """Tokenize `options.source` into `options.out`, or go on with what a killed call left there.

    Raises: ValueError for a source or tokenizer that does not serve, or a folder that holds another corpus; OSError for
        a full disk.
    """
    console, begun, out = Console(stderr=True) if console is None else console, time.monotonic(), options.out
    if not options.source.startswith(HUB) and out.resolve().is_relative_to(Path(options.source).resolve()):
        raise ValueError(f"{out} lies inside {options.source} and would become part of it: choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    pieces = parts_of(options.source, int(options.part_megabytes * 1e6))
    plan = _plan(options, pieces)
    if (out / "plan.json").is_file() and json.loads((out / "plan.json").read_bytes()) != plan:
        raise ValueError(f"{out} holds another corpus, or its source has changed: delete it or choose another --out.")
    write_atomically(out / "plan.json", json.dumps(plan).encode())
    if (out / "report.json").is_file():
        return Report(**json.loads((out / "report.json").read_bytes()))
    if not (out / "tokenizer.json").is_file():
        save_tokenizer(named_tokenizer(options.tokenizer, [options.source], fim=options.fim), out)
    if options.source.startswith(HUB):
        count = _tokenize_hub(options, console)
    else:
        count = len(pieces)
        _tokenize(options, pieces, console)
    meta = _join(options, count, console)
    total = sum(meta.tokens.values())
    report = Report(
        documents=meta.documents,
        tokens=meta.tokens,
        utf8_bytes=meta.utf8_bytes,
        skipped=meta.skipped,
        bytes_per_token=sum(meta.utf8_bytes.values()) / max(total, 1),
        parts=count,
        seconds=time.monotonic() - begun,
    )
    write_atomically(out / "report.json", (json.dumps(asdict(report), indent=1) + "\n").encode())
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return report


def parts_of(source: str, size: int) -> list[list[Piece]]:
    """The parts of a source, of about `size` bytes each; none for a dataset of Hugging Face, whose size is unknown."""
    parts: list[list[Piece]] = [[]]
    filled = 0
    for name, path in [] if source.startswith(HUB) else files_of(source):
        length = path.stat().st_size
        if path.suffix == ".jsonl" and length > size:
            spans = [Piece(name, str(path), a, min(a + size, length)) for a in range(0, length, size)]
        elif path.suffix == ".parquet":
            spans = [Piece(name, str(path), a, a + 1) for a in range(_row_groups(path))]
        else:
            spans = [Piece(name, str(path))]
        for span in spans:
            parts[-1].append(span)
            filled += length // len(spans)
            if filled >= size:
                parts.append([])
                filled = 0
    return [part for part in parts if part]


def _row_groups(path: Path) -> int:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"Reading {path} needs pyarrow: pip install pyarrow.") from error
    return parquet.ParquetFile(path).num_row_groups


def _plan(options: Options, pieces: list[list[Piece]]) -> dict[str, Any]:
    """What must be the same for a killed call to go on: the options, and the files with their sizes and times."""
    named = {piece.path for part in pieces for piece in part}
    files = {path: [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in sorted(named)}
    asked = {key: value for key, value in asdict(options).items() if key not in ("out", "workers")}
    return {"options": asked, "files": files}


def _tokenize(options: Options, parts: list[list[Piece]], console: Console) -> None:
    """Tokenize the parts that are missing, in several processes."""
    left = [i for i in range(len(parts)) if not _part(options.out, i).is_file()]
    workers = min(options.workers or os.cpu_count() or 1, max(len(left), 1))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, shown = bar.add_task("parts", total=len(parts), completed=len(parts) - len(left)), time.monotonic()
        for finished, _ in enumerate(_in_processes(options.out, {i: parts[i] for i in left}, workers), start=1):
            bar.advance(task)
            if not console.is_terminal and time.monotonic() - shown > 10:
                shown = time.monotonic()
                console.print(f"{finished + len(parts) - len(left)} of {len(parts)} parts", highlight=False)


def _in_processes(out: Path, parts: dict[int, list[Piece]], workers: int) -> Iterator[None]:
    """Tokenize parts, one after another or in several processes; yields at the end of each."""
    if workers == 1:
        for number, pieces in parts.items():
            tokenize_part(str(out), number, pieces)
            yield
        return
    # New processes: a fork would copy the locks of threads that the tokenizer has started.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(tokenize_part, str(out), number, pieces) for number, pieces in parts.items()]
        try:
            for done in as_completed(running):
                done.result()
                yield
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _tokenize_hub(options: Options, console: Console) -> int:
    """As `_tokenize`, of a streamed dataset; finished parts are skipped over. Returns the number of parts."""
    skipped, batch, unreadable, number = list[str](), list[tuple[str, str]](), 0, 0
    rows = documents(options.source, skipped=skipped)

    def flush() -> None:
        nonlocal number, batch, unreadable
        if not _part(options.out, number).is_file():
            _write_part(options.out, number, batch, len(skipped) - unreadable)
        console.print(f"{number + 1} parts, {HUB_ROWS * number + len(batch):,} documents", highlight=False)
        unreadable, number, batch = len(skipped), number + 1, []

    for row in rows:
        batch.append(row)
        if len(batch) == HUB_ROWS:
            flush()
    if batch:
        flush()
    return number


def tokenize_part(out: str, number: int, pieces: list[Piece]) -> None:
    """Tokenize one part and write its file."""
    skipped: list[str] = []
    texts = [found for piece in pieces for found in _read(piece, skipped)]
    _write_part(Path(out), number, texts, len(skipped))


def _read(piece: Piece, skipped: list[str]) -> Iterator[tuple[str, str]]:
    path = Path(piece.path)
    if piece.end < 0:
        for name, text in documents(path, skipped=skipped):
            yield (piece.name + name.removeprefix(path.name)), text
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError(f'{path} has no column "text": rename the column that holds it.')
        for group in range(piece.begin, piece.end):
            for row, text in enumerate(file.read_row_group(group, columns=["text"]).column(0).to_pylist()):
                if isinstance(text, str):
                    yield f"{piece.name}:{group}.{row}", text
                else:
                    skipped.append(f"{piece.name}:{group}.{row}")
    else:
        yield from _lines(piece, path, skipped)


def _lines(piece: Piece, path: Path, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """The lines that begin in the piece; documents are named by the byte at which they begin."""
    with path.open("rb") as file:
        file.seek(max(piece.begin - 1, 0))
        if piece.begin:
            file.readline()  # the rest of a line that begins before
        while (at := file.tell()) < piece.end:
            line = file.readline()
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path} at byte {at}: no JSON with a field "text" ({error}): correct it.') from error
            try:
                text.encode()
            except (AttributeError, UnicodeEncodeError):  # no string, or an unpaired surrogate
                skipped.append(f"{piece.name}:{at}")
                continue
            yield f"{piece.name}:{at}", text


def _part(out: Path, number: int) -> Path:
    return out / PARTS / f"{number:06d}.npz"


def _write_part(out: Path, number: int, texts: list[tuple[str, str]], unreadable: int) -> None:
    """Write tokens, lengths, digests, sizes and names of documents, empty ones among them."""
    tokenizer = load_tokenizer(out)
    encode, decode = document_encoder(tokenizer), document_decoder(tokenizer)
    encoded = encode([text for _, text in texts])
    for (name, text), back in zip(texts, decode(encoded), strict=True):
        if text != back:
            raise ValueError(
                f"The tokenizer loses text of the document {name}, so bits per byte would be too low: choose "
                '"bytes" or "bpe:4096", or leave the document out.'
            )
    content = io.BytesIO()
    np.savez(
        content,
        tokens=np.concatenate([*encoded, np.zeros(0, np.uint32)]).astype("<u4"),
        lengths=np.array([len(ids) for ids in encoded], dtype=np.int64),
        digests=np.array([digest(text) for _, text in texts], dtype="S64"),
        sizes=np.array([len(text.encode()) for _, text in texts], dtype=np.int64),
        names=np.frombuffer(json.dumps([name for name, _ in texts]).encode(), dtype=np.uint8),
        unreadable=np.array(unreadable),
    )
    path = _part(out, number)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, content.getvalue())


def _join(options: Options, count: int, console: Console) -> Meta:
    """Join the parts in their order into shards; meta.json is written last, so that no reader sees half of them."""
    out, tokenizer = options.out, load_tokenizer(options.out)
    eos, seen = eos_id(tokenizer), set[bytes]()
    starts = {split: array("q", [0]) for split in SPLITS}
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    skipped, val_names, fingerprints = {"unreadable": 0, "empty": 0, "copies": 0}, list[str](), list[str]()
    (out / "meta.json").unlink(missing_ok=True)
    with explain_full_disk(out):
        files = {split: (out / f"{split}.bin").open("wb") for split in SPLITS}
        try:
            for number in range(count):
                with np.load(_part(out, number), allow_pickle=False) as part:
                    tokens, lengths, sums = part["tokens"], part["lengths"].tolist(), part["digests"].tolist()
                    names, bytes_of = json.loads(part["names"].tobytes()), part["sizes"].tolist()
                    skipped["unreadable"] += int(part["unreadable"])
                at = 0
                for name, length, key, size in zip(names, lengths, sums, bytes_of, strict=True):
                    begin, at = at, at + length
                    if not size or key in seen:
                        skipped["copies" if size else "empty"] += 1
                        continue
                    seen.add(key)
                    split = "val" if share_of(key.decode(), options.seed) < options.validation_share else "train"
                    files[split].write(np.append(tokens[begin:at], np.uint32(eos)).astype("<u4").tobytes())
                    starts[split].append(starts[split][-1] + length + 1)
                    sizes[split].append(size)
                    fingerprints.append(f"{split} {key.decode()}")
                    if split == "val":
                        val_names.append(name)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in files.values():
                file.close()
        for split in SPLITS:
            if not sizes[split]:
                raise ValueError(
                    f"No document is left for the {'training' if split == 'train' else 'held-out'} split of "
                    f"{options.source}: give more text, or another --validation-share."
                )
            index = io.BytesIO()
            np.save(index, np.array(starts[split], dtype=np.int64))
            write_atomically(out / f"{split}.idx.npy", index.getvalue())
        meta = Meta(
            fingerprint=digest(json.dumps([tokenizer.to_str(), fingerprints])),
            eos_id=eos,
            vocab_size=tokenizer.get_vocab_size(),
            dtype="uint32",
            tokens={split: starts[split][-1] for split in SPLITS},
            documents={split: len(sizes[split]) for split in SPLITS},
            utf8_bytes={split: sum(sizes[split]) for split in SPLITS},
            val_names=val_names,
            val_bytes=sizes["val"],
            skipped=skipped,
            note="",
        )
        write_atomically(out / "meta.json", json.dumps(asdict(meta), indent=1).encode())
    console.print(f"{count} parts joined in {out}.", highlight=False)
    return read_meta(out)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        options = tyro.cli(Options, args=args, prog="python -m recipes.data")
        made = prepare(options)
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in made.skipped.items() if n) or "none"
        print(
            f"{options.out}: {made.documents['train']:,} documents and {made.tokens['train']:,} tokens to train on, "
            f"{made.documents['val']:,} and {made.tokens['val']:,} held out; {made.bytes_per_token:.2f} bytes a token; "
            f"left out: {left_out}; {made.seconds:.1f} s."
        )

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
