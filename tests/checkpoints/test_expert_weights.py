"""Experts read from the files or held in int8: the model's values, the reads, the refused options."""

import copy

import pytest
import torch
from conftest import small_model
from parity import tokens
from test_convert import quantise

import qwen3next as q
from qwen3next.checkpoints.convert import convert
from qwen3next.files.sizes import parse_bytes

ONE = 3 * 64 * 32 * 4  # bytes of an expert of the small model in fp32


@pytest.fixture(params=["qwen3_next", "qwen3_5_moe_text"])
def folder(request, tmp_path):
    q.save(small_model(model_type=request.param, mlp_only_layers=(1,)), tmp_path / "m", max_shard_bytes=100_000)
    return tmp_path / "m"


def test_mmap_equals_memory(folder):
    whole, lazy = q.load(folder), q.load(folder, experts="disk", expert_cache=5 * ONE)
    assert not any(".mlp.experts." in name for name, _ in lazy.named_parameters())
    for model in (whole, lazy):
        model.eval()
    ids = tokens(70)
    with torch.no_grad():
        assert (lazy(ids).logits - whole(ids).logits).abs().max() <= 1e-6
    for seed in (None, 3):
        options = {"max_new_tokens": 20, "stop_tokens": (), "temperature": 0.0 if seed is None else 1.0, "seed": seed}
        assert torch.equal(q.generate(lazy, ids[:1], **options), q.generate(whole, ids[:1], **options))
    assert lazy.expert_cache.nbytes <= 5 * ONE


def test_mmap_losses_and_gradients(folder):
    """Also MTP's experts, and the gradients of all weights in memory."""
    whole, lazy = q.load(folder), q.load(folder, experts="disk", expert_cache=ONE)
    ids = tokens(40)
    for model in (whole, lazy):
        model.loss(ids).total.backward()
    expected = dict(whole.named_parameters())
    for name, p in lazy.named_parameters():
        assert (p.grad - expected[name].grad).abs().max() <= 1e-5 * max(1, float(p.grad.abs().max())), name


def test_only_what_is_routed_to_is_read(folder):
    model = q.load(folder, experts="disk", expert_cache=1000 * ONE)
    assert model.expert_cache.report.bytes_read == 0
    chosen = set()
    note = lambda x, hook: chosen.update((hook.name, int(e)) for e in x.flatten())  # noqa: E731
    with torch.no_grad(), model.hooks([("blocks.*.mlp.hook_router_indices", note)]):
        model(tokens(3, b=1))
        report = model.expert_cache.report
        assert report.misses == len(chosen) < 3 * 8
        assert report.bytes_read == len(chosen) * ONE
        model(tokens(3, b=1))
    assert report.bytes_read == len(chosen) * ONE
    assert report.hit_rate == 0.5
    assert report.tokens == 6


@pytest.mark.parametrize("experts", ["single", "fused"])
def test_fp8_and_a_cast_are_read_as_loaded(tmp_path, experts):
    small_model(model_type="qwen3_5_moe_text").save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m", experts=experts)
    quantise(tmp_path / "m")
    for dtype in ("auto", "float32"):
        whole = q.load(tmp_path / "m", dtype=dtype)
        lazy = q.load(tmp_path / "m", dtype=dtype, experts="disk")
        for module, other in zip(whole.blocks, lazy.blocks, strict=True):
            gate_up = torch.empty_like(module.mlp.experts.gate_up_proj[3])
            down = torch.empty_like(module.mlp.experts.down_proj[3])
            count = other.mlp.experts.read(3, gate_up, down)
            assert torch.equal(gate_up, module.mlp.experts.gate_up_proj[3])
            assert torch.equal(down, module.mlp.experts.down_proj[3])
            assert 3 * 64 * 32 < count < 3 * 64 * 32 * 1.1  # one byte per weight, and scales
        with torch.no_grad():
            assert whole(tokens(9)).logits.dtype == lazy(tokens(9)).logits.dtype


def test_int8_is_close_and_says_how_close(folder):
    whole, small = q.load(folder), q.load(folder, experts="int8")
    first = small.blocks[0].mlp.experts
    assert first.gate_up_proj.dtype == torch.int8
    assert set(first.error) == {"gate_proj", "up_proj", "down_proj"}
    assert all(0.001 < error < 0.01 for error in first.error.values())
    original = whole.blocks[0].mlp.experts.down_proj
    original = original.detach()
    held = first.down_proj * first.down_scale[..., None]
    assert first.error["down_proj"] == pytest.approx(float((held - original).norm() / original.norm()), rel=1e-4)
    with torch.no_grad():
        gap = (small(tokens(50)).logits - whole(tokens(50)).logits).norm() / whole(tokens(50)).logits.norm()
    assert 1e-4 < gap < 0.05


def test_the_files_may_be_replaced_meanwhile(folder):
    """A model that reads from files keeps using the files that it opened."""
    lazy, ids = q.load(folder, experts="disk", expert_cache=ONE), tokens(20)
    with torch.no_grad():
        before = lazy(ids).logits
        q.save(small_model(seed=1), folder)
        assert torch.equal(lazy(ids).logits, before)


def test_copies_and_refusals(folder, tmp_path):
    for experts in ("disk", "int8"):
        model = q.load(folder, experts=experts)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(model)(tokens(9)).logits, model(tokens(9)).logits)
        with pytest.raises(ValueError, match="does not hold the released weights"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="experts 'tape' is unknown: choose one of memory, disk, int8"):
        q.load(folder, experts="tape")
    with pytest.raises(ValueError, match="hold no expert"):
        q.load(folder, experts="disk", expert_cache=100)
    with pytest.raises(ValueError, match="'much' is not a size"):
        q.load(folder, experts="disk", expert_cache="much")


def test_a_dense_model_has_no_experts_to_read(tmp_path):
    small_model(num_experts=0, model_type="qwen3_5_text").save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(q.load(tmp_path, experts="disk")(tokens(9)).logits, q.load(tmp_path)(tokens(9)).logits)


@pytest.mark.parametrize(
    ("text", "expected"), [("2GiB", 2**31), ("1.5 KB", 1500), ("7", 7), (9, 9), ("3mib", 3 * 2**20), ("1T", 10**12)]
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


def test_a_file_that_shrinks_is_a_sentence(folder):
    lazy = q.load(folder, experts="disk", expert_cache=ONE)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as f:
            f.truncate(100)
    with pytest.raises(ValueError, match="became shorter"), torch.no_grad():
        lazy(tokens(9))
