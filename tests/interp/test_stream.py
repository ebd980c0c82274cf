"""Activations on disk: the same rows as in memory, each exactly once, also after failures during writing."""

import pathlib

import pytest
import torch
from conftest import small_model

from layers.segments import Segments
from qwen3next.files import json_files
from qwen3next.interp import ActivationRows, stream_activations

NAMES = ["blocks.0.hook_attn_out", "blocks.1.linear_attn.hook_o", "blocks.1.mlp.hook_router_indices"]


@pytest.fixture(scope="module")
def model():
    return small_model(num_hidden_layers=2)


def batches():
    """Padded, packed and unpadded batches with 8, 11, 16 and 8 present tokens."""
    g = torch.Generator().manual_seed(0)
    for lengths in ([[3, 2], [3]], [[8], [3]], None, [[3, 2], [3]]):
        segments = None if lengths is None else Segments.from_lengths(lengths)
        ids = torch.randint(0, 97, (2, 8 if segments is None else segments.length), generator=g)
        yield ids if segments is None else (ids, segments)


def rows_in_memory(model, name):
    parts = []
    for batch in batches():
        ids, segments = batch if isinstance(batch, tuple) else (batch, Segments.full(batch))
        with torch.no_grad():  # as in streaming: with gradients other kernels run, with other rounding
            _, acts = model.run_with_cache(ids, segments=segments, names_filter=name)
        parts.append(acts[name][segments.mask])
    return torch.cat(parts)


def write(model, folder, **options):
    return list(stream_activations(model, batches(), folder, NAMES, **({"rows_per_shard": 5} | options)))


@pytest.mark.parametrize("shuffle", [0, 3])
@pytest.mark.parametrize("rows", [None, 23, 30])
def test_rows_are_those_of_the_model_each_once(model, tmp_path, shuffle, rows):
    steps = write(model, tmp_path, shuffle_shards=shuffle, rows=rows)
    total = 43 if rows is None else rows
    assert steps[-1] == (total, rows)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    read = ActivationRows(tmp_path)
    assert (len(read), read.complete) == (total, True)
    order = read.read("row", 0, total)
    assert sorted(order.tolist()) == list(range(total))
    assert (order.tolist() == list(range(total))) == (not shuffle)
    for name in NAMES:
        assert torch.equal(read.read(name, 0, total), rows_in_memory(model, name)[order])
    assert read.columns[NAMES[1]] == {"shape": [4, 24], "dtype": "float32"}


def test_ranges_and_batches(model, tmp_path):
    write(model, tmp_path, shuffle_shards=2, dtype=torch.bfloat16)
    read = ActivationRows(tmp_path)
    whole = read.read(NAMES[0], 0, 43)
    assert whole.dtype == torch.bfloat16
    assert torch.equal(read.read(NAMES[0], 3, 21), whole[3:21])
    got = list(read.batches(10, [NAMES[0], "token"], begin=2))
    assert [len(b["token"]) for b in got] == [10, 10, 10, 10, 1]
    assert torch.equal(torch.cat([b[NAMES[0]] for b in got]), whole[2:])
    drawn = [b["row"].tolist() for b in read.batches(10, seed=1)]
    assert drawn != [b["row"].tolist() for b in read.batches(10)]
    assert sorted(x for batch in drawn for x in batch) == list(range(43))
    with pytest.raises(ValueError, match="rows 0 to 42"):
        read.read("token", 40, 44)
    with pytest.raises(ValueError, match="has no column beta: choose one of blocks"):
        read.read("beta", 0, 1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shuffle", [0, 2])
def test_killed_at_any_moment_it_goes_on_without_a_row_twice_or_missing(model, tmp_path, monkeypatch, shuffle):
    """Every replacement of a file fails once before and once after it; between replacements the disk is unchanged."""
    write(model, tmp_path / "whole", rows_per_shard=12, shuffle_shards=shuffle)
    replace = pathlib.Path.replace
    for when in ("before", "after"):
        for fatal in range(100):
            folder, count = tmp_path / f"{when}{fatal}", 0

            def interrupted(path, target, *, when=when, fatal=fatal):
                nonlocal count
                count += 1
                if when == "before" and count == fatal + 1:
                    raise Killed
                result = replace(path, target)
                if when == "after" and count == fatal + 1:
                    raise Killed
                return result

            monkeypatch.setattr(pathlib.Path, "replace", interrupted)
            try:
                write(model, folder, rows_per_shard=12, shuffle_shards=shuffle)
                survived = True
            except Killed:
                survived = False
            (folder / ".000001.safetensors-99").write_text("half")  # only a signal leaves such a file
            monkeypatch.setattr(pathlib.Path, "replace", replace)
            write(model, folder, rows_per_shard=12, shuffle_shards=shuffle)
            for path in (tmp_path / "whole").iterdir():
                assert (folder / path.name).read_bytes() == path.read_bytes(), (when, fatal)
            assert len(list(folder.iterdir())) == len(list((tmp_path / "whole").iterdir()))
            if survived:
                break
        assert fatal == 9  # four shards, an index after each, and the last index


def test_what_is_done_is_not_run_again(model, tmp_path):
    steps = stream_activations(model, batches_plain(), tmp_path, NAMES[0], rows_per_shard=16)
    next(steps), next(steps)
    steps.close()
    runs = []
    with model.hooks([("hook_embed", lambda *_: runs.append(1))], must_fire=False):
        list(stream_activations(model, batches_plain(), tmp_path, NAMES[0], rows_per_shard=16))
        assert len(runs) == 2
        assert list(stream_activations(model, batches_plain(), tmp_path, NAMES[0], rows_per_shard=16)) == [(64, None)]
    assert len(runs) == 2


def batches_plain(seed=0, count=4):
    return torch.randint(0, 97, (count, 2, 8), generator=torch.Generator().manual_seed(seed)).unbind()


def test_the_model_stops_behind_the_last_point(model, tmp_path):
    ran = []
    with model.hooks([("blocks.*.hook_resid_pre", lambda _, hook: ran.append(hook.name))], must_fire=False):
        list(stream_activations(model, batches_plain(count=1), tmp_path, NAMES[0]))
    assert ran == ["blocks.0.hook_resid_pre"]
    assert not any(point.armed for point in model.hook_dict.values())


def test_other_batches_settings_and_points_are_refused(model, tmp_path):
    def begin(seed=0, names=NAMES[0], count=4, **options):
        data = batches_plain(seed, count)
        return stream_activations(model, data, tmp_path, names, **({"rows_per_shard": 16} | options))

    steps = begin()
    next(steps), next(steps)
    steps.close()
    with pytest.raises(ValueError, match="started with other tokens"):
        list(begin(seed=1))
    with pytest.raises(ValueError, match="these batches have 16"):
        list(begin(count=1))
    with pytest.raises(ValueError, match="started with rows_per_shard 16, not 8"):
        list(begin(rows_per_shard=8))
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is not an index of activations"):
        ActivationRows(tmp_path)


def test_a_stream_that_has_grown_is_refused_where_its_end_was_written(model, tmp_path):
    """The shards of the last block were cut and shuffled for the earlier end of the data."""
    write(model, tmp_path)
    index = json_files.read_object(tmp_path / "index.json", "")
    json_files.write(tmp_path / "index.json", index | {"complete": False})  # killed one step before
    more = [*batches(), *batches_plain()]
    with pytest.raises(ValueError, match="finished with fewer tokens before"):
        list(stream_activations(model, more, tmp_path, NAMES, rows_per_shard=5))


def test_points_without_a_row_a_token_are_refused(tmp_path):
    model = small_model()
    model.set_backend("attention", "eager")
    with pytest.raises(ValueError, match="no value for each token"):
        list(stream_activations(model, batches_plain(), tmp_path, "blocks.3.self_attn.hook_pattern"))
