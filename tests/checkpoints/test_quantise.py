"""Calibrated rounding against rounding to the nearest, the folders it writes, and their readers."""

import json

import pytest
import torch
from parity import tokens
from safetensors.torch import load_file

import qwen3next as q
from layers.quantised.calibrated import output_error, quantise_for
from layers.quantised.group_weight import quantise
from qwen3next.checkpoints.calibration import round_model
from qwen3next.checkpoints.quantise import bits_per_byte, quantise_folder, rows_of
from qwen3next.checkpoints.save_groups import groups_of, save_groups
from qwen3next.checkpoints.verify import verify
from qwen3next.cli import main
from recipes.training.tokenizer import byte_tokenizer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.oracle
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (4, 0), (8, 0)])
def test_calibrated_outputs_are_closer_than_those_of_the_nearest_codes(bits, group):
    """For correlated inputs, in a stack of two matrices, against outputs that are computed one by one."""
    w, mix = normal(2, 24, 256), normal(2, 256, 256, seed=1) / 8
    x = normal(2, 600, 40, seed=2) @ normal(2, 40, 256, seed=3) @ mix + 0.1 * normal(2, 600, 256, seed=4)
    gram = x.mT @ x
    ours, nearest = quantise_for(w, gram, bits, group), quantise(w, bits, group)
    errors = [((x @ (piece.dequantise() - w).mT).square().sum()).item() for piece in (ours, nearest)]
    assert errors[0] < 0.5 * errors[1]
    for piece, error in zip((ours, nearest), errors, strict=True):
        wrong, whole = output_error(piece, w, gram)
        assert wrong == pytest.approx(error, rel=1e-2)
        assert whole == pytest.approx((x @ w.mT).square().sum().item(), rel=1e-3)


@pytest.mark.oracle
def test_without_correlation_it_is_rounding_to_the_nearest():
    w = normal(8, 64)
    for gram in (torch.eye(64), torch.zeros(64, 64)):
        assert torch.equal(quantise_for(w, gram, 4).codes, quantise(w, 4).codes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer of bytes, and a text."""
    place = tmp_path_factory.mktemp("quantise")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4}
    layers = {"num_hidden_layers": 2, "layer_types": ("linear_attention", "full_attention")}
    config = q.presets.tiny(tie_word_embeddings=False, **layers, **sizes)
    q.Qwen3Next(config).save_pretrained(place / "m")
    byte_tokenizer().save(str(place / "m" / "tokenizer.json"))
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return place


def test_every_matrix_of_a_model_comes_closer_on_its_text(folder, tmp_path):
    model = q.load(folder / "m")
    ids = [tokens(200, b=1), tokens(150, b=1)]
    found = round_model(model, "int4", ids=ids)
    seen = [one for one in found if one.output_error is not None]
    assert len(seen) == 3 + 5 + 2 * 5  # of the mixers, and of both feed-forwards
    assert all(one.output_error <= one.nearest for one in seen)
    assert sum(one.output_error for one in seen) < 0.95 * sum(one.nearest for one in seen)
    assert model.lm_head.weight.dtype == torch.float32
    save_groups(model, tmp_path / "out")
    again = q.load(tmp_path / "out", weights="stored")
    ours, theirs = dict(groups_of(model)), dict(groups_of(again))
    assert ours.keys() == theirs.keys() == {one.name for one in found}
    for name, weight in ours.items():
        assert torch.equal(weight.dequantise(), theirs[name].dequantise())
    assert verify(tmp_path / "out").problems == []
    with torch.no_grad():
        assert torch.equal(again(ids[0]).logits, model(ids[0]).logits)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_command(folder, tmp_path, capsys, weights):
    text = str(folder / "text.txt")
    options = ["--weights", weights, "--calibrate", text, "--evaluate", text, "--rows", "2", "--length", "64"]
    assert main(["quantize", str(folder / "m"), str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "stored: " in printed
    assert "rounded: " in printed
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values())
    plain = sum(x.nbytes for x in load_file(folder / "m" / "model.safetensors").values())
    assert size < (0.45 if weights == "int8" else 0.35) * plain
    assert main(["convert", str(folder / "m"), str(tmp_path / "near"), "--to", weights, "--quiet"]) == 0
    plain_folder = q.load(tmp_path / "near", weights="stored")
    assert dict(groups_of(plain_folder)).keys() == dict(groups_of(q.load(tmp_path / "out", weights="stored"))).keys()


def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    source, out = str(folder / "m"), tmp_path / "out"
    for options, sentence in (
        (["--calibrate", str(tmp_path / "none.txt")], "cannot be read as text"),
        (["--calibrate", str(tmp_path / "bytes.txt")], "cannot be read as text"),
        (["--calibrate", str(tmp_path / "short.txt")], "fewer than two tokens"),
        (["--rows", "0"], "must be at least 1"),
    ):
        assert main(["quantize", source, str(out), *options]) == 2
        assert sentence in capsys.readouterr().err
        assert not out.exists()
    assert main(["convert", source, str(out), "--to", "int4", "--drop-mtp"]) == 2
    assert "takes no other option" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be int8 or int4"):
        quantise_folder(q.Qwen3Next, source, out, "int3")
    assert not out.exists()


def test_rows_are_spread_over_a_text():
    assert [row[0, 0].item() for row in rows_of(torch.arange(100), 10, 4)] == [0, 30, 60, 90]
    assert [row.shape for row in rows_of(torch.arange(7), 10, 4)] == [(1, 7)]
    assert rows_of(torch.arange(1), 10, 4) == []


def test_bits_per_byte_are_those_of_the_losses(folder):
    model, ids = q.load(folder / "m"), tokens(50, b=1)
    with torch.no_grad():
        exact = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    assert bits_per_byte(model, ids[0], 100) == pytest.approx(exact.item() / 0.6931471805599453 / 100, rel=1e-4)


@pytest.mark.oracle
def test_transformers_opens_what_is_written(folder, tmp_path):
    """With the compressed-tensors package: weights to the bit, which it dequantises in the dtype of the scales."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig, Qwen3NextForCausalLM

    quantise_folder(q.Qwen3Next, folder / "m", tmp_path / "out", "int4")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    )
    ours = q.load(tmp_path / "out", dtype="bfloat16")
    settings = CompressedTensorsConfig(dequantize=True)
    theirs = Qwen3NextForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=settings)
    layer, block = theirs.model.layers[1], ours.blocks[1]
    assert torch.equal(layer.self_attn.o_proj.weight, block.self_attn.o_proj.weight)
    assert torch.equal(layer.mlp.experts.gate_up_proj, block.mlp.experts.gate_up_proj)
    assert torch.equal(layer.mlp.experts.down_proj, block.mlp.experts.down_proj)
    ids = tokens(20)
    with torch.no_grad():
        a, b = ours.float()(ids).logits, theirs.float()(ids).logits
    torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)  # theirs rounds A_log to bf16
