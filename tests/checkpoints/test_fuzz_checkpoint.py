"""Randomly damaged folders: each is refused with one clear error, or loads exactly what its files now contain.

The contents are checked independently: the safetensors library must open the same files with the same tensors, and each
key of the edited config.json that is a field must equal the model's value.
"""

import json
import random
import shutil
import signal
import struct
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file

import qwen3next as q
from qwen3next.checkpoints.state_dict_adapter import to_released

SMALL = {
    "hidden_size": 8,
    "head_dim": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 1.0,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "num_hidden_layers": 2,
    "layer_types": ("linear_attention", "full_attention"),
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
    "intermediate_size": 8,
    "vocab_size": 11,
}
WEIRD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**400, 0.5, -0.5, 1e-6, 1e308, float("nan"), float("inf"),
    "", "1", "full_attention", "../../etc/passwd", "\0", "x" * 300, [], [1], [-1], ["full_attention"], [None], {},
    {"a": 1}, [[[]]], {"rope_type": "yarn"}, {"quant_method": "fp8", "weight_block_size": [0, 0]},
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folders = []
    for i, changes in enumerate(({}, {"model_type": "qwen3_5_moe_text"}, {"tie_word_embeddings": True})):
        folder = tmp_path_factory.mktemp("original") / str(i)
        q.save(small_model(**(SMALL | changes)), folder, max_shard_bytes=5_000)
        folders.append(folder)
    return folders


def pick_shard(rng, folder):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def flip_bytes(rng, folder):
    path = pick_shard(rng, folder)
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(8 + length)] = rng.randrange(256)
    path.write_bytes(content)


def cut_or_extend(rng, folder):
    path = pick_shard(rng, folder)
    content = path.read_bytes()
    longer = content + bytes(rng.randrange(1, 50))
    path.write_bytes(rng.choice([content[: rng.randrange(len(content))], longer]))


def edit_header(rng, folder):
    path = pick_shard(rng, folder)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    action = rng.randrange(9)
    entry = header[name]
    if action == 0:
        entry["data_offsets"][rng.randrange(2)] = rng.choice([0, -1, 2**62, 10**30, 3, "1", None, 1.5])
    elif action == 1:
        entry["shape"] = rng.choice([[], [0], [-1, -1], [2**40, 2**40], entry["shape"][::-1], [1, *entry["shape"]], 3])
    elif action == 2:
        entry["dtype"] = rng.choice(["F16", "BF16", "F32", "I8", "I32", "F8_E4M3", "F4", "", 3, None])
    elif action == 3:
        header[rng.choice(["model.extra", "", "__metadata__", name + "_scale_inv", other])] = header.pop(name)
    elif action == 4:
        header[name], header[other] = header[other], header[name]
    elif action == 5:
        del header[name]
    elif action == 6:
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif action == 7:
        header[name] = rng.choice(WEIRD)
    else:
        entry[rng.choice(["extra", "shape", "dtype", "data_offsets"])] = rng.choice(WEIRD)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = text.replace(b"{", b"[" * rng.choice([1, 100_000]), 1)
    claimed = len(text) if rng.random() < 0.9 else rng.choice([0, 1, 2**63, len(text) + 1, len(text) - 1])
    path.write_bytes(struct.pack("<Q", claimed) + text + content[8 + length :])


def edit_index(rng, folder):
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    index = json.loads(path.read_text())
    where = index["weight_map"]
    name = rng.choice(list(where))
    files = sorted(set(where.values()))
    action = rng.randrange(6)
    if action == 0:
        where[name] = rng.choice([*files, *WEIRD, "../x.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors"])
    elif action == 1:
        del where[name]
    elif action == 2:
        where["model.extra"] = rng.choice(files)
    elif action == 3:
        index["weight_map"] = rng.choice(WEIRD)
    elif action == 4:
        index = rng.choice(WEIRD)
    else:
        (folder / rng.choice(files)).unlink()
    path.write_text(json.dumps(index))


def edit_config(rng, folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    key = rng.choice(list(values))
    action = rng.randrange(5)
    if action == 0:
        values[key] = rng.choice(WEIRD)
    elif action == 1:
        del values[key]
    elif action == 2:
        values[key + rng.choice(["x", "_", "s"])] = values.pop(key)
    elif action == 3 and isinstance(values[key], int):
        values[key] = values[key] * rng.choice([2, 3, -1, 10**9]) + rng.choice([0, 1, -1])
    else:
        values[rng.choice(list(values))] = values[key]
    text = json.dumps(values)
    if rng.random() < 0.05:
        text = rng.choice(["", "[]", text[:-1], "[" * 100_000, text.replace("{", '{"vocab_size": 5, ', 1)])
    path.write_text(text)


EDITS = [flip_bytes, cut_or_extend, edit_header, edit_header, edit_index, edit_config, edit_config]


@contextmanager
def at_most(seconds):
    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(folder):
    try:
        with at_most(20):
            model = q.load(folder)
    except ValueError as error:
        sentence = str(error)
    else:
        sentence = ""
    if sentence:
        assert "\n" not in sentence.strip()
        assert str(folder) in sentence or "config" in sentence, sentence
        return False
    told = json.loads((folder / "config.json").read_text())
    for key, value in told.items():
        if key not in ("mtp_num_hidden_layers", "model_type") and hasattr(model.config, key) and value is not None:
            ours = getattr(model.config, key)
            assert (list(ours) if isinstance(ours, tuple) else ours) == value or value == [], key
    library = {}
    for file in sorted(folder.glob("*.safetensors")):
        library |= load_file(file)
    ours = dict(to_released(model.config, dict(model.named_parameters()), model.layout))
    assert ours.keys() == library.keys()
    for name, x in ours.items():
        assert x.shape == library[name].shape
        assert torch.equal(x.nan_to_num(), library[name].nan_to_num()), name
    return True


def fuzz(originals, tmp_path, seed, cases):
    rng, opened, refused = random.Random(seed), 0, 0
    for case in range(cases):
        folder = tmp_path / str(case)
        shutil.copytree(rng.choice(originals), folder)
        for _ in range(rng.choice([1, 1, 1, 2])):
            edit = rng.choice(EDITS)
            try:
                edit(rng, folder)
            except (ValueError, KeyError, IndexError, OSError, TypeError, AttributeError, RecursionError, struct.error):
                continue  # the first edit made a second one impossible
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if check(folder):
                opened += 1
            else:
                refused += 1
        shutil.rmtree(folder)
    return opened, refused


@pytest.mark.parametrize("seed", range(4))
def test_damaged_folders_are_refused_or_open_as_they_say(originals, tmp_path, seed):
    opened, refused = fuzz(originals, tmp_path, seed, 60)
    assert opened > 2  # some edits are valid, so the check of loaded folders is used
    assert refused > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_damaged_folders(originals, tmp_path, seed):
    fuzz(originals, tmp_path, seed, 500)


def test_undamaged(originals):
    assert all(check(folder) for folder in originals)
