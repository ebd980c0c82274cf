"""`python -m recipes.speculation`: rows as they come, going on after a stop, a picture; nothing about speed."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

import qwen3next as q
from recipes import speculation
from recipes.measure.draft_cases import Generating
from recipes.speculation import Options, main
from recipes.training.tokenizer import byte_tokenizer, save_tokenizer

SMALL = {"prompts": 2, "context": 8, "new": 6, "most": 2, "repetitions": 1, "temperatures": (0.0,)}
COSTS = ["2 tokens in a step", "3 tokens in a step", "draft of 1", "draft of 2", "take back 1 of 2"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    torch.manual_seed(0)
    q.Qwen3Next(q.presets.tiny()).save_pretrained(folder / "model")
    save_tokenizer(byte_tokenizer(), folder / "model")
    (folder / "text.txt").write_text("a text of some words, which goes on and on")
    return Options(folder / "model", text=folder / "text.txt", drafts=("mtp",), **SMALL)


def test_every_row_and_a_picture(options, tmp_path, capsys):
    rows = main(replace(options, out=tmp_path / "result"))
    ways = [f"generate, drafts {n} by mtp, greedy" for n in (1, 2, "auto")]
    assert [row.what for row in rows] == COSTS + ways
    assert all(0 < row.lowest <= row.time <= row.highest for row in rows)
    assert all(row.mean_length >= 1 and len(row.drafted) == 2 for row in rows[5:])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:52].strip() for line in printed] == COSTS + ways
    assert "| draft of 2 |" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").stat().st_size > 10_000


def test_goes_on_after_a_stop(options, tmp_path, monkeypatch):
    out = tmp_path / "result"
    with monkeypatch.context() as patched:
        patched.setattr(speculation, "_gained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(replace(options, out=out))
    left = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["what"] for row in left] == COSTS
    rows = main(replace(options, out=out))
    assert [vars(row) for row in rows[:5]] == left
    assert len(rows) == 8
    with pytest.raises(ValueError, match="measured with other options"):
        main(replace(options, out=out, new=7))


def test_a_text_that_drafts_change_is_noticed(options, monkeypatch):
    """The rows are of equal texts alone."""
    run = Generating.__call__

    def changed(self):
        took = run(self)
        if self.way.draft_tokens:
            self.tokens = self.tokens[:-1]
        return took

    monkeypatch.setattr(Generating, "__call__", changed)
    with pytest.raises(RuntimeError, match="the text differs"):
        main(options)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text": None}, "no run with held-out text"),
        ({"context": 10_000}, "fewer than --context"),
        ({"most": 0}, "--most and --prompts"),
    ],
)
def test_bad_options(options, changes, words):
    with pytest.raises(ValueError, match=words):
        main(replace(options, **changes))
