"""PEFT on our classes and on transformers', and adapters that go from one to the other."""

import pytest
import torch
from common import checkpoint
from parity import tokens

import qwen3next as q

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import qwen3next.hf  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj", "up_proj", "gate_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "every linear map": {"target_modules": [*ALL, "down_proj", "shared_expert_gate", "lm_head"]},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "in_proj_qkvz", "up_proj", "gate_proj"],
        "rank_pattern": {"layers.3.self_attn.q_proj": 2},
        "alpha_pattern": {"in_proj_qkvz": 12},
        "use_rslora": True,
    },
    "experts": {"target_modules": ["out_proj"], "target_parameters": EXPERTS},
    "one matrix of the experts": {"target_modules": ["out_proj"], "target_parameters": EXPERTS[1:]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("m"))


def wrapped(model, seed=0, **settings):
    """The model with an adapter of random A and B."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.05)
    return model.eval()


def native(folder):
    return transformers.Qwen3NextForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(tokens(21)).logits


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_transformers_class(folder, tmp_path, case):
    theirs = wrapped(native(folder), **CASES[case])
    theirs.save_pretrained(tmp_path / "a")
    expected = logits(theirs)
    model = q.load(folder, adapters=[tmp_path / "a"])
    assert (expected - logits(native(folder))).abs().max() > 0.05
    assert (logits(model) - expected).abs().max() <= 1e-4
    model.adapters.merge()
    assert (logits(model) - expected).abs().max() <= 1e-4
    model.adapters.save("a", tmp_path / "b")
    again = peft.PeftModel.from_pretrained(native(folder), tmp_path / "b").eval()
    assert (logits(again) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "in_proj_qkv", "router"], "use_dora": True},
        {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    ],
    ids=["all linear", "dora", "experts"],
)
def test_peft_on_our_class(folder, tmp_path, settings):
    """Unmerged equals merged equals loaded again; gradients reach every adapter; the base is as it was."""
    from transformers import AutoModelForCausalLM

    model = wrapped(AutoModelForCausalLM.from_pretrained(folder), **settings)
    expected = logits(model)
    loss = model(tokens(21), labels=tokens(21)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a").eval()
    assert torch.equal(logits(again), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    generated = model.generate(tokens(9), max_new_tokens=5, do_sample=False)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 1e-4
    assert torch.equal(merged.generate(tokens(9), max_new_tokens=5, do_sample=False), generated)
    if not settings.get("use_dora"):
        assert (logits(q.load(folder, adapters=[tmp_path / "a"])) - expected).abs().max() <= 1e-4


def test_several_adapters_on_our_class(folder):
    from transformers import AutoModelForCausalLM

    model = wrapped(AutoModelForCausalLM.from_pretrained(folder), target_modules=["q_proj", "out_proj"])
    first = logits(model)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model.set_adapter("b")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
