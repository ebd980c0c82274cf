"""`recipes.data`: the same shards for any number of processes, parts and kills; sources, mixtures, packing, marks."""

import io
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console

from recipes import data
from recipes.data import Options, prepare
from recipes.training.data import Batch
from recipes.training.documents import documents, plan_split
from recipes.training.settings import Settings, fim_marks, named_tokenizer, prepare_data
from recipes.training.shards import build_shards, open_split, read_meta
from recipes.training.sources import (
    BLOCK,
    BestFitWindows,
    FillInTheMiddle,
    Mixture,
    Source,
    best_fit,
    parse_sources,
)
from recipes.training.tokenizer import byte_tokenizer, eos_id

TEXTS = [f"document {i} " + "héllo wörld 😀 " * (i % 9) for i in range(60)] + [
    "document 3 " + "héllo wörld 😀 " * 3,
    "",
]


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def corpus(tmp_path):
    """Text files, a .jsonl file and a .parquet file; with a copy, an empty document and one that is no text."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:20]):
        (folder / f"{i:02}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in TEXTS[20:40]] + ["", json.dumps({"text": None})]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    parquet.write_table(pyarrow.table({"text": TEXTS[40:]}), folder / "rows.parquet", row_group_size=5)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*") if p.suffix in (".bin", ".npy") or p.name == "meta.json"}


def prepared(corpus, out, **options) -> tuple[data.Report, dict[str, bytes]]:
    options = {"workers": 1, "validation_share": 0.2, "tokenizer": "bytes"} | options
    made = prepare(Options(source=str(corpus), out=out, **options), console=quiet())
    return made, contents(out)


# ---- python -m recipes.data


def test_every_document_is_there_once(corpus, tmp_path):
    """The texts of a part of 400 bytes or of all, and the same split as a run's own shards."""
    made, whole = prepared(corpus, tmp_path / "whole")
    texts = []
    for split in ("train", "val"):
        tokens, starts = open_split(tmp_path / "whole", split)
        for begin, end in pairwise(starts):
            assert tokens[end - 1] == 256
            texts.append(bytes(tokens[begin : end - 1].astype(np.uint8)).decode())
    assert sorted(texts) == sorted(set(TEXTS) - {""})
    assert made.skipped == {"unreadable": 1, "empty": 1, "copies": 1}
    plan = plan_split(corpus, validation_share=0.2)
    held_out = {text for _, text in documents(corpus) if text in texts[made.documents["train"] :]}
    assert {plan.digests[n] for n, side in plan.splits.items() if side == "val"} == {
        data.digest(text) for text in held_out
    }
    assert sum(made.utf8_bytes.values()) == sum(len(t.encode()) for t in texts)
    small, pieces = prepared(corpus, tmp_path / "small", part_megabytes=4e-4)
    assert small.parts > 10 > made.parts
    for name in ("train.bin", "val.bin", "train.idx.npy", "val.idx.npy"):
        assert pieces[name] == whole[name]


@pytest.mark.slow
def test_processes_change_nothing(corpus, tmp_path):
    one = prepared(corpus, tmp_path / "one", part_megabytes=4e-4)[1]
    assert prepared(corpus, tmp_path / "two", part_megabytes=4e-4, workers=2)[1] == one


def test_killed_and_gone_on(corpus, tmp_path, monkeypatch):
    """After any number of parts, or while they are joined; finished parts are not made again."""
    whole = prepared(corpus, tmp_path / "whole", part_megabytes=4e-4)[1]
    real = data.tokenize_part
    for kill in (0, 1, 7):
        out, made = tmp_path / f"killed-{kill}", []

        def dying(folder, number, pieces, made=made, kill=kill):
            if len(made) == kill:
                raise KeyboardInterrupt
            made.append(number)
            real(folder, number, pieces)

        monkeypatch.setattr(data, "tokenize_part", dying)
        with pytest.raises(KeyboardInterrupt):
            prepared(corpus, out, part_megabytes=4e-4)
        assert not (out / "meta.json").exists()
        again = []

        def noting(folder, number, pieces, again=again):
            again.append(number)
            real(folder, number, pieces)

        monkeypatch.setattr(data, "tokenize_part", noting)
        assert prepared(corpus, out, part_megabytes=4e-4)[1] == whole
        assert not set(again) & set(made)
    with monkeypatch.context() as patch:
        write = data.write_atomically
        patch.setattr(data, "write_atomically", lambda path, x: 1 / 0 if path.name == "val.idx.npy" else write(path, x))
        with pytest.raises(ZeroDivisionError):
            prepared(corpus, tmp_path / "joining", part_megabytes=4e-4)
    assert prepared(corpus, tmp_path / "joining", part_megabytes=4e-4)[1] == whole


def test_what_is_refused(corpus, tmp_path, capsys):
    prepared(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="holds another corpus"):
        prepared(corpus, tmp_path / "out", seed=1)
    (corpus / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match="its source has changed"):
        prepared(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="lies inside"):
        prepared(corpus, corpus / "out")
    assert data.main(["--source", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 1
    assert "There is nothing at" in capsys.readouterr().err
    (corpus / "rows.jsonl").write_text('{"text": "a"}\n{"content": 1}\n')
    with pytest.raises(ValueError, match="line 2 has no field"):
        prepared(corpus, tmp_path / "other")
    with pytest.raises(ValueError, match="byte 14: no JSON with a field"):
        prepared(corpus / "rows.jsonl", tmp_path / "pieces", part_megabytes=2e-5)
    with pytest.raises(ValueError, match=r"held-out split .* --validation-share"):
        prepared(corpus / "01.txt", tmp_path / "one", validation_share=1e-9)


def test_a_run_reads_a_prepared_folder(corpus, tmp_path):
    """Beside a source that is read by the run; a folder of another tokenizer is refused."""
    prepared(corpus, tmp_path / "mine", tokenizer="bpe:300")
    settings = Settings(data=(f"mine={tmp_path / 'mine'}", f"raw={corpus / '05.txt'}"), out=tmp_path / "run")
    found = prepare_data(settings)
    assert found.folders == [tmp_path / "mine", tmp_path / "run" / "data" / "raw"]
    assert [meta.vocab_size for meta in found.metas] == [found.tokenizer.get_vocab_size()] * 2
    assert found.metas[0].fingerprint == read_meta(tmp_path / "mine").fingerprint
    assert found.tokens("train") == sum(meta.tokens["train"] for meta in found.metas)
    prepared(corpus, tmp_path / "bytes")
    other = replace(settings, data=(f"a={tmp_path / 'mine'}", f"b={tmp_path / 'bytes'}"), out=tmp_path / "x")
    with pytest.raises(ValueError, match="tokenized with another tokenizer"):
        prepare_data(other)


def test_a_hub_that_is_not_reached(tmp_path, monkeypatch):
    """Without the package, or where it fails, one sentence tells what to do."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(documents("hf:some/dataset"))

    class Package:
        @staticmethod
        def load_dataset(path, configuration, split, streaming):
            assert (path, configuration, split, streaming) == ("some/dataset", "small", "train", True)
            yield {"text": "a"}
            yield {"text": None}
            raise ConnectionError("the hub is away\nmore")

    monkeypatch.setitem(__import__("sys").modules, "datasets", Package)
    skipped, found = [], []
    with pytest.raises(ValueError, match=r"after 2 rows \(the hub is away\): .* copy the dataset's parquet"):
        found.extend(documents("hf:some/dataset:small", skipped=skipped))
    assert found == [("some/dataset:small:0", "a")]
    assert skipped == ["some/dataset:small:1"]


# ---- sources and mixtures


def test_sources():
    assert parse_sources(["stdlib"]) == [Source("stdlib", "stdlib", 1.0)]
    assert parse_sources(["code=my/code@0.7", "web=hf:a/b:c@3e-1"]) == [
        Source("code", "my/code", 0.7),
        Source("web", "hf:a/b:c", 0.3),
    ]
    assert parse_sources(["a b/*.txt"])[0].place == "a b/*.txt"
    for wrong, sentence in ((["x@0"], "no number above 0"), (["x@1e"], "no number"), (["a", "a"], "Two sources")):
        with pytest.raises(ValueError, match=sentence):
            parse_sources(wrong)


class Numbers:
    """Batches that tell their source and index."""

    def __init__(self, source):
        self.source = source

    def batch(self, first, size):
        ids = torch.tensor([[self.source, i] for i in range(first, first + size)])
        return Batch(ids, torch.zeros_like(ids))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (5.0, 0.01)])
def test_a_mixture_keeps_its_weights_and_leaves_nothing_out(weights):
    """Exact shares in every block; the samples of each source come in order, each once; any division gives the same."""
    mixture = Mixture([Numbers(i) for i in range(len(weights))], weights, seed=3)
    rows = torch.cat([mixture.batch(i, 64).input_ids for i in range(0, 2 * BLOCK, 64)])
    for source, weight in enumerate(weights):
        own = rows[rows[:, 0] == source][:, 1]
        assert own.sort().values.tolist() == list(range(len(own)))
        for half in rows.split(BLOCK):
            assert abs(int((half[:, 0] == source).sum()) - weight / sum(weights) * BLOCK) < 1
    again = Mixture([Numbers(i) for i in range(len(weights))], weights, seed=3)
    assert torch.equal(again.batch(1000, 50).input_ids, rows[1000:1050])
    with pytest.raises(ValueError, match="below 1/1024"):
        Mixture([Numbers(0), Numbers(1)], (1.0, 1e-6))


# ---- packing


@pytest.mark.parametrize("seed", range(3))
def test_best_fit(seed):
    """Every piece once, none too long; no piece would fit into an earlier window with less room than where it is."""
    lengths = np.random.default_rng(seed).integers(1, 65, 300)
    bins = best_fit(lengths, 64)
    assert sorted(piece for some in bins for piece in some) == list(range(300))
    used = [int(lengths[some].sum()) for some in bins]
    assert max(used) <= 64
    assert len(bins) <= 1.25 * -(-int(lengths.sum()) // 64)  # best-fit-decreasing needs at most 11/9 of the optimum
    # Two windows that could be one would mean that a piece was not placed where it fits.
    assert sum(n <= 32 for n in used) <= 1


def test_best_fit_windows(corpus, tmp_path):
    """Documents stay whole up to a window's length; each token is seen once in an epoch, padding has no document."""
    build_shards(corpus, byte_tokenizer(), tmp_path / "shards", progress=False)
    windows = BestFitWindows(tmp_path / "shards", "train", window=80)
    tokens, starts = open_split(tmp_path / "shards", "train")
    ids, documents_of = windows.batch(0, len(windows))
    real = documents_of >= 0
    assert int(real.sum()) == len(tokens)
    assert windows.padding == pytest.approx(1 - real.double().mean().item())
    assert sorted(ids[real].tolist()) == sorted(tokens.tolist())
    pieces = [
        ids[row][documents_of[row] == number].tolist()
        for row in range(len(ids))
        for number in range(int(documents_of[row].max()) + 1)
    ]
    for begin, end in pairwise(starts):
        for at in range(begin, end, 80):
            assert tokens[at : min(at + 80, end)].tolist() in pieces
    assert torch.equal(windows.batch(5, 3).input_ids, ids[5:8])
    second = windows.batch(len(windows), len(windows)).input_ids
    assert not torch.equal(second, ids)
    assert sorted(second.tolist()) == sorted(ids.tolist())


# ---- fill-in-the-middle


def test_fill_in_the_middle(corpus, tmp_path):
    """A turned document is its own text in another order, without three tokens; others, and padding, stay."""
    tokenizer = named_tokenizer("bytes", [], fim=True)
    assert tokenizer.get_vocab_size() == 260
    build_shards(corpus, tokenizer, tmp_path / "shards", progress=False)
    plain, marks = BestFitWindows(tmp_path / "shards", "train", window=120), fim_marks(tokenizer)
    turned = FillInTheMiddle(plain, 0.5, marks=marks, eos=eos_id(tokenizer), seed=1)
    before, after = plain.batch(0, len(plain)), turned.batch(0, len(plain))
    assert torch.equal(before.document_ids, after.document_ids)
    assert torch.equal(turned.batch(3, 2).input_ids, after.input_ids[3:5])
    changed = same = 0
    for old, new, documents_of in zip(before.input_ids, after.input_ids, before.document_ids, strict=True):
        assert torch.equal(old[documents_of < 0], new[documents_of < 0])
        for number in range(int(documents_of.max()) + 1):
            a, b = old[documents_of == number].tolist(), new[documents_of == number].tolist()
            if a == b:
                same += 1
                continue
            changed += 1
            end = [256] if a[-1] == 256 else []
            assert b[0] == marks[0]
            assert b[len(b) - len(end) :] == end
            s, m = b.index(marks[1]), b.index(marks[2])
            prefix, suffix, middle = b[1:s], b[s + 1 : m], b[m + 1 : len(b) - len(end)]
            assert prefix + middle + suffix == a[: len(a) - len(end) - 3]
    assert changed > 5
    assert same > 5
    with pytest.raises(ValueError, match=re.escape("lacks <|fim_prefix|>")):
        fim_marks(byte_tokenizer())
