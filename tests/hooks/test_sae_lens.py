"""SAELens reads activations of transformers' class (qwen3next/hf.py); with the real package: make test-saes."""

import pytest
import torch
from conftest import small_model

pytestmark = pytest.mark.oracle

TOKENS = torch.arange(14).view(2, 7)


def test_sae_lens_reads_layers_and_hook_points(tmp_path):
    """By name: without `hook_names` SAELens hooks every module, also points that do not exist in a run."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.load_model import HookedProxyLM
    from test_hook_packages import save_words
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qwen3next.hf  # noqa: F401

    small_model(mtp_num_hidden_layers=0).save_pretrained(tmp_path)
    save_words(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = ["model.layers.1", "model.layers.1.linear_attn.hook_gated"]
    hooked = HookedProxyLM(model, AutoTokenizer.from_pretrained(tmp_path), hook_names=names)
    with torch.no_grad():
        _, found = hooked.run_with_cache(TOKENS, names_filter=names)
        _, acts = model.core.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_post", "*.1.*.hook_gated"])
    assert torch.equal(found[names[0]], acts["blocks.1.hook_resid_post"])
    assert torch.equal(found[names[1]], acts["blocks.1.linear_attn.hook_gated"])
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=64, d_sae=128))
    assert sae(found[names[0]]).shape == (2, 7, 64)
