"""The timing recipe runs, its rows add up, and it does not change the model. Times are not asserted."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import qwen3next as q
from layers.dispatch.availability import missing
from layers.linear import Linear
from recipes.where_time_goes import ORDER, PARTS, REST, Clock, Options, main, torch_alone

needs_compiler = pytest.mark.skipif(missing() is not None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_and_writes(tmp_path, dtype):
    out = tmp_path / "new" / "where"
    found = main(Options(preset="tiny", tokens=130, dtype=dtype, repetitions=1, steps=2, out=out))
    parts = set(ORDER) - {"the compiled step"}
    assert set(found["prefill"]["before"]) == set(found["prefill"]["after"]) == parts
    assert set(found["decode"]["before"]) == parts
    assert set(found["decode"]["after"]) == {"the compiled step", REST}
    for what in ("prefill", "decode"):
        for side in ("before", "after"):  # a non-negative rest means that no part is counted twice
            assert min(found[what][side].values()) > 0
        assert set(found[what]["least"]) == {"linear maps", "experts", "delta rule", "attention"}
    assert set(found["delta rule"]) == {"chunked", "chunked_recompute", "cpp", "can", "least"}
    assert json.loads(out.with_suffix(".json").read_text())["prefill"] == found["prefill"]
    assert "| delta rule of one layer |" in out.with_suffix(".md").read_text()


@torch.no_grad()
def test_before_and_after_compute_the_same():
    """Equal to fp32 rounding, with sums in another order; afterwards everything is restored."""
    torch.manual_seed(0)
    model, clock, forward = q.Qwen3Next(q.presets.tiny()), Clock(), Linear.forward
    ids = torch.randint(257, (1, 100))
    ran = [(row.operation, row.runs) for row in q.explain(model)]
    after = model(ids).logits
    with torch_alone(model), clock.watching(PARTS):
        before = model(ids).logits
        assert {row.runs for row in q.explain(model)} <= {"torch", "chunked", "sdpa", "grouped"}
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    assert clock.seconds["linear maps"] > 0
    assert [(row.operation, row.runs) for row in q.explain(model)] == ran
    assert Linear.forward is forward


def test_models_of_one_kind_of_layer():
    """Models without some of the parts can be timed."""
    for kind in ("full_attention", "linear_attention"):
        config = q.presets.tiny(layer_types=(kind,) * 4, num_experts=0)
        with torch_alone(q.Qwen3Next(config)):
            pass


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"preset": "giant"}, "no preset 'giant': choose tiny"),
        ({"dtype": "float16"}, "'float16' cannot be timed"),
        ({"steps": 0}, "must be at least 1"),
    ],
)
def test_bad_options_get_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(Options(**changes))
