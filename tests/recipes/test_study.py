"""The study's rows as presets: printed parameter counts, saving and loading, errors for contradictions."""

from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import small_config
from rich.console import Console

import qwen3next as q
from layers.variants.attention import AttentionVariant
from layers.variants.deltanet import DeltaNetVariant
from qwen3next.commands.common import config_of
from qwen3next.families import FAMILIES
from qwen3next.inspect import count_parameters, describe
from qwen3next.study import PRESETS, ROWS, count, dense_1_7b, matched, moe_15b
from qwen3next.variants import RELEASED

# Printed by the paper, in millions; rows 16 to 25 have no such column, so their counts follow from their sizes.
PRINTED = {
    "more_kv_heads": 50,
    "more_query_heads": 201,
    "g1_elementwise": 201,
    "g2_elementwise": 25,
    "g3_elementwise": 25,
    "g4_elementwise": 201,
    "g5_elementwise": 100,
    "g1_headwise": 1.6,
    "g2_headwise": 0.2,
    "g1_head_shared": 201,
    "g2_head_shared": 25,
    "g1_additive_silu": 201,
    "g1_silu": 201,
    "baseline": 0,
    "output_silu": 0,
}


@cache
def parameters(name: str) -> int:
    """Parameters of a row at the paper's size, built on meta tensors."""
    return count_parameters(PRESETS[f"moe_15b_{name}"]()).main


def added(name: str) -> float:
    """Added parameters against the baseline, in millions."""
    return (parameters(name) - parameters("baseline")) / 1e6


def test_there_are_25_rows():
    assert sorted(row.number for row in ROWS.values() if row.number) == list(range(1, 26))
    assert all(row.added is None or row.added == PRINTED.get(name, 400) for name, row in ROWS.items())


@pytest.mark.parametrize("name", PRINTED)
def test_added_parameters_are_the_papers_column(name):
    """The paper prints two digits below 10 and truncated whole millions above, such as 100 for 100.66."""
    printed, here = PRINTED[name], added(name)
    assert (round(here, 1) if printed < 10 else int(here)) == printed


def test_four_experts_more_are_what_their_width_says():
    """The paper prints 400; 4 experts of its width 768 in 24 layers are 453M, router rows included."""
    assert added("more_experts") * 1e6 == 24 * 4 * (3 * 768 * 2048 + 2048)
    config = PRESETS["moe_15b_more_experts"]()
    assert (config.num_experts, config.num_experts_per_tok) == (132, 12)


def test_rows_without_a_column():
    assert added("output_norm") * 1e6 == 24 * 128
    assert added("g1_constant") * 1e6 == 24 * 32 * 128
    assert added("g1_additive_identity") == added("g1_ns_sigmoid") == added("g1_elementwise")
    one = 24 * 2048 * 4 * 128  # one more value projection in every layer
    for name, projections, routers in (
        ("switch_kv_8_top8", 14, 8),
        ("switch_kv_4_top4", 6, 4),
        ("switch_v_4_top4", 3, 4),
        ("switch_v_8_top2", 7, 8),
        ("switch_v_1_top1", 0, 1),
    ):
        assert added(name) * 1e6 == pytest.approx(projections * one + routers * 24 * 2048 * 4, abs=0.5)
    assert added("switch_v_1_top1") == added("g2_headwise")


def test_sizes_are_the_papers():
    assert 15.0e9 < count(moe_15b()) < 16.0e9
    for layers in (28, 48):
        baseline = dense_1_7b(layers=layers)
        assert 1.7e9 <= count(baseline) < 1.75e9
        assert count(baseline) == count_parameters(baseline).main
        for row in ("g1_elementwise", "g1_headwise"):
            gated = dense_1_7b(row, layers=layers)
            # Equal parameters, up to half a hidden unit of every feed-forward.
            assert abs(count(gated) - count(baseline)) <= 1.5 * baseline.hidden_size * layers
            assert gated.intermediate_size < baseline.intermediate_size
    extra = count(dense_1_7b("sandwich_norm", layers=48)) - count(dense_1_7b(layers=48))
    assert extra == 48 * 2 * 1536
    with pytest.raises(ValueError, match=r"must be 28 or 48, .* got 30"):
        dense_1_7b(layers=30)


def test_matched_narrows_experts_in_steps_and_says_when_it_cannot():
    base = small_config(full_attention_interval=1, attention_gate="none", mtp_num_hidden_layers=0)
    gated = matched(base.replace(attention_gate="elementwise"), like=base, multiple_of=4)
    assert gated.moe_intermediate_size == 28
    assert abs(count(gated) - count(base)) <= 2 * 3 * 64 * 8 * 4
    with pytest.raises(ValueError, match="would have to be"):
        matched(base.replace(num_attention_heads=40), like=base)
    with pytest.raises(ValueError, match="dense and some are sparse"):
        matched(base.replace(mlp_only_layers=(0,)), like=base)
    with pytest.raises(ValueError, match="needs a mixture of experts"):
        ROWS["more_experts"].of(base.replace(num_experts=0))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_to_a_file_and_back(name):
    config = q.presets.named(name)()
    assert q.ModelConfig.from_dict(config.to_dict()).replace(extra={}) == config
    assert q.presets.named(name)(vocab_size=1000).vocab_size == 1000


def test_rows_are_inspected_by_name():
    assert config_of("dense_48_layers_g1_headwise").attention_gate == "headwise"
    with pytest.raises(ValueError, match="neither a folder nor a config"):
        config_of("dense_49_layers_baseline")


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match=r"There is no preset 'moe_15b_g6'.*moe_15b_baseline"):
        q.presets.named("moe_15b_g6")


@pytest.mark.parametrize("family", FAMILIES)
def test_released_families_say_nothing_of_variants(family):
    dense = {"num_experts": 0} if "moe" not in family else {}
    values = small_config(model_type=family, **dense).to_dict()
    assert not values.keys() & RELEASED.keys()
    assert values["architectures"] == [FAMILIES[family].architecture]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_flags_of_a_family_are_not_used_for_what_they_do_not_mean(family):
    """The flag of other readers means G1 with sigmoid; other gates are written with our keys only."""
    gate = {"attention_gate": "elementwise", "attention_gate_position": "G2", "linear_output_gate": "sigmoid"}
    values = small_config(model_type=family, num_experts=0, **gate).to_dict()
    assert values["attention_gate_position"] == "G2"
    assert not {"elementwise_attn_output_gate", "attn_output_gate", "output_gate_type"} & values.keys()
    again = q.ModelConfig.from_dict(values)
    assert (again.attention_gate, again.attention_gate_position, again.linear_output_gate) == tuple(gate.values())


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"attention_gate": "both"}, "'both' is unknown: choose one of elementwise, headwise, none, head_shared"),
        ({"attention_gate_position": "G6"}, "'G6' is unknown: choose one of G1, G2, G3, G4, G5"),
        ({"attention_gate_form": "divided"}, "is unknown: choose one of multiplicative, additive"),
        ({"attention_gate_activation": "relu"}, "is unknown: choose one of sigmoid, silu, identity, ns_sigmoid"),
        ({"attention_gate_input": "query"}, "is unknown: choose one of hidden, constant"),
        ({"attention_output_activation": "relu"}, "is unknown: choose one of none, silu"),
        ({"attention_switch": "q"}, "is unknown: choose one of none, v, kv"),
        ({"linear_output_gate": "relu"}, "is unknown: choose one of silu, sigmoid, none"),
        ({"attention_gate": "none", "attention_gate_position": "G2"}, "'G2' but attention_gate is 'none'"),
        ({"attention_gate": "none", "attention_gate_input": "constant"}, "choose a gate, or leave that field out"),
        ({"attention_gate": "headwise", "attention_gate_position": "G5"}, "must be 'elementwise', got 'headwise'"),
        (
            {"attention_gate": "head_shared", "attention_gate_position": "G5"},
            "must be 'elementwise', got 'head_shared'",
        ),
        ({"attention_switch_experts": 4}, "need attention_switch 'v' or 'kv'"),
        ({"attention_switch": "v", "attention_switch_experts": 2, "attention_switch_top_k": 3}, "3, but .* is 2"),
        ({"attention_switch": "v", "attention_switch_experts": 0}, "at least 1"),
        ({"linear_negative_eigenvalues": True, "linear_delta": False}, "needs linear_delta"),
    ],
)
def test_contradictions_are_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_config(**changes)


@pytest.mark.parametrize(
    "key, value",
    [("attention_gate_position", 1), ("sandwich_norm", "yes"), ("linear_decay", 0), ("attention_switch_top_k", 1.5)],
)
def test_files_with_values_of_other_types_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} cannot be"):
        q.ModelConfig.from_dict(small_config().to_dict() | {key: value})


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda **sizes: AttentionVariant(8, heads=2, kv_heads=1, head_dim=4, **sizes), "no position 'G9'"),
        (lambda **_: AttentionVariant(8, heads=2, kv_heads=1, head_dim=4, gate="headwise", position="G5"), "no heads"),
        (lambda **_: AttentionVariant(8, heads=2, kv_heads=1, head_dim=4, switch="v", switch_top_k=2), "2 of 1"),
    ],
)
def test_layers_refuse_too(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(position="G9")


def test_a_linear_layer_refuses_too():
    sizes = {"key_heads": 1, "value_heads": 1, "key_dim": 4, "value_dim": 4}
    with pytest.raises(ValueError, match="no output gate 'relu'"):
        DeltaNetVariant(8, **sizes, output_gate="relu")
    with pytest.raises(ValueError, match="nothing is erased"):
        DeltaNetVariant(8, **sizes, delta=False, negative_eigenvalues=True)


def test_inspect_and_explain_name_the_variant():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(small_config(attention_gate_position="G2", linear_delta=False)))
    assert "attention_gate elementwise, attention_gate_position G2, linear_delta False" in console.export_text()
    with torch.device("meta"):
        rows = {row.operation: row.runs for row in q.explain(q.Qwen3Next(small_config(attention_gate="head_shared")))}
    assert rows["attention"] == "sdpa"


def test_a_mixture_without_a_shared_expert(tmp_path):
    torch.manual_seed(0)
    model = q.Qwen3Next(small_config(shared_expert_intermediate_size=0, initializer_range=0.1)).eval()
    assert not [name for name in model.hook_dict if "shared" in name]
    tokens = torch.arange(12).view(1, 12)
    _, acts = model.run_with_cache(tokens, names_filter=["*hook_mlp_out", "*hook_expert_out", "*hook_router_weights"])
    mixed = (acts["blocks.0.mlp.hook_expert_out"] * acts["blocks.0.mlp.hook_router_weights"][..., None]).sum(2)
    torch.testing.assert_close(acts["blocks.0.hook_mlp_out"], mixed)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(q.load(tmp_path)(tokens).logits, model(tokens).logits)
    assert count(model.config) == sum(p.numel() for p in model.parameters())


def test_the_page_says_what_the_rows_are():
    """Number, name, the paper's column and ours, from docs/gated_attention.md."""
    page = (Path(__file__).parents[2] / "docs" / "gated_attention.md").read_text(encoding="utf-8")
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].isdecimal():
            found[cells[1].strip("`")] = (int(cells[0]), cells[3], cells[4])
    assert found.keys() == {name for name, row in ROWS.items() if row.number}
    for name, (number, printed, here) in found.items():
        assert number == ROWS[name].number
        assert printed == ("" if name not in PRINTED | {"more_experts": 400} else f"{ROWS[name].added or 0:g}"), name
        digits = len(here.partition(".")[2])
        assert f"{added(name):.{digits}f}" == here, name
