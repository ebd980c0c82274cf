"""Dequantised weights against the packages that define the formats, to the bit; each test needs its package.

compressed-tensors is among the development tools. The others are not installed by default:
autoawq 0.2.6, gptqmodel 7.7.0, auto-round 0.16.1, nvidia-modelopt 0.47.0.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from quantised_folders import FORMATS, awq, gptq
from safetensors.torch import save_file

from qwen3next.checkpoints.quantised.find import Found
from qwen3next.checkpoints.quantised.settings import Settings
from qwen3next.files.tensor_files import Files, read_header

pytestmark = pytest.mark.oracle
COMPRESSED = [name for name, form in FORMATS.items() if form.config["quant_method"] == "compressed-tensors"]
SIZES = ((64, 96), (24, 224), (8, 32))


def ours(folder, parts, config):
    """The weight that the reader makes of these tensors, in fp32."""
    save_file({f"m.{end}": x for end, x in parts.items()}, folder / "x.safetensors")
    with Files() as files:
        found = Found(read_header(folder / "x.safetensors"), Settings(config), files)
        assert found.problems == []
        return found.weights["m.weight"].read(files)


def scheme_of(config):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    given = config["config_groups"]["group_0"]["weights"]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**given))


def compressor(config):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(config["format"])


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("size", SIZES)
def test_compressed_tensors(tmp_path, name, size):
    pytest.importorskip("compressed_tensors")
    form = FORMATS[name]
    if not form.fits(*size):
        return
    parts, _ = form.write(np.random.default_rng(0), *size)
    theirs = compressor(form.config).decompress(dict(parts), scheme_of(form.config))["weight"]
    assert torch.equal(ours(tmp_path, parts, form.config).to(theirs.dtype), theirs)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("size", [(64, 96), (20, 480)])  # 20 rows: no multiple of what a word holds
def test_compressed_tensors_packs_what_is_read(tmp_path, name, size):
    """From weights: their packing, then their unpacking and ours."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.utils import calculate_qparams

    form, (out, inputs) = FORMATS[name], size
    given, scheme = form.config["config_groups"]["group_0"]["weights"], scheme_of(form.config)
    torch.manual_seed(0)
    weight = torch.randn(size) * 0.1
    size_of = given.get("group_size") or inputs
    grouped = weight.view(out, -1, size_of) if given["strategy"] != "tensor" else weight.view(1, 1, -1)
    whole = torch.tensor([448 * 6 / float(weight.abs().max())]) if given["strategy"] == "tensor_group" else None
    scale, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale.view(()) if scale.numel() == 1 else scale}
    state |= {} if whole is None else {"weight_global_scale": whole}
    if not given["symmetric"]:
        state["weight_zero_point"] = zeros.to(torch.int8)
    parts = compressor(form.config).compress(state, scheme)
    theirs = compressor(form.config).decompress(parts, scheme)["weight"]
    mine = ours(tmp_path, parts, form.config)
    assert torch.equal(mine.to(theirs.dtype), theirs)
    assert (mine - weight).norm() < (0.3 if given["num_bits"] > 2 else 0.5) * weight.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_of_old_compressed_tensors(tmp_path, bits):
    """compressed-tensors before 0.20 could sort inputs by group and kept weight_g_idx: the formula, by hand."""
    rng, form = np.random.default_rng(0), FORMATS["int4" if bits == 4 else "int8"]
    parts, meant = form.write(rng, 24, 96)
    order = torch.from_numpy(rng.permutation(96))
    scale = parts["weight_scale"].float().repeat_interleave(32, 1)
    codes = (meant / scale).round()
    parts["weight_g_idx"] = (torch.arange(96) // 32)[order].int()
    assert torch.equal(ours(tmp_path, parts, form.config), codes * scale[:, order])
    parts["weight_g_idx"][:] = -1
    assert torch.equal(ours(tmp_path, parts, form.config), meant)


def gptqmodel_weight(parts, *, bits, group, version):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    inputs, out = len(parts["g_idx"]), parts["scales"].shape[1]
    layer = TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=True, in_features=inputs, out_features=out, bias=False
    )
    for name, x in parts.items():
        setattr(layer, name, x.clone())
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    return layer.dequantize_weight().T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (32, 224)])  # the last group of 64 has 32 inputs
def test_gptq(tmp_path, bits, version, ordered, size):
    pytest.importorskip("gptqmodel")
    form = gptq(bits=bits, group=64, version=version, ordered=ordered)
    parts, _ = form.write(np.random.default_rng(0), *size)
    theirs = gptqmodel_weight(parts, bits=bits, group=64, version=version)
    assert torch.equal(ours(tmp_path, parts, form.config).to(theirs.dtype), theirs)


def test_gptq_v1_with_a_zero_point_of_zero(tmp_path):
    """Stored as 0 − 1, which borrows from the next zero point of the word; gptqmodel's addition gives it back."""
    pytest.importorskip("gptqmodel")
    form = gptq(version=2, group=32)
    parts, meant = form.write(np.random.default_rng(0), 64, 96)
    parts["qzeros"] &= ~torch.tensor(0x0F0F, dtype=torch.int32)  # some are zero
    meant = ours(tmp_path, parts, form.config)
    parts["qzeros"] -= 0x11111111
    theirs = gptqmodel_weight(parts, bits=4, group=32, version=1)
    mine = ours(tmp_path, parts, gptq(version=1, group=32).config)
    assert torch.equal(mine.half(), theirs)
    assert torch.equal(mine, meant)


@pytest.mark.parametrize("packing", ["autoround", "autoround gptq"])
def test_autoround(tmp_path, packing):
    pytest.importorskip("auto_round")
    kind = "qlinear_torch_zp" if packing == "autoround gptq" else "qlinear_torch"
    module = pytest.importorskip(f"auto_round_extension.torch.{kind}")
    parts, _ = FORMATS[packing].write(np.random.default_rng(0), 64, 96)
    layer = module.QuantLinear(4, 32, 96, 64, bias=False)
    for name, x in parts.items():
        setattr(layer, name, x.clone())
    theirs = layer(torch.eye(96, dtype=torch.float16)).T
    assert torch.equal(ours(tmp_path, parts, FORMATS[packing].config).half(), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_awq(tmp_path, size):
    spec = importlib.util.find_spec("awq")
    if spec is None or spec.origin is None:
        pytest.skip("needs autoawq")
    path = Path(spec.origin).parent / "utils" / "packing_utils.py"  # without awq itself, which needs old transformers
    theirs = importlib.util.spec_from_file_location("packing_utils", path)
    packing = importlib.util.module_from_spec(theirs)
    theirs.loader.exec_module(packing)
    form = awq()
    parts, _ = form.write(np.random.default_rng(0), *size)
    expected = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32).T
    assert torch.equal(ours(tmp_path, parts, form.config).half(), expected)


def test_modelopt(tmp_path):
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    form = FORMATS["modelopt nvfp4"]
    parts, _ = form.write(np.random.default_rng(0), 24, 96)
    theirs = tensor.NVFP4QTensor(torch.Size((24, 96)), torch.float32, parts["weight"]).dequantize(
        scale=parts["weight_scale"], double_scale=parts["weight_scale_2"], block_sizes={-1: 16}
    )
    assert torch.equal(ours(tmp_path, parts, form.config), theirs)
