"""q.load(..., weights=): folders kept in their groups, folders rounded, and the compiled step over both."""

import warnings

import pytest
import torch
from conftest import small_model
from parity import tokens
from quantised_folders import FORMATS, write_folder
from test_gguf import quantised_file
from test_quantised import copied, small_folder

import qwen3next as q
from layers.quantised.group_weight import quantise
from layers.quantised.held import GroupLayout, HoldsGroups
from qwen3next.checkpoints import group_weights, load
from qwen3next.checkpoints.group_weights import held

KEPT = ["int4", "int4 channel", "int4 asymmetric", "int4 channel asymmetric", "int8", "int8 channel asymmetric", "w8a8",
        "w8a8 asymmetric", "gptq without g_idx", "gptq v2", "gptq one group", "autoround", "autoround gptq",
        "autoround awq", "awq", "gptq ordered"]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("plain") / "m")


def groups_of(model):
    """Every weight in groups, by the parameter's name."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HoldsGroups):
            leaves = {name.removesuffix("_codes") for name in module._buffers if name.endswith("_codes")}
            found |= {f"{prefix}.{leaf}": module.held(leaf) for leaf in leaves}
    return found


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_has_the_values_of_the_dequantised_load(plain, tmp_path, monkeypatch, name):
    folder = copied(plain, tmp_path / "m")
    write_folder(folder, FORMATS[name])
    needs = []
    monkeypatch.setattr(load, "check_memory", lambda found, *_: needs.append(found["memory"]))
    kept, whole = q.load(folder, weights="stored", dtype="float32"), q.load(folder, dtype="float32")
    exact, found = dict(whole.named_parameters()), groups_of(kept)
    assert len(found) >= (1 if name in ("gptq ordered", "gptq without g_idx") else 8)  # others have odd groups
    assert kept.rounding == {}
    for parameter, weight in found.items():
        assert torch.equal(weight.dequantise(), exact[parameter]), parameter
    alive = {id(x): x.nbytes for x in (*kept.parameters(), *kept.buffers())}
    assert needs[0] == sum(alive.values())
    with torch.no_grad():
        torch.testing.assert_close(kept(tokens(40)).logits, whole(tokens(40)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4", "mxfp4", "int2"])
def test_other_formats_are_dequantised_or_rounded(plain, tmp_path, name):
    folder = copied(plain, tmp_path / "m")
    write_folder(folder, FORMATS[name])
    assert groups_of(q.load(folder, weights="stored")) == {}
    found = q.load(folder, weights="int8")
    assert len(groups_of(found)) == len(found.rounding) >= 8
    assert all(0 < x.error < 0.02 for x in found.rounding.values())


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf_blocks_are_kept(tmp_path, family, kind):
    """Also where value heads are in another order in the file."""
    sparse = {"num_experts": 0 if family == "qwen3_5_text" else 4}
    model = small_model(model_type=family, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"),
                        hidden_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32,
                        intermediate_size=64, linear_value_head_dim=32, **sparse)  # fmt: skip
    quantised_file(tmp_path / "m.gguf", model, (kind,))
    kept, whole = q.load(tmp_path / "m.gguf", weights="stored"), q.load(tmp_path / "m.gguf", dtype="float32")
    found, exact = groups_of(kept), dict(whole.named_parameters())
    assert any(name.endswith("out_proj.weight") for name in found)
    for parameter, weight in found.items():
        assert torch.equal(weight.dequantise(), exact[parameter]), parameter


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_rounded_and_runs_compiled(tmp_path, weights, dtype):
    """Steps equal the modules' definition; T tokens at once equal T steps, and a row alone equals it in company."""
    q.Qwen3Next(q.presets.tiny(mtp_num_hidden_layers=1)).save_pretrained(tmp_path / "m")
    model = q.load(tmp_path / "m", dtype=dtype, weights=weights)
    for name in ("blocks.0.linear_attn.in_proj_qkv.weight", "blocks.3.self_attn.gate_proj.weight",
                 "blocks.1.mlp.experts.down_proj", "blocks.2.mlp.shared_expert.up_proj.weight"):  # fmt: skip
        assert held(model, name).bits == (8 if weights == "int8" else 4)
        assert 0 < model.rounding[name].error < (0.02 if weights == "int8" else 0.15)
    for name in ("router", "shared_expert_gate"):
        assert type(getattr(model.blocks[0].mlp, name)).__name__ == "Linear"
    assert q.explain(model)[0].runs == "cpp"
    ids = tokens(24, b=1)
    with torch.no_grad():
        whole, cache, other = model(ids).logits[0], model.new_cache(1), model.new_cache(1)
        steps = torch.cat([model.step(ids[:, i : i + 1], cache) for i in range(24)])
        at_once = model.step_many([ids[0]], [other], all_logits=True)
        assert torch.equal(steps, at_once)
        caches = [model.new_cache(1) for _ in range(3)]
        rows = model.step_many([ids[0, :5], ids[0, :24], ids[0, 3:7]], caches, all_logits=True)
        assert torch.equal(rows[5:29], steps)
        model.set_backend("linear", "torch")
        model.set_backend("decode", "torch")
        exact = model(ids).logits[0]
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for found in (whole, steps):
        assert (found - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_tied_head_is_rounded_beside_its_embedding(tmp_path, monkeypatch, weights):
    """In 8 bits, block by block, and counted; the embedding stays as stored."""
    small_model(tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    needs, whole = [], q.load(tmp_path / "m", dtype="float32")
    monkeypatch.setattr(load, "check_memory", lambda found, *_: needs.append(found["memory"]))
    monkeypatch.setattr(group_weights, "ROWS_AT_ONCE", 10)
    model = q.load(tmp_path / "m", dtype="float32", weights=weights)
    assert torch.equal(model.embed_tokens.weight, whole.embed_tokens.weight)
    head, once = held(model, "lm_head.weight"), quantise(whole.embed_tokens.weight, 8)
    assert torch.equal(head.codes, once.codes)
    assert torch.equal(head.scale, once.scale)
    error = (once.dequantise() - whole.embed_tokens.weight).norm() / whole.embed_tokens.weight.norm()
    assert model.rounding["lm_head.weight"].error == pytest.approx(error.item(), rel=1e-4)
    assert needs[0] == sum({id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())
    assert q.explain(model)[0].runs == "cpp"
    with torch.no_grad():
        logits = model.step(tokens(1, b=1), model.new_cache(1))
        model.lm_head = torch.nn.Linear(1, 1, bias=False)
        model.lm_head.weight = torch.nn.Parameter(once.dequantise())
        torch.testing.assert_close(model.step(tokens(1, b=1), model.new_cache(1)), logits, atol=1e-5, rtol=1e-5)
    stored = q.load(tmp_path / "m", dtype="float32", weights="stored")
    assert stored.lm_head.weight is stored.embed_tokens.weight


def test_a_change_of_a_buffer_acts_on_the_next_step(tmp_path):
    q.Qwen3Next(q.presets.tiny(mtp_num_hidden_layers=0)).save_pretrained(tmp_path / "m")
    model = q.load(tmp_path / "m", weights="int4", dtype="float32")
    token = torch.tensor([[5]])
    with torch.no_grad():
        first = model.step(token, model.new_cache(1))
        module = model.blocks[0].mlp.shared_expert.down_proj
        module.weight_scale = torch.zeros_like(module.weight_scale)
        second = model.step(token, model.new_cache(1))
        model.set_backend("decode", "torch")
        assert (second - model.step(token, model.new_cache(1))).norm() < 1e-4 * second.norm()
    assert (first - second).norm() > 1e-3 * first.norm()


def test_lora_trains_over_weights_in_groups(tmp_path):
    """Gradients pass through the weights to what stands before them."""
    q.Qwen3Next(q.presets.tiny(mtp_num_hidden_layers=0)).save_pretrained(tmp_path / "m")
    model = q.load(tmp_path / "m", weights="int4", dtype="float32")
    ids = tokens(12)
    model(ids).logits.square().mean().backward()
    assert model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.blocks[0].linear_attn.A_log.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["int4", "int8 channel asymmetric", "awq"])
def test_experts_on_disk_stay_in_groups(plain, tmp_path, name):
    """The cache holds codes; values equal those of the experts in memory."""
    folder = copied(plain, tmp_path / "m")
    write_folder(folder, FORMATS[name])
    whole = q.load(folder, weights="stored", dtype="float32")
    disk = q.load(folder, weights="stored", dtype="float32", experts="disk", expert_cache=60_000)
    read = q.load(folder, dtype="float32", experts="disk", expert_cache=60_000)
    kept, plain_module = disk.blocks[0].mlp.experts, read.blocks[0].mlp.experts
    assert whole.blocks[0].mlp.experts.gate_up.bits == (8 if "8" in name else 4)
    assert disk.expert_cache.slots > 2 * read.expert_cache.slots
    with torch.no_grad():
        whole.set_backend("experts", "loop")
        assert torch.equal(disk(tokens(40)).logits, whole(tokens(40)).logits)
        one = tokens(1, b=1)
        torch.testing.assert_close(disk(one).logits, read(one).logits, atol=1e-4, rtol=1e-4)
    held_by = whole.blocks[0].mlp.experts
    codes = [GroupLayout.of(w).empty(*w.shape[1:]) for w in (held_by.gate_up, held_by.down)]
    numbers = [torch.empty(w.shape[1:]) for w in (held_by.gate_up, held_by.down)]
    assert kept.read(1, *codes) == plain_module.read(1, *numbers)  # bytes of the files
    for code, number in zip(codes, numbers, strict=True):
        assert torch.equal(code.dequantise(), number)


def test_bad_choices_are_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="weights 'int3' is unknown: choose one of dequantised, stored, int8, int4"):
        q.load(plain, weights="int3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = q.load(plain, weights="int8")
    with pytest.raises(ValueError, match="does not hold the released weights"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
