"""Save and load a cache: tensors, tokens, snapshots and the fingerprint of the model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.rope import Yarn
from layers.state.kv_cache import NAMES, KVCache
from qwen3next.cache.rollback_log import State
from qwen3next.cache.snapshot import Snapshot
from qwen3next.files.checksummed import read_about, read_checksummed, write_checksummed
from qwen3next.files.fingerprint import fingerprint

FORMAT = "qwen3next cache 4"
# Fields of a configuration that do not change the contents of a cache.
_BESIDE = """
    extra wrapper_config initializer_range max_position_embeddings mtp_num_hidden_layers rope_scaling
    router_aux_loss_coef router_z_loss_coef logit_z_loss_coef mtp_loss_coef bos_token_id eos_token_id pad_token_id
"""
BESIDE = _BESIDE.split()


def identity(model: Any, *, mtp: bool = False) -> str:
    """The fingerprint of a model for its caches. It includes dtypes, and the MTP layer only if `mtp`."""
    return fingerprint(model, left_out=lambda name: name.startswith("mtp.") and not mtp, beside=BESIDE)


def save_cache(cache: Any, path: str | Path) -> None:
    """`HybridCache.save`."""
    model = None if cache.model is None else cache.model()
    if model is None:
        raise ValueError("The model of this cache was deleted: save the cache while the model exists.")
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}  # address of a part of keys and values → its number

    def parts_of(state: KVCache, held: int) -> list[tuple[int, int]]:
        found = []
        for part in state.parts(0, held):
            number, n = numbers.setdefault(part[0].data_ptr(), len(numbers)), part[0].shape[2]
            found.append((number, n))
            for name, x in zip(NAMES, part, strict=False):
                key = f"kv.{number}.{name}"
                if key not in tensors or tensors[key].shape[2] < n:
                    tensors[key] = x
        return found

    def add(mark: Snapshot, prefix: str) -> dict[str, Any]:
        held = max(mark.lengths)
        kv: dict[str, list[tuple[int, int]]] = {}
        for i, state in enumerate(mark.layers):
            if isinstance(state, KVCache):
                kv[str(i)] = parts_of(state, held)
            else:
                tensors.update({f"{prefix}layers.{i}.conv": state.conv, f"{prefix}layers.{i}.memory": state.recurrent})
        if mark.mtp is not None:
            kv["mtp"] = parts_of(mark.mtp, max(held - 1, 0))
        tensors[f"{prefix}tokens"] = mark.tokens
        for name, x in (("hidden", mark.hidden), ("last_logits", mark.last_logits)):
            if x is not None:
                tensors[prefix + name] = x
        return {"lengths": mark.lengths, "kv": kv}

    described = {"": add(cache.mark(), "")}
    for name, mark in cache.snapshots.items():
        described[name] = add(mark, f"snapshots.{len(described)}.")
    about = {
        "format": FORMAT,
        "fingerprint": identity(model, mtp=cache.mtp is not None),
        "yarn": cache.yarn and asdict(cache.yarn),
        "kv_dtype": cache.kv_dtype and str(cache.kv_dtype).removeprefix("torch."),
        "mtp": cache.mtp is not None,
        "marks": described,
    }
    write_checksummed(Path(path), tensors, about)


def load_cache(path: str | Path, model: Any, *, max_len: int | None, history: int) -> Any:
    """`HybridCache.load`."""
    path = Path(path)
    about = read_about(path, format=FORMAT, kind="a cache")
    if about["fingerprint"] != identity(model, mtp=about["mtp"]):
        raise ValueError(f"{path} is a cache of another model, other weights or another dtype: use its own model.")
    if (about["yarn"] and Yarn(**about["yarn"])) != model.config.rope_scaling:
        raise ValueError(
            f"{path} was made with RoPE scaling {about['yarn']}, the model has {model.config.rope_scaling}: "
            "call model.extend_context with the same factor, or create the cache again."
        )
    device = model.device
    tensors = {name: x.to(device) for name, x in read_checksummed(path, about).items()}
    marks = about["marks"]
    held = max(max(m["lengths"]) for m in marks.values())
    batch = len(marks[""]["lengths"])
    limit = max(held, 4096) if max_len is None else max_len
    if limit < held:
        raise ValueError(f"{path} holds {held} tokens, but max_len is {limit}: make it larger.")
    kv_dtype = about["kv_dtype"]
    cache = model.new_cache(batch=batch, max_len=limit, kv_dtype=kv_dtype, history=history, mtp=about["mtp"])
    for n, (name, described) in enumerate(marks.items()):
        mark = _mark(cache, tensors, described, f"snapshots.{n}." if name else "")
        if name:
            cache.snapshots[name] = mark
        else:
            cache.go_to(mark)
    return cache


def _mark(cache: Any, tensors: dict[str, Tensor], described: dict[str, Any], prefix: str) -> Snapshot:
    def keys_and_values(state: KVCache, key: str) -> KVCache:
        fresh = state.share(0)
        parts = [
            tuple(tensors[f"kv.{number}.{name}"][:, :, :n] for name in NAMES if f"kv.{number}.{name}" in tensors)
            for number, n in described["kv"][key]
        ]
        fresh.hold(tuple(parts))
        return fresh

    layers: list[State] = []
    for i, state in enumerate(cache.layers):
        if isinstance(state, KVCache):
            layers.append(keys_and_values(state, str(i)))
        else:
            layers.append(DeltaNetState(tensors[f"{prefix}layers.{i}.conv"], tensors[f"{prefix}layers.{i}.memory"]))
    mtp = None if cache.mtp is None else keys_and_values(cache.mtp, "mtp")
    hidden, logits = (tensors.get(prefix + name) for name in ("hidden", "last_logits"))
    return Snapshot(tuple(described["lengths"]), layers, mtp, tensors[f"{prefix}tokens"], hidden, logits)
