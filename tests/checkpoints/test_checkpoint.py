"""Checkpoint folders: byte-equal round trips, and an error that names the defect for every kind of damage."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import small_config, small_model
from parity import stored, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwen3next as q
from qwen3next.checkpoints.state_dict_adapter import tensor_specs, to_released


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_byte_equal_with_mtp_sharded_or_not(tmp_path, dtype, tied):
    model = small_model(dtype=dtype, tie_word_embeddings=tied, mlp_only_layers=(1,))
    q.save(model, tmp_path / "a", max_shard_bytes=50_000)
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 3
    again = q.load(tmp_path / "a")
    assert again.config == model.config.replace(extra=again.config.extra)
    q.save(again, tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").exists()
    assert any(name.startswith("mtp.") for name in stored(tmp_path / "b"))
    assert ("lm_head.weight" in stored(tmp_path / "b")) == (not tied)
    assert_same_bytes(stored(tmp_path / "a"), stored(tmp_path / "b"))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_layout_is_the_released_one():
    """Rows by hand, in the layout of the released tensors: per key head q | k | v v | z z; per head query | gate."""
    model = small_model()
    released = dict(to_released(model.config, dict(model.named_parameters())))
    mixer = model.blocks[0].linear_attn
    qkvz, ba = (released[f"model.layers.0.linear_attn.in_proj_{n}.weight"] for n in ("qkvz", "ba"))
    qkv, z = mixer.in_proj_qkv.weight, mixer.in_proj_z.weight
    block = 16 + 16 + 2 * 24 + 2 * 24
    for head in range(2):
        rows = qkvz[head * block : (head + 1) * block]
        assert torch.equal(rows[:16], qkv[head * 16 :][:16])
        assert torch.equal(rows[16:32], qkv[32 + head * 16 :][:16])
        assert torch.equal(rows[32:80], qkv[64 + head * 48 :][:48])
        assert torch.equal(rows[80:], z[head * 48 :][:48])
        assert torch.equal(ba[head * 4 : head * 4 + 2], mixer.in_proj_b.weight[head * 2 :][:2])
        assert torch.equal(ba[head * 4 + 2 : head * 4 + 4], mixer.in_proj_a.weight[head * 2 :][:2])
    attention = model.blocks[3].self_attn
    both = released["model.layers.3.self_attn.q_proj.weight"]
    for head in range(4):
        assert torch.equal(both[head * 64 :][:32], attention.q_proj.weight[head * 32 :][:32])
        assert torch.equal(both[head * 64 + 32 :][:32], attention.gate_proj.weight[head * 32 :][:32])
    assert released["model.layers.0.linear_attn.conv1d.weight"].shape == (160, 1, 4)
    assert torch.equal(
        released["model.layers.2.mlp.experts.5.up_proj.weight"],
        model.blocks[2].mlp.experts.gate_up_proj[5, 32:],
    )


def test_names_and_shapes_of_the_80b_match_the_facts():
    shapes = {e.name: e.shape for e in tensor_specs(q.presets.qwen3_next_80b_a3b())}
    layer = "model.layers.0.linear_attn."
    assert shapes[layer + "in_proj_qkvz.weight"] == (12288, 2048)
    assert shapes[layer + "in_proj_ba.weight"] == (64, 2048)
    assert shapes[layer + "conv1d.weight"] == (8192, 1, 4)
    assert shapes["model.layers.47.self_attn.q_proj.weight"] == (8192, 2048)
    assert shapes["mtp.layers.0.mlp.experts.511.down_proj.weight"] == (2048, 512)
    assert shapes["mtp.fc.weight"] == (2048, 4096)
    assert len(shapes) == 3 + 36 * 7 + 12 * 6 + 48 * (2 + 1 + 3 * 512 + 4) + (4 + 6 + 2 + 1 + 3 * 512 + 4)


def test_dtype_policy(folder):
    """A cast does not change the stored precision of A_log, dt_bias and norms."""
    exact = dict(q.load(folder).named_parameters())
    for name, p in q.load(folder, dtype="bfloat16").named_parameters():
        kept = any(part in name for part in ("A_log", "dt_bias", "norm"))
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(p, exact[name].to(p.dtype)), name


def test_cast_models_run(folder):
    model = q.load(folder, dtype="bfloat16")
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_saving_keeps_the_tokenizer_and_replaces_old_shards(folder):
    (folder / "tokenizer.json").write_text("{}")
    q.save(q.load(folder), folder, max_shard_bytes=50_000)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / "model.safetensors").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    q.load(folder)


def test_a_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = stored(folder)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3next.checkpoints.save.write", full)
    with pytest.raises(OSError, match="No space"):
        q.save(small_model(seed=1), folder)
    assert_same_bytes(stored(folder), before)
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.0.linear_attn.out_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (lambda t: t.pop("mtp.fc.weight"), "lacks mtp.fc.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "holds model.extra"),
        (lambda t: t.update({NAME: torch.zeros(64, 95)}), r"out_proj.weight has shape \[64, 95\]"),
        (lambda t: t.update({NAME: torch.zeros(64, 96, dtype=torch.int8)}), "stored as I8"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(32, 64).half()}),
            "F16, but other tensors of the same parameter are F32",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, sentence):
    edit(folder, change)
    with pytest.raises(ValueError, match=sentence):
        q.load(folder)


def test_a_folder_without_mtp_says_so(folder):
    edit(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.")])
    with pytest.warns(UserWarning, match="no MTP"):
        assert q.load(folder).mtp is None


def test_truncated_and_alien_files(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (
        content[:-1],
        content[:100],
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 1 << 60) + content[8:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            q.load(folder)


def test_index_must_stay_inside_the_folder(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        where = dict.fromkeys(file.keys(), "model.safetensors")
    index = folder / "model.safetensors.index.json"
    for bad, sentence in (
        (where | {NAME: "../elsewhere.safetensors"}, "not a safetensors file of this folder"),
        (where | {NAME: "/etc/passwd"}, "not a safetensors file of this folder"),
        (where | {NAME: "pytorch_model.bin"}, "not a safetensors file of this folder"),
        (where | {NAME: "model-00002.safetensors"}, "is missing, which should hold"),
        (where | {"model.unknown": "model.safetensors"}, "lacks|holds"),
        ({n: f for n, f in where.items() if n != NAME}, "lacks|holds|index"),
    ):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ValueError, match=sentence):
            q.load(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a safetensors index"):
        q.load(folder)


def test_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        q.load(tmp_path / "nothing" / "here")
    with pytest.raises(ValueError, match="does not exist"):
        q.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict()))
    with pytest.raises(ValueError, match=r"neither model\.safetensors"):
        q.load(tmp_path)


def test_a_folder_of_several_models_is_named(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "several" / "1B_baseline")
    with pytest.raises(ValueError, match=r"several holds no config\.json, its subfolders do: .*\(1B_baseline\)"):
        q.load(tmp_path / "several")


def test_hub_ids_may_name_a_folder(tmp_path, folder, monkeypatch):
    """The study's models are folders of one repository."""
    model, asked = q.load(folder), []

    def hub(repository, *, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository != "owner/name":
            raise OSError("no such repository")
        return str(tmp_path / "snapshot")

    shutil.copytree(folder, tmp_path / "snapshot" / "1B_baseline")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    loaded = q.load("owner/name/1B_baseline")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert asked.pop()[0] == "owner/name"
    q.load(Path("owner/name/1B_baseline"))
    assert "1B_baseline/*.safetensors" in asked.pop()[1]
    with pytest.raises(ValueError, match="its subfolders do"):
        q.load("owner/name")
    assert "*.safetensors" in asked.pop()[1]
    with pytest.raises(ValueError, match="owner/name on the hub has no folder 1B_other"):
        q.load("owner/name/1B_other")
    with pytest.raises(
        ValueError, match=r"is not a folder and could not be downloaded from the hub \(no such repository\)"
    ):
        q.load("owner/another/1B_other")
    asked.clear()
    for mistyped in ("snapshot/1B_baseline/wrong", "./owner/name", "one", "owner//name"):
        with pytest.raises(ValueError, match="is not a folder"):
            q.load(mistyped)
    assert not asked  # the hub is not asked for a local path


def untie(how):
    """A tied model whose head is now a separate tensor, as after some training tools."""
    model = small_model(tie_word_embeddings=True)
    if how == "to_empty":
        with torch.device("meta"):
            model = q.Qwen3Next(model.config)
        model.to_empty(device="cpu")
        model.reset_parameters()
    elif how == "assign":
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    else:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.embed_tokens.weight))
    return model


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("how", ["to_empty", "assign", "a head of its own"])
def test_a_head_that_was_untied_is_saved(tmp_path, how, trained):
    model = untie(how)
    if trained:
        sgd = torch.optim.SGD(model.parameters(), 0.5)
        model.loss(tokens(20)).total.backward()
        sgd.step()
    assert model.lm_head.weight is not model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = q.load(tmp_path)
    equal = torch.equal(model.lm_head.weight, model.embed_tokens.weight)
    assert again.config.tie_word_embeddings == equal
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with torch.no_grad():
        assert torch.equal(again(tokens(20)).logits, model(tokens(20)).logits)


def test_a_head_that_was_tied_is_saved(tmp_path):
    model = small_model()
    model.lm_head.weight = model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(q.load(tmp_path).lm_head.weight, model.embed_tokens.weight)


class LowRank(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, torch.nn.Parameter(torch.ones(2, base.in_features))

    def forward(self, x):
        return self.base(x) + (x @ self.a.T).sum(-1, keepdim=True)


def biased(model):
    model.lm_head = torch.nn.Linear(64, 97)


def adapted(model):
    model.blocks[0].mlp.shared_expert.up_proj = LowRank(model.blocks[0].mlp.shared_expert.up_proj)


def normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def added(model):
    model.extra = torch.nn.Linear(2, 2)


def buffered(model):
    model.register_buffer("scale", torch.ones(1))


def resized(model):
    model.embed_tokens = torch.nn.Embedding(99, 64)


def half_cast(model):
    model.blocks[0].linear_attn.in_proj_z.bfloat16()


def emptied(model):
    model.blocks[1].to("meta")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (biased, "no place for lm_head.bias"),
        (adapted, "no place for .*up_proj.a, .*up_proj.base.weight"),
        (normed, "no place for lm_head.parametrizations"),
        (added, "no place for extra.bias"),
        (buffered, "no place for scale"),
        (resized, r"embed_tokens.weight gives a tensor of shape \[99, 64\]"),
        (half_cast, "form one tensor on disk: give them the same dtype"),
        (emptied, "is on the meta device"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path, change, sentence):
    model = small_model()
    model.save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    change(model)
    with pytest.raises(ValueError, match=sentence):
        model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
