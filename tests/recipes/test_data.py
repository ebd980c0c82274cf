"""From text to batches: no text is lost, held-out text is separate, batches are reproducible after a restart."""

import errno
import gzip
import json
import lzma
import math
import os
import re
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

import recipes.training.documents
import recipes.training.shards
from recipes.training.data import PackedWindows, ValidationBatches, compression_baselines
from recipes.training.documents import documents, plan_split, split_documents
from recipes.training.shards import build_shards, read_meta
from recipes.training.tokenizer import (
    EOS,
    byte_tokenizer,
    document_encoder,
    eos_id,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    write_atomically,
)

TEXTS = [f"document {i}\n" + "héllo wörld 😀 " * (i % 7) + f"ends with {i}" for i in range(40)]
# Difficult texts: combining marks, control characters, CRLF, spaces at both ends, special tokens as text.
HARD = [
    "",
    " ",
    "\r\n\r\n",
    "\x00\x7f",
    "e\u0301 é ﬁ",
    " a  b ",
    "don't .",
    f"{EOS} inside {EOS}",
    "👩‍👩‍👧",
    "\ufeffbom",
]
BYTES, SMALL_BPE = byte_tokenizer(), train_bpe(TEXTS, vocab_size=280)
encode_bytes, encode_bpe = document_encoder(BYTES), document_encoder(SMALL_BPE)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("deep" if i % 2 else ".") / f"{i:02}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture
def shards(corpus, tmp_path):
    folder = tmp_path / "shards"
    build_shards(corpus, byte_tokenizer(), folder, validation_share=0.2, progress=False)
    return folder


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, vocab_size=300)


def held_out(source, **options):
    return [
        (name, text) for split, name, text in split_documents(source, plan_split(source, **options)) if split == "val"
    ]


# ---- tokenizers


@pytest.mark.parametrize("text", HARD)
def test_a_document_comes_back_as_it_was(text, bpe):
    for tokenizer in (byte_tokenizer(), bpe):
        (ids,) = document_encoder(tokenizer)([text])
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        assert eos_id(tokenizer) not in ids  # text that spells the end token does not end a document


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_byte_ids_are_the_utf8_bytes(text):
    """The numpy path, Tokenizer.encode and str.encode agree. Text that spells EOS is covered above."""
    expected = list(text.encode())
    assert BYTES.encode(text).ids == expected
    assert encode_bytes([text])[0].tolist() == expected
    assert BYTES.decode(expected) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_bpe_round_trip(text):
    assert SMALL_BPE.decode(encode_bpe([text])[0].tolist(), skip_special_tokens=False) == text


def test_byte_ids_of_every_byte():
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == 257
    assert eos_id(tokenizer) == 256
    # Bytes that are not valid UTF-8 alone also have an id.
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    assert tokenizer.encode("\xff").ids == [0xC3, 0xBF]


def test_bpe_is_deterministic_and_ends_with_eos(bpe):
    assert train_bpe(reversed(TEXTS), vocab_size=300).to_str() == bpe.to_str()
    assert eos_id(bpe) == bpe.get_vocab_size() - 1 <= 299
    assert len(document_encoder(bpe)(TEXTS)[3]) < len(TEXTS[3].encode()) / 2
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* need 257"):
        train_bpe(TEXTS, vocab_size=256)


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(TEXTS, vocab_size=300)])
def test_transformers_opens_what_is_saved(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).to_str() == load_tokenizer(tmp_path / "tokenizer.json").to_str()
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()
    for opened in (
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert opened.eos_token_id == eos_id(tokenizer)
        for text in [*HARD, *TEXTS[:3]]:
            assert opened.encode(text) == tokenizer.encode(text).ids
            assert opened.decode(opened.encode(text)) == text


def test_padding_and_templates_stay_out_of_documents(bpe):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    loaded = Tokenizer.from_str(bpe.to_str())
    loaded.enable_truncation(3)
    loaded.enable_padding(length=50)
    loaded.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, eos_id(bpe))])
    for got, expected in zip(document_encoder(loaded)(TEXTS), document_encoder(bpe)(TEXTS), strict=True):
        assert np.array_equal(got, expected)
    assert loaded.truncation is not None


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"No tokenizer at .*: give a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=re.escape(f"lacks {EOS}")):
        save_tokenizer(Tokenizer(models.BPE()), tmp_path)


# ---- documents


def test_stdlib():
    names = [name for name, _ in documents("stdlib")]
    assert names == sorted(names)
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "test", "__pycache__"))
    text = dict(documents("stdlib"))["dataclasses.py"]
    assert text.encode() == (Path(sysconfig.get_path("stdlib")) / "dataclasses.py").read_bytes()


def test_every_kind_of_source_gives_the_same_texts(corpus, tmp_path):
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    (kinds / "a.jsonl").write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(40)}), kinds / "a.parquet")
    sources = [corpus, f"{corpus}/**/*.txt", kinds / "a.jsonl", kinds / "a.parquet"]
    for source in sources:
        assert sorted(text for _, text in documents(source)) == sorted(TEXTS)
    assert list(documents(corpus)) == list(documents(f"{corpus}/**/*.txt"))  # and the same names
    assert [name for name, _ in documents(kinds / "a.jsonl")][:2] == ["a.jsonl:1", "a.jsonl:3"]
    assert list(documents(corpus / "00.txt")) == [("00.txt", TEXTS[0])]
    assert len(list(documents(kinds))) == 80


def test_line_ends_and_marks_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    assert list(documents(tmp_path / "a.txt")) == [("a.txt", "\ufeffone\r\ntwo\r")]


def test_what_is_no_text_is_counted(corpus):
    (corpus / "image.png").write_bytes(b"\x89PNG\xff")
    (corpus / ".hidden").write_text("hidden")
    (corpus / "empty.txt").touch()
    (corpus / "copy.txt").write_text(TEXTS[0], encoding="utf-8")
    (corpus / "rows.jsonl").write_text('{"text": null}\n{"text": "\\ud800"}\n{"text": "good"}\n')
    skipped: list[str] = []
    names = [name for name, _ in documents(corpus, skipped=skipped)]
    assert skipped == ["image.png", "rows.jsonl:1", "rows.jsonl:2"]
    assert len(names) == 43
    plan = plan_split(corpus)
    assert plan.skipped == {"unreadable": 3, "empty": 1, "copies": 1}
    assert len(plan.splits) == 41
    assert "copy.txt" not in plan.splits  # "00.txt" sorts before it


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("none.txt", None, r'There is nothing at .*: give "stdlib", a folder, a glob or a file'),
        ("none*.txt", None, "holds no files: give a folder or a glob that does"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ("field.jsonl", b'{"content": "a"}\n', 'line 1 has no field "text": rename'),
        ("list.jsonl", b"[1]\n", 'line 1 has no field "text"'),
        ("binary.bin", b"\xff\xfe\x00", r"holds no text \(left out: .*'unreadable': 1"),
        ("empty.txt", b"", "holds no text"),
        ("short.txt", b"x", "holds one character: give a longer text"),
    ],
)
def test_a_source_that_does_not_serve(name, content, sentence, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        build_shards(tmp_path / name, byte_tokenizer(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_parquet_without_the_column_and_without_pyarrow(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match='has no column "text": rename'):
        list(documents(tmp_path / "a.parquet"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        list(documents(tmp_path / "a.parquet"))


# ---- the split


def test_split_is_whole_disjoint_and_by_text_only(corpus):
    plan = plan_split(corpus, validation_share=0.2)
    val = {name for name, split in plan.splits.items() if split == "val"}
    assert sorted(text for _, _, text in split_documents(corpus, plan)) == sorted(TEXTS)
    assert 0 < len(val) < 20
    assert plan_split(corpus, validation_share=0.2) == plan
    assert plan_split(corpus, validation_share=0.2, seed=1).splits != plan.splits
    # Adding, removing and renaming documents does not change the split of the others.
    (corpus / "aaa.txt").write_text("new")
    (corpus / "04.txt").unlink()
    after = plan_split(corpus, validation_share=0.2).splits
    assert all(after[name] == plan.splits[name] for name in after if name in plan.splits)
    for path in sorted(corpus.rglob("*.txt")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    renamed, side_of = plan_split(corpus, validation_share=0.2), {}
    for name, side in renamed.splits.items():
        side_of[renamed.digests[name]] = side
    assert all(side_of[plan.digests[name]] == side for name, side in after.items() if name in plan.digests)


def test_split_ignores_the_order_of_enumeration(corpus, monkeypatch):
    expected = plan_split(corpus)
    found = list(documents(corpus))[::-1]
    monkeypatch.setattr(recipes.training.documents, "documents", lambda source, skipped=None: iter(found))
    assert plan_split(corpus) == expected


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(corpus, share):
    assert set(plan_split(corpus, validation_share=share).splits.values()) == {"train", "val"}


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, math.nan])
def test_share_out_of_range(corpus, share):
    with pytest.raises(ValueError, match="choose one between 0 and 1"):
        plan_split(corpus, validation_share=share)


@pytest.mark.parametrize("text", ["line\n" * 100, "no line ends " * 50, "ab", "\n\n", "a\n" + "b" * 99])
def test_a_single_document_is_cut_near_the_end_of_a_line(tmp_path, text):
    (tmp_path / "book.txt").write_text(text)
    plan = plan_split(tmp_path / "book.txt", validation_share=0.1)
    assert plan.splits == {"book.txt (head)": "train", "book.txt (tail)": "val"}
    head, tail = (piece for _, _, piece in split_documents(tmp_path / "book.txt", plan))
    assert head + tail == text
    assert head
    assert tail
    assert head.endswith("\n") or "\n" not in text[:-1]
    meta = build_shards(tmp_path / "book.txt", byte_tokenizer(), tmp_path / "out", progress=False)
    assert "One document only" in meta.note


# ---- shards


def test_shards_hold_every_document_and_its_eos(corpus, shards):
    meta = read_meta(shards)
    texts = {}
    for split in ("train", "val"):
        tokens = np.fromfile(shards / f"{split}.bin", dtype="<u4")
        starts = np.load(shards / f"{split}.idx.npy")
        assert starts.dtype == np.int64
        assert len(tokens) == starts[-1] == meta.tokens[split] == meta.utf8_bytes[split] + meta.documents[split]
        pieces = [tokens[a:b] for a, b in pairwise(starts)]
        assert all(piece[-1] == meta.eos_id == 256 for piece in pieces)
        texts[split] = [bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces]
    assert sorted(texts["train"] + texts["val"]) == sorted(TEXTS)
    assert list(zip(meta.val_names, texts["val"], strict=True)) == held_out(corpus, validation_share=0.2)
    assert meta.val_bytes == [len(text.encode()) for text in texts["val"]]
    assert (meta.dtype, meta.vocab_size, meta.note) == ("uint32", 257, "")
    assert sorted(os.listdir(shards)) == ["meta.json", "train.bin", "train.idx.npy", "val.bin", "val.idx.npy"]


def test_same_inputs_are_reused_and_any_change_rebuilds(corpus, shards, bpe, monkeypatch):
    def build(tokenizer=None, **options):
        options = {"validation_share": 0.2, **options}
        return build_shards(corpus, tokenizer or byte_tokenizer(), shards, progress=False, **options).fingerprint

    first = read_meta(shards).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(recipes.training.shards, "_write_tokens", lambda *args: pytest.fail("built again"))
        assert build() == first
    seen = {first, build(seed=1), build(validation_share=0.3), build(bpe)}  # bpe last, because its eos is used below
    assert read_meta(shards).eos_id == eos_id(bpe)
    (corpus / "00.txt").write_text("changed")
    seen.add(build())
    (corpus / "00.txt").rename(corpus / "renamed.txt")
    seen.add(build())
    assert len(seen) == 6


def test_shards_inside_their_source(corpus):
    with pytest.raises(ValueError, match=r"lies inside .*: choose another folder"):
        build_shards(corpus, byte_tokenizer(), corpus / "shards", progress=False)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_document_that_the_tokenizer_cannot_spell_is_named(tmp_path, split):
    """Lost text costs no bits, so it is refused unless bytes are not measured."""
    tokenizer, source = Tokenizer.from_str(BYTES.to_str()), tmp_path / "text"
    tokenizer.normalizer = normalizers.NFC()
    source.mkdir()
    for i in range(12):
        (source / f"{i}.txt").write_text(f"text {i}")
    name = next(name for name, side in plan_split(source).splits.items() if side == split)
    assert build_shards(source, tokenizer, tmp_path / "shards", progress=False).documents["train"] == 11
    (source / name).write_bytes(b"a cafe\xcc\x81 " + name.encode())
    sentence = rf"The tokenizer loses text of the document {name}: at character 5 .* becomes .* Choose a tokenizer"
    with pytest.raises(ValueError, match=sentence):
        build_shards(source, tokenizer, tmp_path / "shards", progress=False)
    assert build_shards(source, tokenizer, tmp_path / "inexact", exact=False, progress=False).tokens["val"]
    with pytest.raises(ValueError, match=sentence):  # shards built without the check are checked again
        build_shards(source, tokenizer, tmp_path / "inexact", progress=False)


def test_a_failure_half_way_leaves_the_old_shards(corpus, shards, monkeypatch):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    (corpus / "new.txt").write_text("new")
    real = os.fsync
    calls = []

    for fails_at in range(1, 6):  # two token files, two indices, meta.json

        def fsync(descriptor, fails_at=fails_at):
            calls.append(descriptor)
            if len(calls) == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        calls.clear()
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"The disk that holds .* is full: nothing was changed; free some space"):
            build_shards(corpus, byte_tokenizer(), shards, progress=False)
        assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert len(PackedWindows(shards, "train", window=16)) > 0
    monkeypatch.setattr(os, "fsync", real)
    assert build_shards(corpus, byte_tokenizer(), shards, progress=False).documents["train"] > 0
    assert not list(shards.glob(".building-*"))


def test_what_killed_builds_left_is_removed(corpus, shards):
    """Except the folder of a running build."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (shards / f".building-{pid}-x").mkdir()
    (corpus / "new.txt").write_text("new")
    build_shards(corpus, byte_tokenizer(), shards, progress=False)
    assert [path.name for path in shards.glob(".building-*")] == [f".building-{os.getpid()}-x"]


def test_a_batch_of_no_rows(shards):
    with pytest.raises(ValueError, match=r"batch_size is 0: choose 1 or more"):
        PackedWindows(shards, "train", window=16).batch(0, 0)
    with pytest.raises(ValueError, match=r"batch_size is -1: choose 1 or more"):
        ValidationBatches(shards, window=16, batch_size=-1)


@pytest.mark.parametrize("moved", range(1, 6))
def test_killed_while_moving_in_leaves_no_mixture(corpus, shards, monkeypatch, moved):
    """There are no shards, or after the last move the new ones; a rebuild completes them."""
    (corpus / "new.txt").write_text("new")
    real, calls = os.replace, []

    def replace(source, target):
        real(source, target)
        calls.append(target)
        if len(calls) == moved:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        build_shards(corpus, byte_tokenizer(), shards, progress=False)
    monkeypatch.setattr(os, "replace", real)
    if moved < 5:
        with pytest.raises(ValueError, match=r"There are no shards in .*: write them with build_shards"):
            PackedWindows(shards, "train", window=16)
    meta = build_shards(corpus, byte_tokenizer(), shards, progress=False)
    assert sum(meta.documents.values()) == 41
    assert len(PackedWindows(shards, "train", window=16)) > 0


def test_a_document_that_changes_meanwhile(corpus):
    plan = plan_split(corpus)
    (corpus / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"00\.txt in .* changed while it was read: run again"):
        list(split_documents(corpus, plan))
    (corpus / "00.txt").unlink()
    with pytest.raises(ValueError, match="lost documents while it was read"):
        list(split_documents(corpus, plan))


def test_write_atomically_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="is full: nothing was changed"):
        write_atomically(tmp_path / "a.json", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.idx.npy", "val.idx.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_shards_are_refused_and_rebuilt(corpus, shards, name, damage):
    split = "val" if "val" in name else "train"
    whole = (shards / name).read_bytes()
    if damage == "cut":
        (shards / name).write_bytes(whole[:-4])
    else:
        (shards / name).unlink()
    with pytest.raises(ValueError, match=r"are damaged .* build them again|There are no shards"):
        PackedWindows(shards, split, window=16)
    build_shards(corpus, byte_tokenizer(), shards, validation_share=0.2, progress=False)
    assert (shards / name).read_bytes() == whole


# ---- training batches


@pytest.mark.parametrize("window", [1, 7, 64])
def test_any_division_into_batches_gives_the_same_samples(shards, window):
    """Over more than two epochs, with new objects, so that batches do not depend on earlier calls."""
    windows = PackedWindows(shards, "train", window=window, seed=3)
    total = min(2 * len(windows) + 5, 300)
    whole = windows.batch(0, total)
    assert whole.input_ids.shape == whole.document_ids.shape == (total, window)
    assert whole.input_ids.dtype == whole.document_ids.dtype == torch.int64
    for size in (1, 7, 64):
        fresh = PackedWindows(shards, "train", window=window, seed=3)
        for first in reversed(range(0, total - size, 2 * size + 1)):
            piece = fresh.batch(first, size)
            assert torch.equal(piece.input_ids, whole.input_ids[first : first + size])
            assert torch.equal(piece.document_ids, whole.document_ids[first : first + size])


@pytest.mark.parametrize("window", [4, 100])  # rows that start with a document, and rows with several
def test_document_ids_follow_the_boundaries(shards, window):
    """Oracle: within a row a new document begins exactly after each end-of-text token."""
    windows = PackedWindows(shards, "train", window=window, seed=0)
    batch = windows.batch(0, 2 * len(windows))
    after_eos = (batch.input_ids[:, :-1] == 256).long()
    assert (batch.document_ids[:, 0] == 0).all()
    assert torch.equal(batch.document_ids.diff(dim=1), after_eos)
    assert batch.document_ids.max() == (1 if window == 4 else 3)


def test_an_epoch_sees_each_token_at_most_once(shards):
    tokens = np.fromfile(shards / "train.bin", dtype="<u4")
    windows = PackedWindows(shards, "train", window=33, seed=0)
    windows.tokens = np.arange(len(tokens), dtype=np.uint32)  # each token is its own position
    epochs = [windows.batch(epoch * len(windows), len(windows)).input_ids for epoch in range(3)]
    for seen in epochs:
        assert len(seen.unique()) == seen.numel() == len(tokens) - len(tokens) % 33
        assert (seen.diff(dim=1) % len(tokens) == 1).all()
    assert not torch.equal(epochs[0], epochs[1])
    offsets = {int(seen[0, 0]) % 33 for seen in epochs}
    assert len(offsets) > 1


def test_seeds_differ_and_repeat(shards):
    def first(seed):
        return PackedWindows(shards, "train", window=32, seed=seed).batch(0, 20).input_ids

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_window_and_split_errors(shards):
    tokens = read_meta(shards).tokens["val"]
    assert len(PackedWindows(shards, "val", window=tokens)) == 1
    sentence = f"A window is {tokens + 1} tokens and the val split has {tokens}: choose a window"
    with pytest.raises(ValueError, match=sentence):
        PackedWindows(shards, "val", window=tokens + 1)
    with pytest.raises(ValueError, match="split is 'test': choose train or val"):
        PackedWindows(shards, "test", window=8)
    with pytest.raises(ValueError, match="There are no shards"):
        PackedWindows(shards / "elsewhere", "train", window=8)


# ---- validation


@pytest.mark.parametrize("window", [2, 3, 16, 47, 10_000])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_each_held_out_token_is_predicted_once(corpus, shards, window, batch_size):
    """The predicted tokens of all rows together are the documents without their first tokens."""
    batches = ValidationBatches(shards, window=window, batch_size=batch_size)
    predicted: dict[int, list[int]] = {document: [] for document in range(len(batches.meta.val_names))}
    context: dict[int, int] = {}
    rounds = 0
    for batch in batches:
        rounds += 1
        assert batch.input_ids.shape == batch.document_ids.shape == (len(batch.documents), window)
        for ids, marks, document in zip(batch.input_ids, batch.document_ids, batch.documents.tolist(), strict=True):
            length = int((marks == 0).sum())
            assert length >= 2
            assert (marks[:length] == 0).all()
            assert (marks[length:] == -1).all()
            # The shared token is context here and predicted in the row before.
            first = context.setdefault(document, int(ids[0]))
            assert ids[0] == (predicted[document][-1] if predicted[document] else first)
            predicted[document] += ids[1:length].tolist()
    assert rounds == len(batches)
    for document, (_, text) in enumerate(held_out(corpus, validation_share=0.2)):
        assert [context[document], *predicted[document]] == [*text.encode(), 256]
        assert batches.bytes_of(document) == len(text.encode())


def test_bits_per_byte_of_a_uniform_guess(shards):
    """A uniform distribution costs log2(257) bits per token; each document has one more token than bytes."""
    batches = ValidationBatches(shards, window=32, batch_size=4)
    nats = sum(float((b.document_ids[:, 1:] == 0).sum()) for b in batches) * math.log(257)
    meta = batches.meta
    expected = math.log2(257) * meta.tokens["val"] / meta.utf8_bytes["val"]
    assert batches.bits_per_byte(nats) == pytest.approx(expected, rel=1e-12)
    size = batches.bytes_of(2)
    one = batches.bits_per_byte(size * math.log(257), document=2)
    assert one == pytest.approx(math.log2(257) * (size + 1) / size, rel=1e-12)


def test_bytes_are_those_of_the_text_whatever_the_tokenizer(corpus, bpe, tmp_path):
    meta = build_shards(corpus, bpe, tmp_path / "bpe", validation_share=0.2, progress=False)
    assert meta.val_bytes == [len(text.encode()) for _, text in held_out(corpus, validation_share=0.2)]
    assert meta.tokens["val"] < meta.utf8_bytes["val"]


def test_validation_window_too_small(shards):
    with pytest.raises(ValueError, match="A window of 1 predicts nothing: choose 2 tokens or more"):
        ValidationBatches(shards, window=1, batch_size=1)


def test_compression_baselines():
    text = "import os\n" * 500
    (one,) = compression_baselines([("a.py", text)])
    raw = text.encode()
    assert (one.name, one.utf8_bytes) == ("a.py", 5000)
    assert one.gzip == 8 * len(gzip.compress(raw, 9)) / 5000
    assert one.xz == 8 * len(lzma.compress(raw, preset=9)) / 5000
