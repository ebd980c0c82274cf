"""Folders of quantised weights: each format's values, every way of loading, and what is refused."""

import json
import warnings

import pytest
import torch
from conftest import small_model
from parity import tokens
from quantised_folders import FORMATS, write_folder
from safetensors.torch import load_file, save_file

import qwen3next as q
from qwen3next.checkpoints import load
from qwen3next.checkpoints.convert import convert
from qwen3next.checkpoints.diff import diff
from qwen3next.checkpoints.reader import open_checkpoint
from qwen3next.checkpoints.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:Scales of activations")


def small_folder(folder, model_type="qwen3_next"):
    types = ("linear_attention", "full_attention")
    experts = {"num_experts": 0} if model_type == "qwen3_5_text" else {"num_experts": 4}
    small_model(model_type=model_type, num_hidden_layers=2, layer_types=types, **experts).save_pretrained(folder)
    if model_type == "qwen3_5_moe_text":
        convert(folder, folder, experts="single")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("plain") / "m")


def copied(plain, folder):
    folder.mkdir()
    for path in plain.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_format(plain, tmp_path, name):
    """To the bit in fp32, whole and as loaded; auto loads in config.json's dtype, which rounds once."""
    folder, form = copied(plain, tmp_path / "m"), FORMATS[name]
    meant = write_folder(folder, form)
    assert len(meant) > 20
    opened = open_checkpoint(folder)
    assert opened.formats == {form.name: len(meant)}
    for weight, x in meant.items():
        assert torch.equal(opened.read(weight), x), weight
    opened.files.close()
    model, auto = q.load(folder, dtype="float32"), q.load(folder)
    for weight in ("layers.0.linear_attn.out_proj", "layers.1.self_attn.o_proj"):
        if (x := meant.get(f"model.{weight}.weight")) is not None:
            mixer = getattr(model.blocks[int(weight[7])], weight.split(".")[2])
            assert torch.equal(mixer.get_submodule(weight.split(".")[3]).weight, x)
    expert = meant["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert torch.equal(model.blocks[1].mlp.experts.gate_up_proj[3, 32:], expert)
    assert torch.equal(auto.blocks[1].mlp.experts.gate_up_proj[3, 32:], expert.bfloat16())
    assert model(tokens(20)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["int4 asymmetric", "modelopt nvfp4", "gptq ordered", "awq"])
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_every_way_of_using_a_folder(tmp_path, monkeypatch, name, model_type):
    folder = small_folder(tmp_path / "m", model_type)
    meant = write_folder(folder, FORMATS[name])
    whole = q.load(folder)
    needs = []
    monkeypatch.setattr(load, "check_memory", lambda found, *_: needs.append(found))
    disk, int8 = q.load(folder, experts="disk"), q.load(folder, experts="int8")
    assert needs[0]["memory"] == sum(p.nbytes for p in set(whole.parameters()))
    assert needs[0]["disk"] == sum(p.nbytes for p in set(disk.parameters()))
    with torch.no_grad():
        assert torch.equal(disk(tokens(9)).logits, whole(tokens(9)).logits)
        assert int8(tokens(9)).logits.isfinite().all()
    kept, true = int8.blocks[0].mlp.experts, whole.blocks[0].mlp.experts.down_proj
    assert (kept.down_proj * kept.down_scale[..., None] - true).norm() < 0.01 * true.norm()
    gate_up, down = (torch.empty_like(p[3]) for p in whole.blocks[0].mlp.experts.parameters())
    count = disk.blocks[0].mlp.experts.read(3, gate_up, down)
    assert torch.equal(down, whole.blocks[0].mlp.experts.down_proj[3])
    ends = [f"layers.0.mlp.experts.3.{x}_proj." for x in ("gate", "up", "down")]
    stored = load_file(folder / "model.safetensors").items()
    read = [x.nbytes for n, x in stored if any(f"model.{end}" in n for end in ends) and "input_scale" not in n]
    assert count == sum(read)

    assert verify(folder, values=True).problems == []
    (folder / "quantize_config.json").write_text("{}")
    convert(folder, tmp_path / "bf16", dtype="bfloat16")
    assert not (tmp_path / "bf16" / "quantize_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    for a, b in zip(whole.parameters(), q.load(tmp_path / "bf16").parameters(), strict=True):
        assert torch.equal(a, b)
    found = {d.name: d for d in diff(folder, tmp_path / "bf16")}
    assert found.keys() <= meant.keys()
    assert all(d.relative < 2**-8 for d in found.values())
    whole.save_pretrained(tmp_path / "saved")
    assert torch.equal(q.load(tmp_path / "saved")(tokens(9)).logits, whole(tokens(9)).logits)


ROWS = ["fp8 blocks", "int4", "int4 asymmetric", "int8", "w8a8", "float8", "nvfp4", "modelopt nvfp4", "mxfp4", "gptq",
        "gptq v2", "autoround", "autoround gptq", "awq"]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"])
def test_the_table_of_the_page(tmp_path, name, model_type):
    """docs/quantised.md: each format in each family, in memory, with experts on disk and in int8, and converted."""
    folder = small_folder(tmp_path / "m", model_type)
    meant = write_folder(folder, FORMATS[name])
    assert len(meant) > 5
    whole = q.load(folder)
    with torch.no_grad():
        logits = whole(tokens(9)).logits
        assert logits.isfinite().all()
        if model_type != "qwen3_5_text":
            assert torch.equal(q.load(folder, experts="disk")(tokens(9)).logits, logits)
            assert q.load(folder, experts="int8").blocks[0].mlp.experts.down_proj.dtype == torch.int8
        convert(folder, tmp_path / "plain")
        assert torch.equal(q.load(tmp_path / "plain")(tokens(9)).logits, logits)


def test_scales_of_activations_are_left_with_a_warning(plain, tmp_path):
    folder = copied(plain, tmp_path / "m")
    write_folder(folder, FORMATS["modelopt nvfp4"])
    with pytest.warns(UserWarning, match=r"Scales of activations are not read.*input_scale"):
        q.load(folder)


def test_a_quantised_mtp_layer_and_head_are_read(plain, tmp_path):
    """`ignore` lists usually name them; the tensors decide."""
    folder = copied(plain, tmp_path / "m")
    form = FORMATS["int4"]
    meant = write_folder(folder, form)
    assert any(name.startswith("mtp.") for name in meant)
    tensors = load_file(folder / "model.safetensors")
    import numpy as np

    parts, head = form.write(np.random.default_rng(1), *tensors.pop("lm_head.weight").shape)
    tensors |= {f"lm_head.{end}": part for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = q.load(folder, dtype="float32")
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.mtp.blocks[0].self_attn.o_proj.weight, meant["mtp.layers.0.self_attn.o_proj.weight"])


def test_a_method_without_quantised_tensors_is_told(plain, tmp_path):
    folder = copied(plain, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="quantised with 'gptq', but none is"):
        q.load(folder)


def broken(name, change, sentence):
    return pytest.param(name, change, sentence, id=f"{name}: {sentence[:40]}")


def drop(end):
    return lambda t, _c: [t.pop(n) for n in list(t) if n.endswith(end)][:0]


def put(end, value):
    def change(tensors, _config):
        name = next(n for n in sorted(tensors) if n.endswith(end))
        tensors[name] = value(tensors[name])

    return change


def add(end, x):
    return lambda t, _c: t.update({f"model.layers.0.mlp.shared_expert.up_proj.{end}": x})


def said(**values):
    return lambda _t, config: config["quantization_config"].update(values)


CUT = lambda x: x[:-1].contiguous()  # noqa: E731
BROKEN = [
    broken("int4", drop("_shape"), r"\.weight_packed \(compressed-tensors pack-quantized\) needs .*_shape"),
    broken("int4", put("_shape", lambda x: x * 2), "is for a weight of shape"),
    broken("int4", put("_shape", lambda x: x.float()), "must be a shape"),
    broken("int4", put("_packed", lambda x: x[:, :-1].contiguous()), "_packed .* holds integers of"),
    broken("int4", put("weight_scale", CUT), r"weight_scale \(compressed-tensors pack-quantized\) has shape"),
    broken("int4", put("weight_scale", lambda x: x.to(torch.int8)), "is stored as I8"),
    broken("int4 asymmetric", put("zero_point", CUT), r"weight_zero_point .* does not fit"),
    broken("nvfp4", drop("weight_scale"), r"\.weight_packed \(compressed-tensors nvfp4.* needs"),
    broken("nvfp4", put("weight_scale", CUT), "has scales of shape"),
    broken("nvfp4", drop("_global_scale"), r"_packed \(compressed-tensors mxfp4-pack-quantized\) has scales of shape"),
    broken(
        "mxfp4", put("_packed", lambda x: torch.cat((x, x[:, ::2]), 1)), "mxfp4-pack.* has scales of shape"
    ),  # mxfp6
    broken(
        "int4", put("_packed", lambda x: torch.cat((x, x[:, ::2]), 1)), "integers of 6 bits; only 2, 4 and 8 are read"
    ),
    broken("mxfp4", put("weight_scale", lambda x: x.float()), "needs scales of one byte"),
    broken(
        "modelopt nvfp4", put("_scale_2", lambda x: x.expand(3).clone()), r"weight \(modelopt NVFP4\) .*tensor scale"
    ),
    broken("w8a8", put("weight_scale", CUT), "weight_scale has shape"),
    broken("w8a8", drop("weight_scale"), "weight is stored as I8, which is not supported"),
    broken("float8", drop("weight_scale"), "weight is stored in FP8, but its scales"),
    broken("gptq", drop("qzeros"), r"qweight of .*weight \(GPTQ or AWQ\) needs qzeros"),
    broken("gptq", put("qzeros", CUT), "qzeros of .* has shape"),
    broken("gptq", put("g_idx", lambda x: x[:-9].contiguous()), r"g_idx of model.*weight \(GPTQ\) has no entry a row"),
    broken("gptq", put("g_idx", lambda x: x + 1000), r"g_idx of .*weight \(GPTQ\) names a group that does not exist"),
    broken("gptq ordered", drop("g_idx"), r"qweight of .*\(GPTQ\) was quantised in order of activation"),
    broken("gptq without g_idx", said(group_size=7), "which no group_size of config.json gives"),
    broken("awq", said(version="gemv"), r"qweight of .*weight \(AWQ gemm\) is packed as 'gemv'"),
    broken("awq", put("qweight", lambda x: x.T.contiguous()), r"qweight of .*weight has the packing 'AWQ gemm'"),
    broken("awq", said(quant_method="hqq"), "config.json: the weights are quantised with 'hqq'; supported are"),
    broken("int4", add("trellis", torch.ones(3)), "up_proj.trellis is quantised as EXL3"),
    broken("int4", add("weight.absmax", torch.ones(3)), "up_proj.weight.absmax is quantised as bitsandbytes"),
    broken("awq", drop("qweight"), r"holds .*\.scales, but not .*weight in a known quantised format"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), BROKEN)
def test_what_cannot_be_read_is_refused_by_format_and_tensor(plain, tmp_path, name, change, sentence):
    folder = copied(plain, tmp_path / "m")
    write_folder(folder, FORMATS[name])
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=sentence) as refused:
            q.load(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
