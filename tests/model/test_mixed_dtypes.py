"""Tensors stored in several dtypes: a loaded model runs, and `load` and `verify` refuse dtypes that cannot run."""

import re

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file

import qwen3next as q
from qwen3next.checkpoints.convert import convert
from qwen3next.checkpoints.verify import verify

STUDY = {
    "model_type": "qwen3",
    "layer_types": ("full_attention",) * 2,
    "zero_centred_norms": False,
    "partial_rotary_factor": 1.0,
    "num_experts": 0,
    "mtp_num_hidden_layers": 0,
}
CONFIGS = {
    "qwen3_next": small_config(num_hidden_layers=2, layer_types=("linear_attention", "full_attention")),
    "qwen3_5": small_config(
        model_type="qwen3_5_text",
        num_experts=0,
        num_hidden_layers=2,
        layer_types=("linear_attention", "full_attention"),
    ),
    "headwise": small_config(**STUDY, attention_gate="headwise", num_hidden_layers=2),
    "variant": small_config(
        **STUDY, attention_gate="none", attention_bias=True, attention_output_norm=True, num_hidden_layers=2
    ),
}
IDS = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(0))


def kind_of(name):
    """The name without layer numbers, equal for the same tensor in all layers."""
    return re.sub(r"\d+", "0", name)


def runs(model):
    """Check that a forward, a step and a loss with gradients have the same dtype and similar values."""
    model.loss(IDS).total.backward()
    with torch.no_grad():
        want = model(IDS).logits[:, -1]
        cache = model.new_cache()
        list(model.prefill(IDS[:, :-1], cache))
        got = model.step(IDS[:, -1:], cache)
    bound = 3e-2 if model.embed_tokens.weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    assert (got - want).abs().max() < bound * want.abs().max()
    assert want.dtype == model.embed_tokens.weight.dtype


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "usual, other",
    [
        ("bfloat16", "float32"),
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bfloat16", "float64", marks=pytest.mark.slow),
    ],
)
def test_each_tensor_in_another_dtype(name, usual, other, tmp_path):
    torch.manual_seed(0)
    usual, other = getattr(torch, usual), getattr(torch, other)
    model = q.Qwen3Next(CONFIGS[name])
    model.to(usual).save_pretrained(tmp_path)
    path, outcomes = tmp_path / "model.safetensors", set()
    whole = load_file(path)
    for tensor in {kind_of(n): n for n in whole}.values():
        save_file(whole | {tensor: whole[tensor].to(other)}, path)
        problems = verify(tmp_path).problems
        if problems:
            with pytest.raises(ValueError, match="dtype") as refused:
                q.load(tmp_path)
            assert problems == [str(refused.value)]
        runs(q.load(tmp_path, dtype=usual) if problems else q.load(tmp_path))
        outcomes.add("refused" if problems else "loaded")
    assert outcomes == ({"loaded", "refused"} if other != torch.float64 else {"refused"})


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_cast_runs(name, stored, dtype, tmp_path):
    torch.manual_seed(0)
    q.Qwen3Next(CONFIGS[name]).to(stored).save_pretrained(tmp_path / "a")
    runs(q.load(tmp_path / "a", dtype=dtype))
    convert(tmp_path / "a", tmp_path / "b", dtype=dtype)
    assert verify(tmp_path / "b").problems == []
    runs(q.load(tmp_path / "b"))


def test_a_merged_embedding_is_named(tmp_path):
    q.Qwen3Next(CONFIGS["qwen3_5"]).to(torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].float()}, path)
    with pytest.raises(
        ValueError,
        match=r"embed_tokens.weight is F32, but .* are BF16: .*load with one dtype, such as dtype='bfloat16'",
    ):
        q.load(tmp_path)
