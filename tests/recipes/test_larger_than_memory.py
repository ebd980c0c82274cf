"""The recipe at a small size writes a checkpoint, limits memory and generates; its counts are consistent."""

import json
import random
import sys

import pytest

from recipes.larger_than_memory import least_misses, main


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = {"size": "10MB", "width": 256, "limit": "8GiB", "cache": "4MB", "prompt": 8, "new": 6}
    main(**options, out=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    one = 3 * 256 * 64 * 2
    assert found["routed_bytes_a_token"] == 4 * 10 * one
    assert 0 < found["least_bytes_a_token"] <= found["read_bytes_a_token"] <= found["routed_bytes_a_token"]
    assert found["read_bytes_a_token"] == pytest.approx((1 - found["hit_rate"]) * found["routed_bytes_a_token"])
    assert found["cache_bytes"] <= 4_000_000
    assert found["stored_bytes"] > 4 * 128 * one
    assert "decode tok s" in capsys.readouterr().out
    assert not list(tmp_path.glob("larger-than-memory-*"))


def test_a_process_that_dies_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(SystemExit, match="is 30MB too little"):
        main(size="1MB", width=256, limit="30MB", cache="4MB", prompt=4, new=2)


def test_least_misses_is_the_least():
    """Against all eviction choices, on short traces."""

    def every_way(trace, slots, held=frozenset()):
        if not trace:
            return 0
        first, rest = trace[0], trace[1:]
        if first in held:
            return every_way(rest, slots, held)
        kept = [held] + ([held | {first}] if len(held) < slots else [(held - {out}) | {first} for out in held])
        return 1 + min(every_way(rest, slots, h) for h in kept)

    rng = random.Random(0)
    for _ in range(60):
        trace = [(0, rng.randrange(4)) for _ in range(8)]
        assert least_misses(trace, 2) == every_way(trace, 2)
