"""Parameter counts against published sizes and against models that are built."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from qwen3next import Qwen3Next, presets
from qwen3next.files.sizes import binary
from qwen3next.inspect import count_parameters, describe, short


def test_counts_of_the_released_model():
    """Exact counts, from the sum of the released shapes, which "80B-A3B" rounds."""
    counts = count_parameters(presets.qwen3_next_80b_a3b())
    assert counts.main == 79_674_391_296
    assert counts.mtp == 1_650_471_424
    assert counts.active == 3_874_929_408
    assert counts.embedding == 151_936 * 2048
    assert counts.total == counts.main + counts.mtp


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"mtp_num_hidden_layers": 0},
        {"num_experts": 0},
        {"mlp_only_layers": (1, 2)},
    ],
)
def test_counts_equal_a_built_model(changes):
    config = presets.tiny(**changes)
    model, counts = Qwen3Next(config), count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    idle = sparse * (config.num_experts - config.num_experts_per_tok) * expert
    assert counts.active == counts.main - idle


def test_describe_names_kinds_shapes_and_bytes():
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(describe(presets.qwen3_next_80b_a3b()))
    text = console.export_text()
    for expected in (
        "79.67B, and 1.65B in the MTP layer",
        "36 x Gated DeltaNet",
        "0-2, 4-6, …, 44-46",
        "12 x gated attention",
        "512 x 1024 x 2048",
        "2 KiB a token",
        "6.07 GiB",
        "96 GiB",
    ):
        assert expected in text


def test_numbers_are_short():
    assert [short(n) for n in (7, 41_500, 311_164_928, 79_674_391_296)] == ["7", "41.5K", "311.2M", "79.67B"]
    assert [binary(n) for n in (512, 24_576, 77_266_944, 6_442_450_944)] == [
        "512 B",
        "24 KiB",
        "73.7 MiB",
        "6 GiB",
    ]


def test_the_table_of_presets_is_what_the_presets_are():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name, make in presets.ALL.items():
        config = make()
        counts = count_parameters(config)
        numbers = (
            config.num_hidden_layers,
            config.hidden_size,
            f"{config.num_experts} / {config.num_experts_per_tok}",
            *(f"{n:,}" for n in (counts.main, counts.active, counts.mtp)),
            *(f"{n:,}" for n in (config.bytes_per_token(), config.bytes_per_sequence())),
        )
        assert f"| `{name}` | " + " | ".join(map(str, numbers)) + " |" in page


@pytest.mark.parametrize("make", presets.RELEASED)
def test_the_family_pages_say_what_the_presets_are(make):
    config = make()
    counts = count_parameters(config)
    cells = [f"`{make.__name__}`", str(config.num_hidden_layers), str(config.hidden_size)]
    cells += [f"{config.num_experts} / {config.num_experts_per_tok}"] * bool(config.num_experts)
    cells += [short(counts.main)] + [short(counts.active)] * bool(config.num_experts) + [short(counts.mtp)]
    cells += [binary(n) for n in (2 * counts.total, config.bytes_per_token(), config.bytes_per_sequence())]
    page = Path(__file__).parents[2] / "docs" / "families" / f"{config.model_type.removesuffix('_text')}.md"
    assert "| " + " | ".join(cells) + " |" in page.read_text(encoding="utf-8")
