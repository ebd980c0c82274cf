"""A model that does not fit is refused before anything is allocated, in a sentence that says what does."""

import pytest
import torch
from conftest import small_model

import qwen3next as q
from qwen3next.checkpoints import load, memory_needs
from qwen3next.checkpoints.memory_needs import bytes_needed, free_bytes


@pytest.fixture
def folder(tmp_path):
    small_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def nbytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}.values())


@pytest.mark.parametrize("experts", ["memory", "int8", "disk"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_needs_are_those_of_the_loaded_model(folder, monkeypatch, experts, dtype):
    asked = []
    monkeypatch.setattr(load, "check_memory", lambda needs, *_: asked.append(needs))
    model = q.load(folder, dtype=dtype, experts=experts, device="cpu")
    assert asked[0][experts] == nbytes(model)


@pytest.mark.parametrize("experts", ["memory", "int8", "disk"])
def test_refused_where_it_does_not_fit(folder, monkeypatch, experts):
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(load, "check_memory", lambda needs, *_: found.append(needs))
        q.load(folder)
    needs = found[0]
    assert needs["memory"] > needs["int8"] > needs["disk"]
    for free in needs.values():
        monkeypatch.setattr(memory_needs, "free_bytes", lambda _device, free=free: free)
        if free >= needs[experts]:
            q.load(folder, experts=experts, device="cpu")
            continue
        with pytest.raises(ValueError, match=r"model needs .* for its weights and cpu has .* free: choose") as refused:
            q.load(folder, experts=experts, device="cpu")
        for place, n in needs.items():
            assert (f'experts="{place}"' in str(refused.value)) == (n <= free)
    monkeypatch.setattr(memory_needs, "free_bytes", lambda _device: needs["disk"] - 1)
    with pytest.raises(ValueError, match="free some, or use a smaller dtype"):
        q.load(folder, experts=experts, device="cpu")


def test_free_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 600 kB\nSwapFree: 40 kB\n")
    monkeypatch.setattr(memory_needs, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_needs, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert free_bytes(cpu) == 640 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) == 640 * 1024
    for name, text in (("max", "5000"), ("current", "3000"), ("stat", "anon 1\ninactive_file 200\nactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes(cpu) == 2300
    monkeypatch.setattr(memory_needs, "MEMINFO", tmp_path / "none")
    assert free_bytes(cpu) is None
    assert free_bytes(torch.device("meta")) is None


def test_free_memory_of_a_gpu_counts_what_torch_keeps_unused(monkeypatch):
    for name, value in (("mem_get_info", (70, 100)), ("memory_reserved", 20), ("memory_allocated", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 85


def test_the_80b_model_on_one_gpu_of_139_gib():
    with torch.device("meta"):
        model = q.Qwen3Next(q.presets.qwen3_next_80b_a3b())
    needs = bytes_needed(model, lambda _: torch.bfloat16)
    gib = {place: n / 2**30 for place, n in needs.items()}
    assert gib["memory"] > 139 > gib["int8"] > gib["disk"]
