"""A cache in a file: tensors, tokens and snapshots, and what it takes to know that they belong to a model."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from layers.gated_deltanet import DeltaNetState
from layers.kv_state import KVState
from layers.rope import Yarn
from qwen3next.atomic import fresh_file
from qwen3next.cache import HybridCache, Mark, State
from qwen3next.fingerprint import fingerprint
from qwen3next.json_files import parse
from qwen3next.tensor_files import Files, read_header, read_metadata, write

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

FORMAT = "qwen3next cache 2"
STORED = ("k", "v", "k_scale", "v_scale")
# Fields of a configuration that do not change what a cache holds.
_BESIDE = """
    extra outer initializer_range max_position_embeddings mtp_num_hidden_layers rope_scaling router_aux_loss_coef
    router_z_loss_coef mtp_loss_coef bos_token_id eos_token_id pad_token_id
"""
BESIDE = _BESIDE.split()


def identity(model: "Qwen3Next") -> str:
    """Of what makes a cache's contents: dtypes count, the MTP layer does not."""
    return fingerprint(model, left_out=lambda name: name.startswith("mtp."), beside=BESIDE)


def token_hash(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()


def save_cache(cache: HybridCache, path: str | Path, model: "Qwen3Next") -> None:
    """Write a cache and its snapshots as safetensors; under a temporary name, which is then renamed.

    Keys and values that snapshots share with the cache are written once.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}  # where a part of keys and values lies → its number

    def add(mark: Mark, tokens: Tensor, prefix: str) -> dict[str, Any]:
        held = max(mark.lengths)
        kv: dict[str, list[tuple[int, int]]] = {}
        for i, state in enumerate(mark.layers):
            if isinstance(state, KVState):
                kv[str(i)] = []
                for part in state.parts(0, held):
                    number, n = numbers.setdefault(part[0].data_ptr(), len(numbers)), part[0].shape[2]
                    kv[str(i)].append((number, n))
                    for name, x in zip(STORED, part, strict=False):
                        key = f"kv.{number}.{name}"
                        if key not in tensors or tensors[key].shape[2] < n:
                            tensors[key] = x
            else:
                tensors.update({f"{prefix}layers.{i}.conv": state.conv, f"{prefix}layers.{i}.memory": state.memory})
        tensors[f"{prefix}tokens"] = tokens[:, :held]
        if mark.last_logits is not None:
            tensors[f"{prefix}last_logits"] = mark.last_logits
        return {"lengths": mark.lengths, "kv": kv, "tokens": token_hash(tokens[:, :held])}

    described = {"": add(cache.mark(), cache.tokens, "")}
    for name, mark in cache.snapshots.items():
        assert mark.tokens is not None
        described[name] = add(mark, mark.tokens, f"snapshots.{len(described)}.")
    about = {
        "format": FORMAT,
        "fingerprint": identity(model),
        "yarn": cache.yarn and asdict(cache.yarn),
        "kv_dtype": next((str(s.dtype).removeprefix("torch.") for s in cache.layers if isinstance(s, KVState)), None),
        "marks": described,
    }
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    with fresh_file(Path(path)) as fresh:
        plan = [(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
        write(fresh, plan, tensors.items(), metadata={"format": "pt", "about": json.dumps(about)})


def load_cache(path: str | Path, model: "Qwen3Next", *, max_len: int | None = None, history: int = 0) -> HybridCache:
    """Read a cache that `model` wrote, on its device, with room for `max_len` tokens (the default, if None).

    Raises: ValueError for a damaged file, or one of another model, dtype or RoPE factor.
    """
    path = Path(path)
    stored = read_header(path)
    try:
        about = parse(read_metadata(path).get("about", "null"))
        known = isinstance(about, dict) and about.get("format") == FORMAT
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{path} is not a cache of this version: fill it anew.")
    if about["fingerprint"] != identity(model):
        raise ValueError(f"{path} is the cache of another model, or of other weights or another dtype of this one.")
    if (about["yarn"] and Yarn(**about["yarn"])) != model.config.rope_scaling:
        raise ValueError(
            f"{path} was made with RoPE scaling {about['yarn']}, the model has {model.config.rope_scaling}: "
            "call model.extend_context with the same factor, or fill it anew."
        )
    device = model.embed_tokens.weight.device
    with Files() as files:
        tensors = {name: files.read(place).to(device) for name, place in stored.items()}
    marks = about["marks"]
    held = max(max(m["lengths"]) for m in marks.values())
    batch = len(marks[""]["lengths"])
    limit = max(held, 4096) if max_len is None else max_len
    if limit < held:
        raise ValueError(f"{path} holds {held} tokens and max_len is {limit}: make it larger.")
    cache = model.new_cache(batch=batch, max_len=limit, kv_dtype=about["kv_dtype"], history=history)
    for n, (name, described) in enumerate(marks.items()):
        mark = _mark(path, cache, tensors, described, f"snapshots.{n}." if name else "")
        if name:
            cache.snapshots[name] = mark
        else:
            cache.go_to(mark)
    return cache


def _mark(
    path: Path,
    cache: HybridCache,
    tensors: dict[str, Tensor],
    described: dict[str, Any],
    prefix: str,
) -> Mark:
    tokens = tensors[f"{prefix}tokens"]
    if token_hash(tokens) != described["tokens"]:
        raise ValueError(f"{path} has been changed: its tokens are not those that it was written for.")
    layers: list[State] = []
    for i, state in enumerate(cache.layers):
        if isinstance(state, KVState):
            fresh = state.share(0)
            parts = [
                tuple(tensors[f"kv.{number}.{name}"][:, :, :n] for name in STORED if f"kv.{number}.{name}" in tensors)
                for number, n in described["kv"][str(i)]
            ]
            fresh.hold(tuple(parts))
            layers.append(fresh)
        else:
            layers.append(DeltaNetState(tensors[f"{prefix}layers.{i}.conv"], tensors[f"{prefix}layers.{i}.memory"]))
    logits = tensors.get(f"{prefix}last_logits")
    return Mark(tuple(described["lengths"]), layers, logits, tokens)
