"""Convert, compare and verify folders; FP8 blocks against a loop over blocks."""

import json
import warnings

import pytest
import torch
from conftest import small_model
from parity import stored, tokens
from safetensors.torch import load_file, save_file
from test_families import make, quietly_load

import qwen3next as q
from qwen3next import cli
from qwen3next.checkpoints.convert import convert
from qwen3next.checkpoints.diff import diff, diff_config
from qwen3next.checkpoints.reader import open_checkpoint
from qwen3next.checkpoints.verify import verify

MOE = {"model_type": "qwen3_5_moe_text"}


@pytest.fixture
def folder(tmp_path):
    small_model(**MOE).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "notes.txt").write_text("kept")
    return tmp_path / "m"


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def parameters(folder):
    return dict(quietly_load(folder).named_parameters())


def test_fused_to_single_and_back(folder, tmp_path):
    convert(folder, tmp_path / "single", experts="single", max_shard_bytes=100_000)
    names = stored(tmp_path / "single")
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in names
    assert "mtp.layers.0.mlp.experts.0.down_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    same(parameters(folder), parameters(tmp_path / "single"))
    assert (tmp_path / "single" / "notes.txt").read_text() == "kept"
    convert(tmp_path / "single", tmp_path / "fused", experts="fused")
    fused = stored(tmp_path / "fused")
    assert fused["mtp.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 64)
    same(parameters(folder), parameters(tmp_path / "fused"))
    assert list(diff(folder, tmp_path / "fused")) == list(diff(tmp_path / "single", folder)) == []


def test_mtp_experts_arranged_otherwise_than_the_main_ones(folder):
    """Experts as released: fused in the main model, single in MTP (Qwen3.5), or fused in both (Qwen3.6)."""
    names = stored(folder)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "mtp.layers.0.mlp.experts.0.up_proj.weight" in names


def test_dtype_and_mtp(folder, tmp_path):
    config = convert(folder, tmp_path / "b", dtype="bfloat16", mtp=False)
    assert config.mtp_num_hidden_layers == 0
    expected = dict(q.load(folder, dtype="bfloat16").named_parameters())
    same({n: p for n, p in expected.items() if not n.startswith("mtp.")}, parameters(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_in_place(folder):
    before = parameters(folder)
    convert(folder, folder, experts="single")
    same(before, parameters(folder))
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    assert (folder / "notes.txt").exists()


def test_a_failure_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3next.checkpoints.save.write", full)
    with pytest.raises(OSError, match="No space"):
        convert(folder, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="must be 'fused', 'single' or None"):
        convert(folder, tmp_path / "new", experts="both")


def test_a_vision_tower_is_carried_or_dropped(tmp_path):
    model = make("qwen3_5_moe")
    model.save_pretrained(tmp_path / "vl")
    (tmp_path / "vl" / "preprocessor_config.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(tmp_path / "vl", tmp_path / "kept", experts="single")
        convert(tmp_path / "vl", tmp_path / "text", vision=False)
    import transformers

    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "kept", dtype="float32").eval()
    ids = tokens(20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "kept" / "preprocessor_config.json").exists()
    text = stored(tmp_path / "text")
    assert not any("visual" in name or "language_model" in name for name in text)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "qwen3_5_moe_text"
    same(parameters(tmp_path / "vl"), parameters(tmp_path / "text"))


def quantise(folder, block=(16, 24), dtype=torch.float32):
    """Write an FP8 folder in the released layout, and compute its dequantised weights block by block."""
    meant = {}
    tensors = load_file(folder / "model.safetensors")
    for name, x in list(tensors.items()):
        tensors[name] = x.bfloat16() if "norm" not in name and "A_log" not in name else x
        if x.ndim < 2 or not name.endswith(("_proj.weight", "_proj", "qkv.weight")) or "in_proj_a" in name:
            continue
        scale = torch.zeros(*x.shape[:-2], -(-x.shape[-2] // block[0]), -(-x.shape[-1] // block[1]))
        weight, meant[name] = torch.zeros_like(x, dtype=torch.float8_e4m3fn), torch.zeros_like(x, dtype=torch.float32)
        for i in range(scale.shape[-2]):
            for j in range(scale.shape[-1]):
                at = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                largest = x[at].abs().amax((-2, -1))
                scale[..., i, j] = (largest / 448).to(dtype).float()
                weight[at] = (x[at] / scale[..., i, j, None, None]).to(torch.float8_e4m3fn)
                meant[name][at] = weight[at].float() * scale[..., i, j, None, None]
        tensors[name], tensors[f"{name}_scale_inv"] = weight, scale.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    config["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("experts", ["fused", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_dequantised(folder, tmp_path, experts, dtype):
    convert(folder, folder, experts=experts)
    meant = quantise(folder, dtype=dtype)
    assert len(meant) > 20
    opened = open_checkpoint(folder)
    for name, x in meant.items():
        assert torch.equal(opened.read(name), x), name
    model = q.load(folder, dtype="float32")
    assert model(tokens(20)).logits.isfinite().all()
    auto = dict(q.load(folder).named_parameters())
    assert auto["blocks.0.linear_attn.out_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(
        auto["blocks.0.linear_attn.out_proj.weight"], meant["model.layers.0.linear_attn.out_proj.weight"].bfloat16()
    )
    convert(folder, tmp_path / "bf16", dtype="bfloat16")
    same(dict(q.load(folder, dtype="bfloat16").named_parameters()), parameters(tmp_path / "bf16"))
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    found = list(diff(folder, tmp_path / "bf16"))
    assert 0 < max(d.relative for d in found) < 2**-8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, n: t.pop(f"{n}_scale_inv"), "its scales .*_scale_inv are missing"),
        (
            lambda t, n: t.update({f"{n}_scale_inv": torch.ones(2, 2)}),
            r"has shape \[2, 2\], but the weight's blocks require",
        ),
        (lambda t, n: t.update({f"{n}_scale_inv": t[f"{n}_scale_inv"].to(torch.int8)}), "stored as I8"),
        (lambda t, n: t.update({n: t[n].float()}), "is not stored in FP8"),
    ],
)
def test_damaged_scales_are_named(folder, change, sentence):
    name = next(iter(quantise(folder)))
    tensors = load_file(folder / "model.safetensors")
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        q.load(folder)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; supported are fp8, compressed-tensors"),
        ("awq", "'awq'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be"),
    ],
)
def test_other_quantisations_are_refused(folder, value, sentence):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        q.load(folder)


def test_diff_names_what_differs(folder, tmp_path):
    model = q.load(folder)
    with torch.no_grad():
        model.blocks[1].mlp.experts.down_proj[5] += 0.25
        model.norm.weight[3] = float("nan")
    model.blocks[2].linear_attn.out_proj.bfloat16()
    q.save(model, tmp_path / "b", layout=q.Layout(flat_projections=True))
    (norm, expert, cast) = sorted(diff(folder, tmp_path / "b"), key=lambda d: d.name != "model.norm.weight")
    assert (norm.name, norm.what, norm.relative) == ("model.norm.weight", "values", float("inf"))
    assert (expert.name, expert.what) == ("model.layers.1.mlp.experts.down_proj", "values")
    assert expert.largest == pytest.approx(0.25, abs=1e-6)
    whole = q.load(folder).blocks[1].mlp.experts.down_proj
    assert expert.relative == pytest.approx(0.25 * whole[5].numel() ** 0.5 / whole.norm().item(), rel=1e-5)
    assert (cast.what, cast.detail) == ("values", "float32 and bfloat16")
    small_model(seed=1, mtp_num_hidden_layers=0, **(MOE | {"vocab_size": 98})).save_pretrained(tmp_path / "c")
    kinds = {d.name: d.what for d in diff(folder, tmp_path / "c")}
    assert kinds["lm_head.weight"] == "shape"
    assert kinds["mtp.fc.weight"] == "only in A"
    assert {d.what for d in diff(tmp_path / "c", folder)} == {"values", "shape", "only in B"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert diff_config(open_checkpoint(folder), open_checkpoint(tmp_path / "c"))["vocab_size"] == (97, 98)


def test_verify(folder):
    (folder / "tokenizer.json").unlink()
    report = verify(folder, values=True)
    assert report.problems == []
    assert report.notices == ["There is no tokenizer.json: the model can be used with token ids only."]
    assert report.nbytes == sum(p.numel() * 4 for p in q.load(folder).parameters())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.linear_attn.A_log"][1] = float("inf")
    tensors["model.layers.1.mlp.gate.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    report = verify(folder, values=True)
    assert "A_log holds 1 values that are not finite" in report.problems[0]
    assert any("mlp.gate.weight is zero everywhere" in notice for notice in report.notices)


def test_verify_says_everything_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors["model.layers.0.linear_attn.out_proj.weight"] = torch.zeros(3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("nothing")
    (folder / "generation_config.json").write_text("[]")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    problems = "\n".join(verify(folder).problems)
    for part in (
        "lacks model.norm.weight",
        "has shape [3]",
        "stored as I8",
        "not a tokenizer",
        "generation_config.json",
    ):
        assert part in problems
    assert any("pytorch_model.bin" in notice for notice in verify(folder).notices)
    (folder / "config.json").write_text("{}")
    assert "no model_type" in verify(folder).problems[0]


def test_commands(folder, tmp_path, capsys):
    (folder / "tokenizer.json").unlink()
    assert cli.main(["verify", str(folder), "--values"]) == 0
    assert "valid: qwen3_5_moe_text, with MTP" in capsys.readouterr().out
    assert cli.main(["convert", str(folder), str(tmp_path / "b"), "--experts", "single", "--drop-mtp"]) == 0
    assert "qwen3_5_moe_text" in capsys.readouterr().err
    assert cli.main(["diff", str(folder), str(folder)]) == 0
    assert capsys.readouterr().out.startswith("equal: ")
    assert cli.main(["diff", str(folder), str(tmp_path / "b"), "--limit", "3"]) == 1
    out = capsys.readouterr().out
    assert "config.json: mtp_num_hidden_layers is 1 in A, 0 in B" in out
    assert "only in A" in out
    assert "not shown" in out
    (tmp_path / "b" / "model.safetensors").write_bytes(b"")
    assert cli.main(["verify", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().out.startswith("problem: ")
    for command in (["convert", "nowhere", "x"], ["diff", "nowhere", "x"], ["verify", "nowhere"]):
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "nowhere is not a folder" in err
    assert cli.main(["convert", str(folder), str(tmp_path / "c"), "--shard-gb", "-1"]) == 2
    assert "must be positive" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
