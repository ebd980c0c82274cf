"""llama.cpp reads the GGUF files that we write: its logits are those of the same file here. Needs llama-cpp-python."""

import pytest
import torch

import qwen3next as q
from qwen3next.checkpoints.gguf.write import to_gguf

pytest.importorskip("llama_cpp")

from recipes.measure.llama_cpp import Bindings

pytestmark = pytest.mark.oracle
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mtp_num_hidden_layers": 0,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
DENSE = {"num_experts": 0, "intermediate_size": 96}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_logits_of_one_file(tmp_path, family, kind, tied):
    """fp32: rounding alone. Otherwise llama.cpp rounds what it multiplies to the weights' type, or to 8 bits.

    Such rounding may change an expert of a token. A tensor in the wrong place gives a difference of about 1.
    """
    torch.manual_seed(0)
    config = q.presets.tiny(
        model_type=family, tie_word_embeddings=tied, **SMALL, **(DENSE if family == "qwen3_5_text" else EXPERTS)
    )
    model = q.Qwen3Next(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)  # logits that differ
    model.save_pretrained(tmp_path / "model")
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", kind=kind)
    ours = q.load(tmp_path / "model.gguf", dtype=torch.float32)
    theirs = Bindings(tmp_path / "model.gguf", "float32", 1)
    for count in (1, 7, 70):
        ids = torch.arange(5, 5 + count)
        with torch.no_grad():
            wanted = ours(ids[None]).logits[0, -1]
        got = theirs.logits(ids.tolist(), config.vocab_size)
        apart = ((got - wanted).square().mean().sqrt() / wanted.std()).item()
        assert apart < {"f32": 1e-3, "f16": 0.05, "bf16": 0.25, "q8_0": 0.25}[kind]
