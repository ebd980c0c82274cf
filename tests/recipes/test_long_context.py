"""The long-context recipe's counts agree with theory, and it writes its results. Speeds are not asserted."""

import json

import pytest

pytest.importorskip("transformers")

import qwen3next as q
from recipes.long_context import Options, main


def test_runs_and_counts(tmp_path, capsys):
    out = tmp_path / "new" / "result"
    main(Options(preset="tiny", lengths=("100",), ours_alone=("320",), decode=3, out=out))
    found = json.loads(out.with_suffix(".json").read_bytes())
    assert [row["tokens"] for row in found["rows"]] == [100, 320]
    config = q.presets.tiny(mtp_num_hidden_layers=0)
    for row in found["rows"]:
        formula = row["tokens"] * config.bytes_per_token(4) + config.bytes_per_sequence(conv_bytes=4)
        assert row["ours"]["held"] == row["ours"]["formula"] == formula
        assert len(row["ours"]["decode"]) == 3
    assert found["rows"][0]["theirs"]["prefill"] > 0
    assert not found["rows"][1].get("theirs")
    assert out.with_suffix(".md").is_file()
    assert out.with_suffix(".png").is_file()
    assert "320" in capsys.readouterr().out


def test_bad_lengths_get_a_sentence():
    with pytest.raises(ValueError, match="long"):
        main(Options(lengths=("long",)))
