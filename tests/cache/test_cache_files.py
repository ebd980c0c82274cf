"""Cache files: their contents, and the files that are refused."""

import pytest
import torch
from caches import run
from conftest import small_model
from parity import tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwen3next as q


@pytest.fixture(scope="module")
def model():
    return small_model(dtype=torch.float64)


@pytest.fixture
def filled(model):
    cache = model.new_cache(max_len=100)
    run(model, cache, tokens(30, b=1))
    cache.snapshot("doc")
    run(model, cache, tokens(9, b=1))
    cache.snapshot("asked")
    cache.restore("doc")
    run(model, cache, tokens(5, b=1))
    return cache


def test_a_file_holds_cache_and_snapshots(model, filled, tmp_path):
    path = tmp_path / "doc.safetensors"
    filled.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["doc.safetensors"]
    again = q.HybridCache.load(path, model, history=2)
    assert again.lengths == (35,)
    assert torch.equal(again.last_logits, filled.last_logits)
    more = tokens(6, b=1)
    assert torch.equal(run(model, again, more), run(model, filled, more))
    for name in ("doc", "asked"):
        for cache in (again, filled):
            cache.restore(name)
        assert torch.equal(again.last_logits, filled.last_logits)
        assert torch.equal(run(model, again, more), run(model, filled, more))
    shared = sum(t.numel() * 8 for t in load_file(path).values())
    assert shared < 1.2 * 3 * filled.nbytes()  # three snapshots; the document is stored once or twice
    again.save(tmp_path / "twice.safetensors")
    assert q.HybridCache.load(tmp_path / "twice.safetensors", model).snapshots.keys() == {"doc", "asked"}
    empty = model.new_cache(batch=2)
    empty.save(path)
    assert q.HybridCache.load(path, model).lengths == (0, 0)


def test_a_model_without_softmax_layers_has_files_too(tmp_path):
    model = small_model(num_hidden_layers=2, layer_types=("linear_attention",) * 2)
    cache = model.new_cache()
    run(model, cache, tokens(9, b=1))
    cache.save(tmp_path / "c.safetensors")
    again = q.HybridCache.load(tmp_path / "c.safetensors", model)
    assert torch.equal(run(model, again, tokens(3, b=1)), run(model, cache, tokens(3, b=1)))


def test_files_of_others_and_damaged_ones_are_refused(model, filled, tmp_path):
    path = tmp_path / "doc.safetensors"
    filled.save(path)
    whole = path.read_bytes()
    for other in (
        small_model(seed=1, dtype=torch.float64),
        small_model(),
        small_model(rope_theta=5.0, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="another model"):
            q.HybridCache.load(path, other)
    stretched = small_model(dtype=torch.float64)
    stretched.extend_context(4.0)
    with pytest.raises(ValueError, match="RoPE scaling"):
        q.HybridCache.load(path, stretched)
    with pytest.raises(ValueError, match="max_len is 20"):
        q.HybridCache.load(path, model, max_len=20)
    for damaged in (whole[:-1], whole[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            q.HybridCache.load(path, model)
    tensors = load_file_bytes(whole, tmp_path)
    tensors["tokens"][0, 3] += 1
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    with pytest.raises(ValueError, match="was changed"):
        q.HybridCache.load(path, model)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not a cache"):
        q.HybridCache.load(path, model)


def load_file_bytes(content, folder):
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def test_a_killed_save_leaves_the_old_file(model, filled, tmp_path, monkeypatch):
    path = tmp_path / "doc.safetensors"
    filled.save(path)
    before = path.read_bytes()

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3next.files.checksummed.write", full)
    with pytest.raises(OSError, match="No space"):
        filled.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["doc.safetensors"]
