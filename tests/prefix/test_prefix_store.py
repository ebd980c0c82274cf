"""The prefix store: matches and their reasons, budgets, files, and a random walk against cold runs."""

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from caches import cold, cold_draft, same
from conftest import small_model
from parity import tokens

import qwen3next as q
from qwen3next.files import checksummed
from qwen3next.generation.prefill import Prefilling
from qwen3next.prefix import files


@pytest.fixture(scope="module")
def model():
    return small_model(dtype=torch.float64, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))


def fill(store, ids, **options):
    run = store.prefill(ids, **options)
    done = list(run)
    assert done[-1] == (ids.shape[-1], ids.shape[-1])
    assert run.cache.lengths == (ids.shape[-1],)
    return run


def check(model, run, ids):
    logits = run.cache.last_logits
    if logits is None:
        logits = model.lm_head(run.cache.hidden)
    assert same(logits, cold(model, ids))


def join(*parts):
    return torch.cat(parts, dim=1)


def test_what_is_known_is_not_run_again(model):
    store = q.PrefixStore(model, spacing=64)
    document, one, other = (tokens(n, b=1) for n in (200, 10, 13))
    first = fill(store, join(document, one), points=[200])
    assert (first.matched_tokens, first.reason) == (0, "Nothing is stored yet.")
    second = store.prefill(join(document, other))
    assert (second.matched_tokens, second.reason) == (200, "The stored texts continue differently from there.")
    assert list(second) == [(213, 213)]
    again = store.prefill(join(document, one))
    assert (again.matched_tokens, again.reason) == (210, "")
    assert list(again) == [(210, 210)]
    for run, text in ((first, one), (second, other), (again, one)):
        check(model, run, join(document, text))
        expected = q.generate(model, join(document, text), max_new_tokens=5)
        assert torch.equal(q.generate(model, join(document, text), cache=run.cache, max_new_tokens=5), expected)
    ends = store.match(join(document, one, other))
    assert (ends.matched_tokens, ends.reason) == (210, "The stored text ends there.")
    assert store.match(other).reason == "No stored text starts like this."


def test_a_state_is_kept_where_texts_part(model):
    """The first prompt keeps no state at the common end, the second finds it and keeps one, the third reuses it."""
    store = q.PrefixStore(model, spacing=1024)
    shared, tails = tokens(150, b=1), [tokens(n, b=1) for n in (20, 31, 42)]
    runs = [fill(store, join(shared, tail)) for tail in tails]
    assert [run.matched_tokens for run in runs] == [0, 0, 128]
    assert runs[1].reason == "Tokens 0 to 150 are stored, but without a state after any of them."
    for run, tail in zip(runs, tails, strict=True):
        check(model, run, join(shared, tail))
    inside = store.match(shared[:, :140])
    assert (inside.matched_tokens, inside.shared_tokens) == (128, 140)
    assert inside.reason == "Tokens 128 to 140 are stored, but without a state after any of them."


def test_conversations_go_on_where_they_ended(model):
    store = q.PrefixStore(model)
    run = fill(store, tokens(30, b=1))
    text = q.generate(model, tokens(30, b=1), cache=run.cache, max_new_tokens=8)
    store.add(run.cache)
    longer = join(text, tokens(5, b=1))
    after = fill(store, longer)
    assert after.matched_tokens == 37  # the last generated token was not run
    check(model, after, longer)


def test_the_mtp_layers_part_is_kept_too(model):
    store = q.PrefixStore(model, mtp=True, spacing=64)
    ids, token = tokens(150, b=1), torch.tensor([7])
    fill(store, join(ids, tokens(4, b=1)))
    for text in (ids, join(ids[:, :100], tokens(9, b=1)), join(ids[:, :100], tokens(3, b=1))):
        run = fill(store, text)
        assert run.matched_tokens >= 64
        assert same(model.draft(run.cache, token), cold_draft(model, text, token))


def test_keys_and_values_are_shared_and_not_copied(model):
    store = q.PrefixStore(model, spacing=1024)
    ids = tokens(3000, b=1)
    caches = [fill(store, join(ids, tokens(n, b=1))).cache for n in (3, 4, 5, 6)]
    memory = {}
    for cache in caches[1:]:  # the second one's text is split where it differs from the first
        memory |= cache.storages()
    assert sum(memory.values()) < 1.3 * caches[0].nbytes()


def test_the_budget_holds_and_old_texts_go_first(model):
    size = model.new_cache().nbytes() + 300 * model.config.bytes_per_token(8)
    store = q.PrefixStore(model, budget=int(3.1 * size), spacing=1024)
    texts = [torch.full((1, 300), n) for n in range(5)]
    for text in texts:
        fill(store, text)
        assert store.nbytes <= store.budget
    assert [store.match(text).matched_tokens for text in texts] == [0, 0, 300, 300, 300]
    fill(store, texts[2])
    fill(store, torch.full((1, 300), 9))
    assert [store.match(text).matched_tokens for text in texts] == [0, 0, 300, 0, 300]


def test_states_in_the_middle_go_before_keys_and_values(model):
    state, ids = model.new_cache().nbytes(), tokens(640, b=1)
    store = q.PrefixStore(model, budget=640 * model.config.bytes_per_token(8) + 3 * state, spacing=64)
    run = fill(store, ids)
    check(model, run, ids)
    assert store.match(ids).matched_tokens == 640
    assert len(store) < 10
    assert store.match(ids[:, :200]).matched_tokens == 0


def test_a_prompt_beyond_the_budget_keeps_its_beginning_and_says_so(model):
    state, ids = model.new_cache().nbytes(), tokens(640, b=1)
    store = q.PrefixStore(model, budget=300 * model.config.bytes_per_token(8) + 2 * state, spacing=64)
    check(model, fill(store, ids), ids)
    found = store.match(ids)
    assert 0 < found.matched_tokens <= 300
    assert re.fullmatch(r"The budget of .* had no room for the tokens after that\.", found.reason)
    check(model, fill(store, ids), ids)


def test_bad_input_is_refused_in_a_sentence(model, tmp_path):
    with pytest.raises(ValueError, match="cannot hold one state"):
        q.PrefixStore(model, budget=100)
    with pytest.raises(ValueError, match="multiple of 64"):
        q.PrefixStore(model, spacing=100)
    store = q.PrefixStore(model)
    with pytest.raises(ValueError, match="one sequence"):
        store.match(tokens(3))
    with pytest.raises(ValueError, match="one sequence"):
        store.prefill(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="max_len is 3"):
        store.prefill(tokens(5, b=1), max_len=3)
    with pytest.raises(ValueError, match="The cache has 2 rows, but a store takes one sequence"):
        store.add(model.new_cache(batch=2))
    for options in ({"kv_dtype": "float32"}, {"state_dtype": "bfloat16"}, {"mtp": True}):
        cache = model.new_cache(**options)
        list(model.prefill(tokens(5, b=1), cache))
        with pytest.raises(ValueError, match="other options"):
            store.add(cache)
    other = small_model(dtype=torch.float64, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
    store = q.PrefixStore(other)
    other.extend_context(2.0)
    with pytest.raises(ValueError, match="make a new store"):
        store.match(tokens(5, b=1))


def test_another_process_goes_on_from_the_folder(model, tmp_path):
    ids, tail = tokens(200, b=1), tokens(7, b=1)
    fill(q.PrefixStore(model, folder=tmp_path, spacing=64), ids)
    store = q.PrefixStore(model, folder=tmp_path, spacing=64)
    assert store.nbytes == 0
    run = fill(store, join(ids, tail))
    assert run.matched_tokens == 200
    check(model, run, join(ids, tail))
    assert q.PrefixStore(model, folder=tmp_path, spacing=64).match(join(ids, tail)).matched_tokens == 207
    for other in (small_model(seed=1, dtype=torch.float64), small_model()):
        assert q.PrefixStore(other, folder=tmp_path).match(ids).matched_tokens == 0
    assert q.PrefixStore(model, folder=tmp_path, kv_dtype="int8").match(ids).matched_tokens == 0


def test_memory_is_a_cache_of_the_folder(model, tmp_path):
    size = model.new_cache().nbytes() + 300 * model.config.bytes_per_token(8)
    store = q.PrefixStore(model, budget=int(1.5 * size), folder=tmp_path, spacing=1024)
    texts = [torch.full((1, 300), n) for n in range(4)]
    for text in [*texts, *texts[::-1]]:
        check(model, fill(store, text), text)
        assert store.nbytes <= store.budget
    assert [store.match(text).matched_tokens for text in texts] == [300] * 4


def test_the_folders_budget_holds(model, tmp_path):
    size = model.new_cache().nbytes() + 300 * model.config.bytes_per_token(8)
    store = q.PrefixStore(model, folder=tmp_path, disk_budget=int(2.5 * size), spacing=1024)
    for n in range(5):
        fill(store, torch.full((1, 300), n))
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 2.5 * size
    fresh = q.PrefixStore(model, folder=tmp_path, spacing=1024)
    assert [fresh.match(torch.full((1, 300), n)).matched_tokens for n in range(5)] == [0, 0, 0, 300, 300]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_damaged_files_are_forgotten_and_said(model, tmp_path, damage):
    ids = tokens(200, b=1)
    fill(q.PrefixStore(model, folder=tmp_path, spacing=64), ids)
    store = q.PrefixStore(model, folder=tmp_path, spacing=64)
    begins = {node.begin: node.file for node in store.root.below() if node.file}
    path = begins[128]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    damaged = {"cut": bytes(content[:-9]), "flip": bytes(content), "empty": b""}
    if damage == "gone":
        path.unlink()
        run = fill(store, ids)
    else:
        path.write_bytes(damaged[damage])
        with pytest.warns(UserWarning, match="is removed"):
            run = fill(store, ids)
    assert run.matched_tokens == 128
    check(model, run, ids)
    assert q.PrefixStore(model, folder=tmp_path, spacing=64).match(ids).matched_tokens == 200


def test_a_killed_write_leaves_what_was_there(model, tmp_path, monkeypatch):
    ids = tokens(200, b=1)
    store = q.PrefixStore(model, folder=tmp_path, spacing=64)
    run = store.prefill(ids)
    steps = iter(run)
    next(steps)
    next(steps)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3next.files.checksummed.write", full)
    with pytest.raises(OSError, match="No space"):
        list(steps)
    monkeypatch.undo()
    fresh = q.PrefixStore(model, folder=tmp_path, spacing=64)
    assert fresh.match(ids).matched_tokens == 128
    check(model, fill(fresh, ids), ids)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("on_disk", [False, True, "background"])
def test_a_walk_is_held_to_cold_runs(model, tmp_path, seed, on_disk):
    """Texts with common prefixes of all lengths, small budgets, two stores with one folder, continued chats."""
    rng = random.Random(seed)
    sizes = model.new_cache().nbytes(), model.config.bytes_per_token(8)
    budget = rng.randint(2, 12) * sizes[0] + rng.randint(100, 600) * sizes[1]
    options = {"budget": budget, "spacing": 64, "mtp": seed % 2 == 0}
    if on_disk:
        options |= {"folder": tmp_path, "disk_budget": 2 * budget, "background": on_disk == "background"}
    stores, texts = [q.PrefixStore(model, **options) for _ in range(2 if on_disk else 1)], [tokens(250, b=1)]
    for n in range(25):
        text = rng.choice(texts)[:, : rng.randint(1, 250)]
        text = join(
            text, torch.randint(0, 97, (1, rng.choice([0, 1, 5, 70])), generator=torch.Generator().manual_seed(n))
        )
        texts.append(text)
        store = rng.choice(stores)
        run = fill(store, text, chunk_size=rng.choice([64, 4096]))
        check(model, run, text)
        assert store.nbytes <= budget
        if rng.random() < 0.3:
            said = q.generate(model, text, cache=run.cache, max_new_tokens=4)
            store.add(run.cache)
            texts.append(said)
        if on_disk and rng.random() < 0.1:
            stores[0].close()
            stores[0] = q.PrefixStore(model, **options)
    for store in stores:
        store.close()


def test_files_are_written_in_the_background(model, tmp_path, monkeypatch):
    """The same folder as without a thread, also where nodes are split.

    A node is not listed twice by a look into the folder when its file is there, and the node does not know it yet.
    """
    make_room = files.PrefixFolder.make_room

    def looked(self, **options):
        if store.files is self:
            store.refresh()
        return make_room(self, **options)

    texts = [tokens(200, b=1), join(tokens(200, b=1)[:, :150], tokens(40, b=1)), tokens(100, b=1)]
    names, matches = [], []
    for background in (False, True):
        store = q.PrefixStore(model, folder=tmp_path / str(background), spacing=64, background=background)
        if background:
            monkeypatch.setattr(files.PrefixFolder, "make_room", looked)
        for text in texts:
            check(model, fill(store, text), text)
            assert store.flush(60.0)
        store.close()
        known = [node.file for node in store.root.below() if node.parent is not None]
        assert len(known) == len(set(known))
        assert None not in known
        names.append({file.name: file.stat().st_size for file in (tmp_path / str(background)).rglob("*.safetensors")})
        fresh = q.PrefixStore(model, folder=tmp_path / str(background), spacing=64)
        matches.append([fresh.match(text).matched_tokens for text in texts])
        for text in texts:
            check(model, fill(fresh, text), text)
    assert names[0] == names[1]
    assert matches[0] == matches[1] == [200, 190, 100]


def test_a_write_that_is_cut_leaves_what_was_there(model, tmp_path, monkeypatch):
    """A store that ends in the midst of a write, as a killed process does: another finds the files before it."""
    ids, begun, on, write = tokens(200, b=1), threading.Event(), threading.Event(), checksummed.write

    def cut(path, *args, **options):
        write(path, *args, **options)
        if len(list(path.parent.glob("*.safetensors"))) == 2:
            path.write_bytes(path.read_bytes()[:100])
            begun.set()
            on.wait(60)
            raise OSError(5, "cut")

    monkeypatch.setattr(checksummed, "write", cut)
    store = q.PrefixStore(model, folder=tmp_path, spacing=64, background=True)
    run = fill(store, ids)  # is not held up
    assert begun.wait(60)
    assert not store.flush(0.01)
    fresh = q.PrefixStore(model, folder=tmp_path, spacing=64)
    assert fresh.match(ids).matched_tokens == 128
    check(model, run, ids)
    assert store.match(ids).matched_tokens == 200
    on.set()
    store.close()
    monkeypatch.undo()
    check(model, fill(fresh, ids), ids)


def test_what_a_slow_folder_cannot_take_is_left_out(model, tmp_path, monkeypatch):
    """At most `budget` bytes wait to be written; the rest is in memory alone, and later texts are written again."""
    on, write, texts = threading.Event(), checksummed.write, [torch.full((1, 300), n) for n in range(6)]

    def slow(*args, **options):
        on.wait(60)
        write(*args, **options)

    monkeypatch.setattr(checksummed, "write", slow)
    size = model.new_cache().nbytes() + 300 * model.config.bytes_per_token(8)
    options = {"folder": tmp_path, "spacing": 1024}
    store = q.PrefixStore(model, budget=int(3.5 * size), background=True, **options)
    for text in texts[:5]:
        fill(store, text)
    assert not store.files.writer.put(lambda: None, int(3 * size))
    on.set()
    assert store.flush(60.0)
    fill(store, texts[5])
    store.close()
    fresh = q.PrefixStore(model, **options)
    assert [fresh.match(text).matched_tokens for text in texts] == [300, 300, 300, 0, 0, 300]


@pytest.mark.filterwarnings("error")
def test_stores_in_threads_share_a_folder(tmp_path):
    """Four threads write and read the same texts concurrently; each cache equals that of a cold run."""
    model = small_model(dtype=torch.float64)
    texts = [torch.randint(0, 97, (70,), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    texts += [torch.cat((text[:64], text[:30])) for text in texts]
    want = [cold(model, text[None]) for text in texts]

    def work(n):
        store = q.PrefixStore(model, folder=tmp_path, budget="1GiB")
        for k in range(len(texts)):
            i = (k * 5 + n * 3) % len(texts)
            found = store.prefill(texts[i])
            for _ in found:
                pass
            assert same(found.cache.last_logits, want[i])
        return store

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    again = q.PrefixStore(model, folder=tmp_path, budget="1GiB")
    assert all(again.match(text).matched_tokens == len(text) for text in texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_exact_store_gives_the_bits_of_a_cold_run(dtype, tmp_path):
    """Behind stored prefixes of any length, in pieces of any size, from memory and from files."""
    model, shared = small_model(dtype=dtype), tokens(300, b=1)
    stores = [q.PrefixStore(model, exact=True, spacing=64, folder=tmp_path, mtp=True) for _ in "ab"]
    for n, length in enumerate((300, 15, 16, 79, 80, 143, 144, 207, 300)):
        text, store = join(shared[:, :length], tokens(n, b=1)) if n else shared, stores[n % 2]
        store.refresh()
        run = store.prefill(text, chunk_size=(64, 4096, 128)[n % 3], points=[100])
        for _ in run:
            pass
        alone = model.new_cache(max_len=400, mtp=True)
        for _ in model.prefill(text, alone):
            pass
        assert torch.equal(run.cache.last_logits, alone.last_logits), length
        assert run.matched_tokens % 64 == 0
        assert run.matched_tokens <= max(text.shape[1] - 16, 0)
        assert n == 0 or run.matched_tokens >= (length - 16) // 64 * 64
        assert torch.equal(
            q.generate(model, text, cache=run.cache, max_new_tokens=4), q.generate(model, text, max_new_tokens=4)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_short_rest_runs_in_the_same_call(dtype, monkeypatch):
    """The state before it is kept from inside the call; behind it, results and drafts are those of a cold run."""
    model, calls = small_model(dtype=dtype), []
    text, other = tokens(300, b=1), tokens(50, b=1)
    run_block = Prefilling._run_block

    def counted(self, block, x, rope, **options):
        if block is self.blocks[0] and x.shape[1] > 1:
            calls.append(x.shape[1])
        return run_block(self, block, x, rope, **options)

    monkeypatch.setattr(Prefilling, "_run_block", counted)
    for length, first in ((300, [300]), (80, [80]), (79, [79]), (128 + 79, [207]), (128 + 80, [208])):
        store = q.PrefixStore(model, exact=True, mtp=True)
        calls.clear()
        fill(store, text[:, :length])
        assert calls == first
        kept = (length - 16) // 64 * 64
        continued = join(text[:, :kept], other)
        calls.clear()
        found = fill(store, continued)
        assert (found.matched_tokens, calls) == (kept, [50])
        cache = model.new_cache(max_len=400, mtp=True)
        list(model.prefill(continued, cache))
        assert torch.equal(found.cache.last_logits, cache.last_logits)
        for token in range(3):
            assert torch.equal(*(model.draft(c, torch.tensor([token])) for c in (found.cache, cache)))
            assert torch.equal(*(model.step(torch.tensor([[token]]), c) for c in (found.cache, cache)))
    store = q.PrefixStore(model, exact=True, mtp=True)
    calls.clear()
    fill(store, text, chunk_size=128)
    assert calls == [128, 128, 44]  # in smaller chunks the state is kept where one ends
    store = q.PrefixStore(model, exact=True, mtp=True)
    calls.clear()
    with model.hooks([("blocks.0.hook_resid_mid", lambda *_: None)]):  # sees the calls that it always saw
        fill(store, text)
    assert calls == [256, 44]


def test_a_store_finds_what_another_writes_meanwhile(model, tmp_path):
    one, other = (q.PrefixStore(model, folder=tmp_path, spacing=64) for _ in "ab")
    ids = tokens(100, b=1)
    fill(one, ids)
    assert other.match(ids).matched_tokens == 0
    other.refresh()
    assert other.match(ids).matched_tokens == 100
