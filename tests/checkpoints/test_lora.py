"""LoRA adapters in PEFT's form, against transformers' model with B A added to its released tensors by hand.

tests/tools/test_peft.py does the same with PEFT itself.
"""

import json

import pytest
import torch
from conftest import small_config, small_model
from parity import tokens
from safetensors.torch import load_file, save_file

import qwen3next as q
from qwen3next.checkpoints.save_groups import groups_of

ATTENTION = "model.layers.3.self_attn"
GDN = "model.layers.1.linear_attn"
MLP = "model.layers.2.mlp"
# Released modules: (rows, columns).
SHAPES = {
    f"{ATTENTION}.q_proj": (256, 64),
    f"{ATTENTION}.k_proj": (64, 64),
    f"{ATTENTION}.o_proj": (64, 128),
    f"{GDN}.in_proj_qkvz": (256, 64),
    f"{GDN}.in_proj_ba": (8, 64),
    f"{GDN}.out_proj": (64, 96),
    f"{MLP}.gate": (8, 64),
    f"{MLP}.shared_expert.up_proj": (24, 64),
    f"{MLP}.experts.5.down_proj": (64, 32),
    "lm_head": (97, 64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("m") / "model"
    small_model(mtp_num_hidden_layers=0).save_pretrained(place)
    return place


def adapter(place, shapes=SHAPES, rank=3, seed=0, **settings):
    """A PEFT folder with random A and B for these modules; returns them by module."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: (torch.randn(rank, k, generator=generator) * 0.2, torch.randn(n, rank, generator=generator) * 0.2)
        for path, (n, k) in shapes.items()
    }
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    place.mkdir(exist_ok=True)
    save_file(tensors, place / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **settings}
    (place / "adapter_config.json").write_text(json.dumps(values))
    return pairs


def released(folder, place, deltas):
    """A copy of the checkpoint with these deltas added to its tensors, as a model."""
    tensors = load_file(folder / "model.safetensors")
    for path, delta in deltas.items():
        tensors[f"{path}.weight"] += delta
    place.mkdir()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text((folder / "config.json").read_text())
    return q.load(place)


def logits(model, t=21):
    with torch.no_grad():
        return model(tokens(t)).logits


def test_every_module_live_and_merged(folder, tmp_path):
    pairs = adapter(tmp_path / "a")
    expected = released(folder, tmp_path / "b", {path: 2 * b @ a for path, (a, b) in pairs.items()})
    model = q.load(folder, adapters=[tmp_path / "a"])
    assert (logits(model) - logits(q.load(folder))).abs().max() > 0.1
    assert (logits(model) - logits(expected)).abs().max() <= 2e-5
    model.adapters.merge()
    assert (logits(model) - logits(expected)).abs().max() <= 2e-5
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (mine - other).abs().max() <= 1e-6


def test_what_is_taken_out_leaves_the_same_bits(folder, tmp_path):
    adapter(tmp_path / "a")
    plain, model = q.load(folder), q.load(folder, adapters=[tmp_path / "a"])
    for take_out in (model.adapters.unmerge, model.adapters.use):
        model.adapters.use("a")
        model.adapters.merge()
        assert not torch.equal(model.lm_head.weight, plain.lm_head.weight)
        take_out()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert torch.equal(logits(model), logits(plain))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_several_at_once_with_weights_and_by_name(folder, tmp_path):
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1, rank=2, use_rslora=True)
    scales = 2.0, 6 / 2**0.5
    deltas = {
        path: 0.5 * scales[0] * first[path][1] @ first[path][0] - 0.25 * scales[1] * second[path][1] @ second[path][0]
        for path in SHAPES
    }
    model = q.load(folder)
    assert [model.adapters.load(tmp_path / name) for name in "ab"] == ["a", "b"]
    model.adapters.use({"a": 0.5, "b": -0.25})
    assert (logits(model) - logits(released(folder, tmp_path / "c", deltas))).abs().max() <= 5e-5
    model.adapters.merge()
    model.adapters.use("b")  # stays merged
    assert model.adapters.merged
    alone = q.load(folder, adapters=[tmp_path / "b"])
    assert (logits(model) - logits(alone)).abs().max() <= 1e-4
    model.adapters.remove("b")
    assert torch.equal(logits(model), logits(q.load(folder)))


def test_steps_and_caches_follow(folder, tmp_path):
    adapter(tmp_path / "a")
    model, ids = q.load(folder, adapters=[tmp_path / "a"]), tokens(9, 1)
    cache = model.new_cache(max_len=20)
    list(model.prefill(ids, cache))
    assert (model.step(ids[:, :1], cache) - logits_of(model, torch.cat((ids, ids[:, :1]), 1))).abs().max() <= 1e-5
    cache.save(tmp_path / "cache.safetensors")
    model.adapters.use()
    with pytest.raises(ValueError, match="model"):
        type(cache).load(tmp_path / "cache.safetensors", model)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, -1]


def test_patterns_of_ranks_and_alphas(folder, tmp_path):
    shapes = {key: SHAPES[key] for key in (f"{ATTENTION}.q_proj", f"{GDN}.out_proj")}
    pairs = adapter(tmp_path / "a", shapes, alpha_pattern={"self_attn.q_proj": 30}, use_rslora=True)
    scales = (30 / 3**0.5, 6 / 3**0.5)
    deltas = {path: scale * b @ a for scale, (path, (a, b)) in zip(scales, pairs.items(), strict=True)}
    expected = released(folder, tmp_path / "b", deltas)
    assert (logits(q.load(folder, adapters=[tmp_path / "a"])) - logits(expected)).abs().max() <= 2e-5


@pytest.mark.parametrize("swapped", [False, True])
def test_all_experts_at_once_in_both_orders_of_axes(folder, tmp_path, swapped):
    """PEFT's target_parameters: A (e r, in), B (out, r e); before 0.19 with in and out exchanged."""
    experts, rank = 8, 2
    generator, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    for leaf, (n, k), inner in (("gate_up_proj", (64, 64), ".base_layer"), ("down_proj", (64, 32), "")):
        rows, columns = (k, n) if swapped else (n, k)
        a, b = (torch.randn(x, generator=generator) * 0.2 for x in ((experts * rank, columns), (rows, rank * experts)))
        key = f"base_model.model.{MLP}.experts{inner}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        for e in range(experts):
            delta = b.view(rows, rank, experts)[:, :, e] @ a.view(experts, rank, columns)[e]
            deltas[leaf, e] = 3.0 * (delta.mT if swapped else delta)
    place = tmp_path / "a"
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors")
    values = {"r": rank, "lora_alpha": 6, "peft_version": "0.18.1" if swapped else "0.21.2"}
    (place / "adapter_config.json").write_text(json.dumps(values))
    single = {}
    for (leaf, e), delta in deltas.items():
        names = {"down_proj": delta}
        if leaf == "gate_up_proj":
            names = dict(zip(("gate_proj", "up_proj"), delta.chunk(2), strict=True))
        single |= {f"{MLP}.experts.{e}.{name}": x for name, x in names.items()}
    expected, model = released(folder, tmp_path / "b", single), q.load(folder, adapters=[place])
    assert (logits(model) - logits(expected)).abs().max() <= 2e-5
    model.adapters.merge()
    assert (logits(model) - logits(expected)).abs().max() <= 2e-5
    del values["peft_version"]  # gate_up_proj is square here
    (place / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="add peft_version"):
        q.load(folder, adapters=[place])


def test_written_back_as_read_and_with_two_ranks_where_parts_differ(folder, tmp_path):
    shapes = {path: shape for path, shape in SHAPES.items() if ".experts." not in path}
    pairs = adapter(tmp_path / "a", shapes)
    model = q.load(folder, adapters=[tmp_path / "a"])
    model.adapters.save("a", tmp_path / "b")
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert len(found) == 2 * len(pairs)
    for path, (a, b) in pairs.items():
        assert torch.equal(found[f"base_model.model.{path}.lora_A.weight"], a)
        assert torch.equal(found[f"base_model.model.{path}.lora_B.weight"], b)
    again = q.load(folder, adapters=[tmp_path / "b"])
    assert torch.equal(logits(again), logits(model))
    # Trained on the classes of qwen3next.hf, whose queries and gates are two maps.
    adapter(tmp_path / "c", {f"{ATTENTION}.q_proj": (128, 64), f"{ATTENTION}.gate_proj": (128, 64)})
    apart = q.load(folder, adapters=[tmp_path / "c"])
    apart.adapters.save("c", tmp_path / "d")
    assert load_file(tmp_path / "d" / "adapter_model.safetensors")[
        f"base_model.model.{ATTENTION}.q_proj.lora_A.weight"
    ].shape == (6, 64)
    assert (logits(q.load(folder, adapters=[tmp_path / "d"])) - logits(apart)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("shapes", "settings", "sentence"),
    [
        ({"model.layers.0.self_attn.q_proj": (256, 64)}, {}, "no linear map of this model"),
        ({f"{ATTENTION}.q_proj": (250, 64)}, {}, "no linear map of this model with 250 rows"),
        ({f"{ATTENTION}.k_proj": (64, 60)}, {}, "do not fit"),
        ({f"{ATTENTION}.k_proj": (64, 64)}, {"use_dora": True}, "use_dora True, which is not supported"),
        ({f"{ATTENTION}.k_proj": (64, 64)}, {"peft_type": "IA3"}, "only LORA"),
        ({"model.embed_tokens": (97, 64)}, {}, "embed_tokens"),
    ],
)
def test_what_has_no_home_is_refused(folder, tmp_path, shapes, settings, sentence):
    adapter(tmp_path / "a", shapes, **settings)
    if "embed" in sentence:  # a lookup, which PEFT writes as lora_embedding_A
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        renamed = {key.replace(".lora_", ".lora_embedding_").replace(".weight", ""): x for key, x in tensors.items()}
        save_file(renamed, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        q.load(folder, adapters=[tmp_path / "a"])


def test_names_are_checked(folder, tmp_path):
    adapter(tmp_path / "a")
    model = q.load(folder, adapters=[tmp_path / "a"])
    with pytest.raises(ValueError, match="already"):
        model.adapters.load(tmp_path / "a")
    for call in (model.adapters.use, model.adapters.remove):
        with pytest.raises(ValueError, match="There is no adapter 'b': a"):
            call("b")
    with pytest.raises(ValueError, match="is not a PEFT adapter"):
        model.adapters.load(tmp_path)
    assert small_config().num_experts == 8


def test_an_adapter_acts_beside_weights_in_groups(folder, tmp_path):
    """Live it adds the same as beside the dequantised weights; merged, or for experts, it is refused in a sentence."""
    shapes = {path: size for path, size in SHAPES.items() if ".experts." not in path}
    pairs = adapter(tmp_path / "linear", shapes)
    assert pairs
    small, whole = q.load(folder, weights="int8"), q.load(folder)
    with torch.no_grad():
        for name, weight in groups_of(small):
            whole.get_parameter(name).copy_(weight.dequantise())
        ids = tokens(12)
        plain = small(ids).logits
        for model in (small, whole):
            model.adapters.use(model.adapters.load(tmp_path / "linear"))
        torch.testing.assert_close(small(ids).logits, whole(ids).logits, atol=1e-3, rtol=1e-3)
        with pytest.raises(ValueError, match="cannot take an adapter in: leave it live"):
            small.adapters.merge()
        torch.testing.assert_close(small(ids).logits, whole(ids).logits, atol=1e-3, rtol=1e-3)
        small.adapters.use()
        assert torch.equal(small(ids).logits, plain)
    adapter(tmp_path / "experts")
    with pytest.raises(ValueError, match="whose experts are in groups"):
        small.adapters.load(tmp_path / "experts")
