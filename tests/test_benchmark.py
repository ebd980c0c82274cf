"""The benchmark runs, compares equal work and writes what it measured. Speeds are not asserted: machines are noisy."""

import json

import pytest

pytest.importorskip("transformers")

from recipes.benchmark import Options, compare, main


def test_ratios_are_of_pairs():
    """Ours does nothing, theirs a little: the ratio is above one and within its range."""
    row = compare("x", 3, lambda: None, lambda: sum(range(20_000)) and None, 3)
    assert 1 < row.lowest <= row.ratio <= row.highest


def test_runs_and_writes(tmp_path):
    options = Options(
        preset="tiny",
        prefill=(70,),
        decode_after=5,
        decode=2,
        train_batch=1,
        train_length=20,
        repetitions=1,
        device="cpu",
        out=tmp_path / "new" / "result.json",
    )
    rows = main(options)
    assert [r.what for r in rows] == ["prefill 70", "decode after 5", "train 1 x 20"]
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert len(written["rows"]) == 3
    assert written["commit"]
    assert "| prefill 70 |" in (tmp_path / "new" / "result.md").read_text()


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="no preset 'giant'"):
        main(Options(preset="giant"))
