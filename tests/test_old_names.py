"""Old names of modules, classes, attributes, arguments and backends still work, each with a warning of the new one."""

import subprocess
import sys

import pytest
import torch
from conftest import small_model

import layers.old_names
import qwen3next as q
import qwen3next.old_names
import recipes.old_names
from layers.dispatch.backends import choose
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import SwiGLU
from layers.moe import SparseMoE
from layers.norm import RMSNorm
from layers.segments import Segments

MODULES = layers.old_names.MODULES | qwen3next.old_names.MODULES | recipes.old_names.MODULES
TOKENS = torch.arange(12)[None]


def test_modules_that_moved_are_found():
    """In a process of its own, where none was imported: with a warning that points at the importing file."""
    code = f"""
import importlib, warnings
import qwen3next, recipes
for old, new in {MODULES!r}.items():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(f"import {{old}}")
    seen = [w for w in seen if w.category is FutureWarning and f"{{old}} is now {{new}};" in str(w.message)]
    assert [w.filename for w in seen] == ["<string>"], (old, seen)
    module, again = importlib.import_module(new), importlib.import_module(old)
    names = [n for n in vars(module) if not n.startswith("_")]
    assert names and all(getattr(again, n) is getattr(module, n) for n in names), old
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_old_names_in_moved_modules():
    code = """
from layers.kv_state import KVState
from layers.state.kv_cache import KVCache
from qwen3next.released import Entry, entries
from qwen3next.generate import stream
import qwen3next as q
assert KVState is KVCache and q.stream is stream
import torch
assert q.generate(q.Qwen3Next(q.presets.tiny()), torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_of_a_module_whose_name_a_command_took():
    with warned("recipes.training.data.PackedWindows"):
        from recipes.data import PackedWindows
    from recipes.training import data

    assert PackedWindows is data.PackedWindows


def warned(new):
    return pytest.warns(FutureWarning, match=f"is now .*{new}")


def test_attributes_and_methods():
    model = small_model()
    cache = model.new_cache()
    model(TOKENS, cache=cache)
    with warned("recurrent"):
        assert cache.layers[0].memory is cache.layers[0].recurrent
    with warned("select"):
        assert cache.reorder([0, 0]).batch == 2
    with warned("HybridCache"):
        assert q.Cache is q.HybridCache
    with warned("token_losses"):
        old = list(model.score(TOKENS))
    assert torch.equal(old[0][1], next(iter(model.token_losses(TOKENS)))[1])
    with warned("materialize"), model.expose(state={0: [3]}):
        _, acts = model.run_with_cache(TOKENS, names_filter="blocks.0.linear_attn.hook_state")
        assert len(acts) == 1
    with warned("conv_kernel_size"):
        assert model.config.conv_taps == model.config.conv_kernel_size
    segments = Segments.from_lengths([[5, 3], [8]])
    for old, new in {
        "plain": "unpadded",
        "aligned": "uniform_offset",
        "past": "offsets",
        "number": "segment_ids",
        "starts": "resets",
    }.items():
        with warned(new):
            assert getattr(segments, old) is getattr(segments, new)
    with warned("offset"):
        assert segments.runs[0].past == 0


def test_hook_erased_is_hook_recalled():
    model, seen = small_model(), []
    model.set_backend("delta_rule", "recurrent")
    old = "blocks.0.linear_attn.hook_erased"
    model.run_with_hooks(TOKENS, fwd_hooks=[(old, lambda _x, hook: seen.append(hook.name))])
    assert set(seen) == {"blocks.0.linear_attn.hook_recalled"}
    _, acts = model.run_with_cache(TOKENS, names_filter=old)
    assert torch.equal(acts[old], acts["blocks.0.linear_attn.hook_recalled"])
    with warned("hook_recalled"):
        assert model.blocks[0].linear_attn.hook_erased is model.blocks[0].linear_attn.hook_recalled


def test_arguments():
    with warned("conv_kernel_size"):
        layer = GatedDeltaNet(64, key_heads=1, value_heads=2, key_dim=8, value_dim=8, conv_taps=3)
    assert layer.conv_weight.shape[1] == 3
    with warned("intermediate_size"):
        assert SwiGLU(8, inner=16).up_proj.out_features == 16
    with warned("norm_topk_prob"):
        SparseMoE(8, experts=4, top_k=2, intermediate_size=16, shared_intermediate_size=0, renormalise=True)
    with warned("dim"):
        assert RMSNorm(width=8).weight.shape == (8,)
    with pytest.raises(TypeError, match="both 'width' and 'dim'"):
        RMSNorm(width=8, dim=8)


def test_backends_and_places():
    model = small_model()
    with warned("chunked_recompute"):
        model.set_backend("delta_rule", "piecewise")
    assert model.blocks[0].linear_attn.backend == "chunked_recompute"
    with warned("chunked_recompute"):
        assert choose("delta_rule", "piecewise", torch.ones(1)) == "chunked_recompute"


def test_experts_in_the_files_are_on_disk(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    with warned("disk"):
        lazy = q.load(tmp_path, experts="mmap")
    with torch.no_grad():
        assert torch.equal(lazy(TOKENS).logits, q.load(tmp_path, experts="disk")(TOKENS).logits)
