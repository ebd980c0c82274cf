"""The benchmark runs, compares equal work and writes its results. Speeds are not asserted, because they are noisy."""

import json
import sys

import pytest

pytest.importorskip("transformers")

import qwen3next as q
from qwen3next.inspect import on_meta
from recipes.benchmark import Options, compare, main
from recipes.measure.benchmark_cases import Case
from recipes.measure.work import active_weight_bytes, forward_flops, linear_weights

SMALL = {
    "preset": "tiny",
    "dtypes": ("float32",),
    "prefill": ("1x70", "2x20"),
    "decode": (1, 2),
    "at_once": (3,),
    "decode_after": 5,
    "steps": 2,
    "train": ("1x20",),
    "question": (40, 3),
    "operators": (70,),
    "repetitions": 1,
    "device": "cpu",
}
PEER = """
def make(folder, dtype, device):
    assert (folder / "config.json").is_file()
    def sides(what):
        return {"idle": lambda: None} if what.startswith("prefill") else {}
    return sides
"""


def test_ratios_are_of_pairs():
    """Ours does nothing and theirs a little, so the ratio is above one and within its range."""
    case = Case("x", 3, sides={"qwen3next": lambda: None, "theirs": lambda: sum(range(20_000))})
    (row,) = compare(case, 3, dtype="float32", limit=0.0)
    assert 1 < row.lowest <= row.ratio <= row.highest
    assert (row.what, row.peer, row.tokens) == ("x", "theirs", 3)


def test_runs_and_writes(tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    out = tmp_path / "new" / "result"
    rows = main(Options(**SMALL, out=out, peer=tmp_path / "peer.py"))
    assert [r.what for r in rows if r.peer != "idle"] == [
        "prefill 1 x 70",
        "prefill 2 x 20",
        "decode 1 x 1 after 5",
        "decode 2 x 1 after 5",
        "decode 1 x 3 after 5",
        "question of 3 after 40",
        "train 1 x 20",
        "experts alone, 70",
        "delta rule 16:32 x 128, 70",
        "delta rule and gradients 16:32 x 128, 70",
    ]
    assert [r.what for r in rows if r.peer == "idle"] == ["prefill 1 x 70", "prefill 2 x 20"]
    assert all(row.memory >= 0 and row.peer_memory >= 0 for row in rows if sys.platform == "linux")
    written = json.loads(out.with_suffix(".json").read_text())
    assert len(written["rows"]) == len(rows)
    assert written["commit"]
    assert written["machine_can"]["float32_flops_per_second"] > 1e9
    assert "| prefill 1 x 70 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_bad_options_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no preset 'giant'"):
        main(Options(preset="giant"))
    with pytest.raises(ValueError, match="'float16' cannot be measured"):
        main(Options(dtypes=("float16",)))
    with pytest.raises(ValueError, match="is not a Python file"):
        main(Options(peer=tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="does not define make"):
        main(Options(peer=tmp_path / "empty.py"))


def test_work_is_counted_as_the_model_has_it():
    """Against counted parameters: all multiplied weights, and the chosen share of the routed experts."""
    config, weights = q.presets.medium(mtp_num_hidden_layers=0), 0
    for name, p in on_meta(config).blocks.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
        weights += p.numel() * share if p.ndim > 1 and "conv" not in name else 0
    assert linear_weights(config) == weights
    assert active_weight_bytes(config, 2) == 2 * (weights + config.hidden_size * config.vocab_size)
    two = active_weight_bytes(config, 2, tokens=2) - active_weight_bytes(config, 2)  # 4 of 32, then 3.5 others
    assert two == 2 * 8 * 3 * 512 * 256 * 3.5
    # A single token: all products, a query with one key, one step of the recurrence.
    config = q.presets.tiny(mtp_num_hidden_layers=0)
    rest = forward_flops(config, 1) - 2 * (linear_weights(config) + config.hidden_size * config.vocab_size)
    assert rest == 3 * 4 * 6 * 32 * 32 + 1 * 4 * 4 * 32
