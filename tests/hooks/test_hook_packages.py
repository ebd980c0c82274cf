"""With the real packages: nnsight traces our hook points, and TransformerLens' names have the same meaning."""

import pytest
import torch
from conftest import small_model

import qwen3next as q

pytestmark = pytest.mark.oracle

TOKENS = torch.arange(14).view(2, 7)
BETA = "blocks.1.linear_attn.hook_beta"


def test_nnsight_reads_and_patches():
    nnsight = pytest.importorskip("nnsight")
    model = small_model()
    plain, acts = model.run_with_cache(TOKENS, names_filter=["*.hook_q_pre", "*.hook_beta"])
    nulled = model.run_with_hooks(TOKENS, fwd_hooks=[(BETA, lambda beta, _hook: beta * 0)]).logits
    traced = nnsight.NNsight(model)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain)
        with traced.trace(TOKENS):
            before = traced.blocks[1].linear_attn.hook_q_pre.output.save()
            beta = traced.blocks[1].linear_attn.hook_beta.output.save()
            out = traced.output.save()
        assert torch.equal(before, acts["blocks.1.linear_attn.hook_q_pre"])
        assert torch.equal(beta, acts[BETA])
        assert torch.equal(out.logits, plain)
        with traced.trace(TOKENS):
            traced.blocks[1].linear_attn.hook_beta.output = traced.blocks[1].linear_attn.hook_beta.output * 0
            out = traced.output.save()
        assert torch.equal(out.logits, nulled)
        assert not torch.equal(nulled, plain)


def test_nnsight_reads_and_patches_what_is_exposed():
    nnsight = pytest.importorskip("nnsight")
    model = small_model()
    traced = nnsight.NNsight(model)
    with torch.no_grad(), model.materialize(state={0: [3]}, pattern=[1, 3]):
        plain = model(TOKENS).logits
        with traced.trace(TOKENS):
            state = traced.blocks[0].linear_attn.hook_state.output.save()
            traced.blocks[0].linear_attn.hook_state.output = state * 0
            matrix = traced.blocks[1].linear_attn.hook_pattern.output.save()
            pattern = traced.blocks[3].self_attn.hook_pattern.output.save()
            out = traced.output.save()
    assert state.shape == (2, 4, 16, 24)
    assert matrix.shape == pattern.shape == (2, 4, 7, 7)
    torch.testing.assert_close(out.logits[:, :4], plain[:, :4])
    assert (out.logits[:, 4:] - plain[:, 4:]).abs().max() > 1e-3


NAMES = [
    "hook_embed",
    *(f"blocks.1.hook_resid_{place}" for place in ("pre", "mid", "post")),
    *(f"blocks.1.{name}" for name in ("hook_in", "hook_out", "hook_attn_out", "hook_mlp_out")),
    *(f"blocks.1.attn.hook_{name}" for name in ("q", "k", "v", "z", "rot_q", "rot_k", "pattern", "attn_scores", "out")),
    "blocks.1.mlp.hook_out",
    "ln_final.hook_normalized",
    "ln_final.hook_out",
    "unembed.hook_out",
    "hook_unembed",
]


def save_words(folder):
    """A tokenizer of 97 words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    special = {"unk_token": "0", "eos_token": "1", "bos_token": "2", "pad_token": "3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A random Qwen3 model, loaded by TransformerLens and by qwen3next."""
    pytest.importorskip("transformer_lens")
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        initializer_range=0.06,
        max_position_embeddings=512,
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = str(tmp_path_factory.mktemp("qwen3"))
    save_words(folder)
    model.save_pretrained(folder)
    theirs = TransformerBridge.boot_transformers(folder, device="cpu")
    ours = q.load(folder)
    ours.set_backend("attention", "eager")
    return theirs, ours


def test_transformer_lens_names_have_transformer_lens_values(both):
    theirs, ours = both
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(TOKENS)
        our_logits, acts = ours.run_with_cache(TOKENS, names_filter=NAMES)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-5)
    for name in NAMES:
        wanted = cache[name]
        if name.endswith("scores"):  # above the diagonal they use other values for minus infinity
            wanted = wanted.masked_fill(torch.ones_like(wanted, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(acts[name], wanted, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# Their hook_resid_mid is only the norm's input, so a patch there does not change the residual stream. Halving scores of
# minus infinity, or logits, has no visible effect.
UNLIKE = ("hook_resid_mid", "scores", "unembed")


@pytest.mark.parametrize("name", [name for name in NAMES if not any(part in name for part in UNLIKE)])
def test_a_patch_does_there_what_it_does_here(both, name):
    """Halving the tensor at a point of the same name changes the logits equally."""
    theirs, ours = both
    hooks = [(name, lambda x, hook: x * 0.5)]
    with torch.no_grad():
        wanted = theirs.run_with_hooks(TOKENS, fwd_hooks=hooks)
        got = ours.run_with_hooks(TOKENS, fwd_hooks=hooks).logits
        assert not torch.allclose(got, ours(TOKENS).logits)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """The class of qwen3next/hf.py on a random hybrid checkpoint."""
    pytest.importorskip("transformers", minversion="5.23")
    from transformers import AutoModelForCausalLM

    import qwen3next.hf  # noqa: F401

    folder = tmp_path_factory.mktemp("hybrid")
    small_model(mtp_num_hidden_layers=0).save_pretrained(folder)
    save_words(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_nnsight_on_transformers_class(hybrid):
    """Layers by transformers' names and hook points by ours; in generation as well."""
    nnsight = pytest.importorskip("nnsight")
    traced = nnsight.NNsight(hybrid)
    with torch.no_grad():
        _, acts = hybrid.core.run_with_cache(TOKENS, names_filter=[BETA, "blocks.2.hook_resid_post"])
        nulled = hybrid.core.run_with_hooks(TOKENS, fwd_hooks=[(BETA, lambda beta, _hook: beta * 0)]).logits
        with traced.trace(TOKENS):
            beta = traced.model.layers[1].linear_attn.hook_beta.output.save()
            layer = traced.model.layers[2].output[0].save()
            logits = traced.lm_head.output.save()
        assert torch.equal(beta, acts[BETA])
        assert torch.equal(layer, acts["blocks.2.hook_resid_post"])
        assert torch.equal(logits, hybrid(TOKENS).logits)
        with traced.trace(TOKENS):
            traced.model.layers[1].linear_attn.hook_beta.output = (
                traced.model.layers[1].linear_attn.hook_beta.output * 0
            )
            patched = traced.lm_head.output.save()
        assert torch.equal(patched, nulled)


def test_transformer_lens_wraps_transformers_classes_alone(hybrid):
    """Its adapter asks for transformers' module names; `model.core` has its names for tensors."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    with pytest.raises(ValueError, match="submodule"):
        bridge.boot_transformers(hybrid.name_or_path, hf_model=hybrid, device="cpu")
    _, acts = hybrid.core.run_with_cache(TOKENS, names_filter="blocks.1.mlp.hook_expert_weights")
    assert len(acts) == 1
