"""Fingerprints of models: every byte of the weights counts, and is hashed once."""

import copy
import pickle

import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file, save_file

import qwen3next as q
from qwen3next.cache.files import identity
from qwen3next.files import fingerprint
from qwen3next.interp.points import identity as any_dtype_identity


@pytest.fixture
def summed(monkeypatch):
    """Records the names of hashed tensors."""
    names, before = [], fingerprint._sums

    def noted(tensors, *, rounded):
        names.extend(tensors)
        return before(tensors, rounded=rounded)

    monkeypatch.setattr(fingerprint, "_sums", noted)
    return names


def test_any_number_of_any_tensor_counts(summed):
    model = small_model(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
    first, generator = identity(model), torch.Generator().manual_seed(0)
    assert identity(model) == first
    summed.clear()
    for name, x in model.named_parameters():
        if name.startswith("mtp."):
            continue
        at = int(torch.randint(0, x.numel(), (1,), generator=generator))
        with torch.no_grad():
            old = x.view(-1)[at].clone()
            x.view(-1)[at] = torch.nextafter(old, old + 1)
        assert identity(model) != first, name
        with torch.no_grad():
            x.view(-1)[at] = old
        assert identity(model) == first
    assert len(summed) == 2 * sum(not name.startswith("mtp.") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.mul_(1.5),
        lambda p: setattr(p, "data", p.data * 1.5),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: torch.nn.init.normal_(p),
    ],
)
def test_changes_behind_the_version_counter(change):
    model = small_model()
    first = identity(model)
    change(model.blocks[1].linear_attn.out_proj.weight)
    assert identity(model) != first


def test_training_copies_and_dtypes():
    model = small_model()
    first = identity(model)
    assert identity(copy.deepcopy(model)) == first
    assert identity(pickle.loads(pickle.dumps(model))) == first
    assert identity(copy.deepcopy(model).bfloat16()) != first
    half = copy.deepcopy(model).bfloat16()
    assert any_dtype_identity(half) == any_dtype_identity(model)
    model.loss(torch.arange(9)[None]).total.backward()
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    assert identity(model) != first
    with torch.inference_mode():
        frozen = small_model()
        first = identity(frozen)
        frozen.norm.weight[3] += 1
        assert identity(frozen) != first


def test_int8_experts_count(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = q.load(tmp_path, experts="int8")
    first = identity(model)
    model.blocks[0].mlp.experts.down_proj[1, 2, 3] += 1
    assert identity(model) != first


def test_experts_in_files_count(tmp_path):
    small_model().save_pretrained(tmp_path)
    first = identity(q.load(tmp_path, experts="disk"))
    assert identity(q.load(tmp_path, experts="disk")) == first
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][0, 0] += 1
    save_file(tensors, path)
    assert identity(q.load(tmp_path, experts="disk")) != first


def test_sums_are_kept_with_the_folder(tmp_path, monkeypatch, summed):
    monkeypatch.setattr(fingerprint, "KEPT_FROM", 1)
    small_model().save_pretrained(tmp_path)
    first = identity(q.load(tmp_path))
    assert summed
    summed.clear()
    model = q.load(tmp_path)
    assert identity(model) == first
    assert not summed
    with torch.no_grad():
        model.norm.weight[3] += 1
    assert identity(model) != first  # changed weights are hashed again
    assert summed == ["norm.weight"]
    assert identity(q.load(tmp_path)) == first
    cast = q.load(tmp_path, dtype="bfloat16")
    assert identity(cast) != first  # hashes of another dtype are not reused
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path)
    summed.clear()
    assert identity(q.load(tmp_path)) == identity(model)
    assert len(summed) > 1
    (tmp_path / fingerprint.SUMS).write_text("{")  # damaged, so hashed again
    assert identity(q.load(tmp_path)) == identity(model)
    small_model(seed=1).save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / fingerprint.SUMS).exists()


def test_a_small_model_leaves_no_file(tmp_path):
    small_model().save_pretrained(tmp_path)
    identity(q.load(tmp_path))
    assert not (tmp_path / fingerprint.SUMS).exists()


def test_pieces_make_one_sum_whatever_their_number(monkeypatch):
    model = small_model()
    monkeypatch.setattr(fingerprint, "PIECE", 1000)
    first = identity(model)
    with torch.no_grad():
        model.embed_tokens.weight[96, 63] += 1
    assert identity(model) != first
