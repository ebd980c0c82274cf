"""Write activations of many tokens to disk in constant memory, for dictionary learning.

    for done, total in stream_activations(model, batches, "acts", "blocks.0.hook_attn_out", rows=1_000_000): ...
    rows = ActivationRows("acts")
    for batch in rows.batches(4096): batch["blocks.0.hook_attn_out"], batch["token"]

A row is one real token. Shards are safetensors files with a fixed number of rows. index.json lists the shards and is
written after each, so that a process killed at any moment leaves complete shards, and a new run continues after them.
Shuffling permutes one block of shards at a time, by the seed and the block's number. So a block that was partly written
is computed again in the same order, and only its missing shards are added.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.hook_point import HookPoint
from layers.segments import Segments
from qwen3next.files import json_files
from qwen3next.files.atomic import fresh_file
from qwen3next.files.tensor_files import write
from qwen3next.hooks.names import Filter
from qwen3next.interp.points import identity

INDEX = "index.json"
COLUMNS = ("token", "position", "row")  # besides the points: token id, position in its sequence, number of the row
OTHER_TOKENS = "give the same batches from the start, or choose another folder."
Batches = Iterable[Tensor | tuple[Tensor, Segments]]


def stream_activations(
    model: Any,
    batches: Batches,
    folder: str | Path,
    names: Filter,
    *,
    rows: int | None = None,
    rows_per_shard: int = 65_536,
    shuffle_shards: int = 0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Run the model over batches of token ids and write chosen points to disk.

    This is a generator: it runs while iterated over, and yields (rows done, rows wanted). Each forward stops after the
    last chosen point.

    Args:
        batches: (b, t) ids, or tuples of ids and segments; padding gives no rows. To continue after an interruption,
            give the same batches from the start: finished rows are skipped without running the model.
        names: points with a value for each token, as for `run_with_cache`.
        rows: stop after this number of rows; None runs to the end of the batches.
        rows_per_shard: rows in each file.
        shuffle_shards: shuffle within this number of shards, which are held in memory; 0 keeps the tokens' order.
        seed: for the shuffle.
        dtype: dtype of floating-point values on disk; None keeps the model's.
    Raises: ValueError for a folder with other settings, or batches that differ from those of an earlier run.
    """
    folder, chosen = Path(folder), model.match_hooks(names)
    block_rows = rows_per_shard * max(shuffle_shards, 1)
    if rows_per_shard < 1 or shuffle_shards < 0:
        raise ValueError(
            f"rows_per_shard ({rows_per_shard}) must be positive, shuffle_shards ({shuffle_shards}) 0 or more."
        )
    settings = {
        "model": identity(model),
        "names": chosen,
        "wanted": rows,
        "rows_per_shard": rows_per_shard,
        "shuffle_shards": shuffle_shards,
        "seed": seed,
        "dtype": _name(dtype),
    }
    index = _open(folder, settings)
    if index["complete"]:
        yield index["rows"], rows
        return

    done = index["rows"] // block_rows * block_rows  # start with the first incomplete block
    digest, seen, filled = hashlib.sha256(), 0, 0
    buffer: dict[str, Tensor] = {}
    for batch in batches:
        ids, segments = batch if isinstance(batch, tuple) else (batch, Segments.full(batch))
        ids, segments = segments.closed(ids)
        tokens = ids[segments.mask].cpu()
        end = len(tokens) if rows is None else min(len(tokens), rows - seen)
        begin = min(max(done - seen, 0), end)
        digest.update(tokens[:begin].numpy().tobytes())
        if begin < end:
            if seen + begin == done and not filled and digest.hexdigest() != index["digest"]:
                raise ValueError(f"{folder} was started with other tokens: {OTHER_TOKENS}")
            values = _run(model, ids, segments, chosen, dtype)
            values |= {"token": tokens, "position": segments.positions[segments.mask].cpu()}
            values["row"] = torch.arange(seen, seen + len(tokens))
        while begin < end:
            take = min(end - begin, block_rows - filled)
            for name, x in values.items():
                if name not in buffer:
                    buffer[name] = x.new_empty(block_rows, *x.shape[1:])
                buffer[name][filled : filled + take] = x[begin : begin + take]
            digest.update(tokens[begin : begin + take].numpy().tobytes())
            begin, filled = begin + take, filled + take
            if filled == block_rows:
                _write_block(folder, index, buffer, done // block_rows, digest.hexdigest())
                done, filled = done + filled, 0
        seen += len(tokens)
        yield (seen if rows is None else min(seen, rows)), rows
        if rows is not None and seen >= rows:
            break
    if seen < index["rows"]:
        raise ValueError(f"{folder} holds {index['rows']} rows, but these batches have {seen}: {OTHER_TOKENS}")
    if filled:
        rest = {name: x[:filled] for name, x in buffer.items()}
        _write_block(folder, index, rest, done // block_rows, digest.hexdigest())
    index["complete"] = True
    json_files.write(folder / INDEX, index)
    yield index["rows"], rows


def _open(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The folder's index, or a new one. Raises: ValueError if it was started with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for half in [*folder.glob(f".{INDEX}-*"), *folder.glob(".*.safetensors-*")]:  # left by a killed process
        half.unlink(missing_ok=True)
    if not (folder / INDEX).exists():
        empty = hashlib.sha256().hexdigest()
        return {"settings": settings, "points": {}, "rows": 0, "shards": [], "digest": empty, "complete": False}
    index = json_files.read_object(folder / INDEX, "an index of activations")
    differing = [name for name in settings if index["settings"].get(name) != settings[name]]
    if differing:
        raise ValueError(
            f"{folder} was started with {differing[0]} {index['settings'].get(differing[0])}, not "
            f"{settings[differing[0]]}: choose another folder, or delete this one."
        )
    return index


class _EnoughError(Exception):
    """Stops a forward after the last chosen point."""


@torch.no_grad()
def _run(
    model: Any, ids: Tensor, segments: Segments, names: Sequence[str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The points' values at real tokens (rows, …), in CPU memory."""
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        if x.shape[:2] != ids.shape or not hook.shape.startswith("b t"):
            raise ValueError(f"{hook.name} has no value for each token: choose points of shape (b, t, …).")
        real = x[segments.mask]
        found[hook.name] = real.to("cpu", dtype=dtype if real.is_floating_point() else None)
        if len(found) == len(names):
            raise _EnoughError

    try:
        with model.hooks([(names, keep)]):
            model(ids, segments=segments, logits_to_keep=1)
    except _EnoughError:
        pass
    return {name: found[name] for name in names}


def _write_block(folder: Path, index: dict[str, Any], block: dict[str, Tensor], number: int, digest: str) -> None:
    """Write the missing shards of a block, and the index after each. `digest` covers all rows up to the block's end."""
    settings, (first, *_) = index["settings"], block.values()
    order = torch.arange(len(first))
    if settings["shuffle_shards"]:
        seed = int.from_bytes(hashlib.sha256(f"{settings['seed']}/{number}".encode()).digest()[:7], "big")
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    shards = order.split(settings["rows_per_shard"])
    there = index["shards"][number * max(settings["shuffle_shards"], 1) :]
    if [shard["rows"] for shard in there] != [len(picked) for picked in shards[: len(there)]]:
        raise ValueError(f"{folder} was finished with fewer tokens before: {OTHER_TOKENS}")
    for i, picked in enumerate(shards[len(there) :], start=len(there)):
        path = folder / f"{len(index['shards']):06}.safetensors"
        plan = [(name, x.dtype, (len(picked), *x.shape[1:])) for name, x in block.items()]
        with fresh_file(path) as fresh:
            write(fresh, plan, ((name, x[picked]) for name, x in block.items()))
        index["points"] = {name: {"shape": shape[1:], "dtype": _name(dtype)} for name, dtype, shape in plan}
        index["shards"].append({"file": path.name, "rows": len(picked)})
        index["rows"] += len(picked)
        if i + 1 == len(shards) and len(first) == settings["rows_per_shard"] * max(settings["shuffle_shards"], 1):
            index["digest"] = digest  # covers complete blocks only: a resumed run starts after them
        json_files.write(folder / INDEX, index)


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
